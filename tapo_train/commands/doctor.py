"""`doctor`: is this machine ready to train, and if not, what mends it.

Every check runs in a process of its own (`doctor_checks.py`), so that a library that crashes
or hangs is a line of the report and not the end of it.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

DESCRIPTION = """\
Check the environment: packages, imports, a policy folder's chat template and image tokens, the
sampling engine, the learner, their agreement, and where metrics will go. Each line says ok or
FAIL; a failure says how to mend it. Exit code 1 if anything failed.
"""

_SETUP = "run scripts/setup_env.sh (make venv); it installs and mends the environment"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line of the report."""

    name: str
    """Name of the function in `doctor_checks`."""
    mend: str
    """What to do when it fails."""
    timeout_s: float = 60.0


CHECKS = (
    Check(name="versions", mend=_SETUP),
    Check(
        name="torchvision",
        mend=f"{_SETUP}; torchvision has to fit torch, or scripts/torchvision_ops_hook.py "
        "stands in where a CUDA build meets a CPU torch",
    ),
    Check(
        name="imports",
        mend=f"{_SETUP}; a broken torchaudio or torchcodec stops transformers and vllm: "
        "pip uninstall torchaudio torchcodec",
        timeout_s=180.0,
    ),
    Check(name="accelerator", mend="install the driver, or the [cpu] extra for a machine without"),
    Check(
        name="chat_template",
        mend="take a model whose chat template appends: the message shows where the rendering of "
        "a longer conversation leaves that of the shorter one",
    ),
    Check(
        name="image_tokens",
        mend="the processor of the model folder does not belong to its tokenizer: download again",
    ),
    Check(
        name="engine",
        mend="read the engine's last message above; on CPU lower rollout.engine.kv_cache_gib, on "
        "GPU lower rollout.engine.gpu_memory_utilization, and close other users of the device",
        timeout_s=300.0,
    ),
    Check(
        name="learner",
        mend="remove a stale build lock (rm -rf ~/.cache/torch_extensions) and try "
        "learner.zero_stage=0",
        timeout_s=180.0,
    ),
    Check(
        name="agreement",
        mend="engine and learner read different weights or positions: use the versions of "
        "setup.cfg, which were tested together",
        timeout_s=420.0,
    ),
    Check(
        name="wandb",
        mend="wandb login, or run.wandb=offline, or run.wandb=disabled",
    ),
)


def main(argv: Sequence[str]) -> int:
    """Run the checks; 0 if all are well, else 1."""
    arguments = _parser().parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="tapo_doctor_") as scratch:
        model = arguments.model or str(Path(scratch) / "tiny_policy")
        if arguments.model is None:
            _run("tiny_policy", model, timeout_s=120.0)
        chosen = [check for check in CHECKS if check.name in (arguments.only or names())]
        failed = [check.name for check in chosen if not _report(check, model)]
    if failed:
        print(f"{len(failed)} of {len(chosen)} checks failed: {', '.join(failed)}")
        return 1
    print(f"all {len(chosen)} checks passed")
    return 0


def names() -> list[str]:
    """Names of all checks, in order."""
    return [check.name for check in CHECKS]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tapo_train doctor",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", metavar="DIR", help="policy folder to check with; default: a tiny random one"
    )
    parser.add_argument("--only", nargs="+", choices=names(), help="run only these checks")
    return parser


def _report(check: Check, model: str) -> bool:
    start = time.monotonic()
    problem, detail = _run(check.name, model, timeout_s=check.timeout_s)
    seconds = time.monotonic() - start
    print(
        f"{'FAIL' if problem else 'ok':<5}{check.name:<14} {problem or detail}  [{seconds:.0f} s]"
    )
    if problem:
        print(f"{'':<19} mend: {check.mend}")
    sys.stdout.flush()
    return not problem


def _run(name: str, model: str, *, timeout_s: float) -> tuple[str, str]:
    """(problem or "", detail) of one check in its own process."""
    command = [sys.executable, "-m", "tapo_train.commands.doctor_checks", name, model]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {timeout_s:.0f} s", ""
    if done.returncode == 0:
        return "", _last_line(done.stdout)
    if done.returncode < 0:
        return f"killed by signal {-done.returncode}: {_last_line(done.stderr)}", ""
    return _last_line(done.stderr) or f"exit code {done.returncode}", ""


def _last_line(text: str) -> str:
    lines = [re.sub(r"^\[rank\d+\]:\s*", "", line).strip() for line in text.splitlines()]
    lines = [line for line in lines if line]
    return lines[-1] if lines else ""
