"""`python -m tapo_train export`: a checkpoint's policy as a Hugging Face folder."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from tapo_train.errors import CheckpointError
from tapo_train.learner.manifest import MANIFEST, POLICY, Manifest, checkpoints, folder_name

CHECKPOINTS = "checkpoints"
"""Where a run folder keeps them."""
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
        metavar="RUN",
        help="a run folder, a folder of checkpoints, or a checkpoint (…/step-000100)",
    )
    parser.add_argument("--step", type=int, metavar="N", help="default: the newest checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--dtype", choices=DTYPES, help="convert the weights; default: as they are")
    arguments = parser.parse_args(argv)
    source = export(arguments.checkpoint, arguments.out, step=arguments.step, dtype=arguments.dtype)
    print(f"policy of {source} written to {arguments.out}")
    return 0


def export(folder: Path, out: Path, *, step: int | None = None, dtype: str | None = None) -> Path:
    """Copy the verified policy of a checkpoint to `out`; the checkpoint taken.

    Args:
        folder: of a run, of checkpoints or of one checkpoint.
        step: finished steps of the checkpoint to take; None: the newest.

    Raises:
        CheckpointError: no checkpoint there, a damaged file, or `out` exists already.
    """
    source = _chosen(folder, step)
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


def _chosen(folder: Path, step: int | None) -> Path:
    """The checkpoint that is meant.

    Raises:
        CheckpointError: there is none.
    """
    if (folder / POLICY).is_dir() and (folder / MANIFEST).is_file():
        found = [folder]
    else:
        root = folder / CHECKPOINTS
        found = checkpoints(root if root.is_dir() else folder)
    chosen = [path for path in found if step is None or path.name == folder_name(step)]
    if not chosen:
        there = ", ".join(path.name for path in found) or "none"
        wanted = "…/step-<number>" if step is None else folder_name(step)
        raise CheckpointError(f"{folder}: no checkpoint; found {there}, wanted {wanted}")
    return chosen[-1]
