"""`python -m tapo_train export`: a checkpoint's policy as a Hugging Face folder."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from tapo_train.errors import CheckpointError
from tapo_train.learner.manifest import POLICY, Manifest, latest

DTYPES = ("float32", "bfloat16", "float16")


def main(argv: Sequence[str]) -> int:
    """Parse arguments and export; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tapo_train export",
        description="Copy the policy of a checkpoint into a folder that "
        "AutoModelForImageTextToText.from_pretrained and vLLM load. The checkpoint's files "
        "are checked against their hashes first.",
    )
    parser.add_argument(
        "checkpoint",
        type=Path,
        help="a checkpoint (…/step-000100), or a folder of them: the newest is taken",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--dtype", choices=DTYPES, help="convert the weights; default: as they are")
    arguments = parser.parse_args(argv)
    source = export(arguments.checkpoint, arguments.out, dtype=arguments.dtype)
    print(f"policy of {source} written to {arguments.out}")
    return 0


def export(checkpoint: Path, out: Path, *, dtype: str | None = None) -> Path:
    """Copy the verified policy of `checkpoint` to `out`; the checkpoint taken.

    Raises:
        CheckpointError: no checkpoint there, a damaged file, or `out` exists already.
    """
    source = checkpoint if (checkpoint / POLICY).is_dir() else latest(checkpoint)
    if source is None:
        raise CheckpointError(
            f"{checkpoint}: no checkpoint and none inside; wanted …/step-<number>"
        )
    if out.exists():
        raise CheckpointError(f"{out}: exists already; wanted a new folder")
    manifest = Manifest.read(source)
    manifest.verify(source, files=[n for n in sorted(manifest.files) if n.startswith(f"{POLICY}/")])
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source / POLICY, partial)
    if dtype is not None:
        # Here and not above: converting loads torch, and --help should not wait for it.
        from tapo_train.learner.convert import convert_weights

        convert_weights(partial, dtype=dtype)
    partial.rename(out)
    return source
