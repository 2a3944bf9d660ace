"""Resident memory of a process through which very many pictures pass, and its curve.

    python scripts/image_memory.py [--pictures 200000] [--out docs/image_memory.png]

Steps of 32 trajectories that zoom eight times each into a picture of noise of their own, with the
real agent loop, toolbox, zoom tool and decoder; the engine writes the calls (`timed_engine.py`).
Every step's pictures are also put through the model's image processor, as its micro-batches
would. The groups of a step are dropped when it is over, as a trainer drops them. What may stay is
what the caches allow; the curve says whether anything else does.
"""

from __future__ import annotations

import argparse
import hashlib
import io
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import PIL.Image
from timed_engine import TimedEngine

from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.collect import collect
from tapo_train.rollout.engine import GenerationRequest, Sampling
from tapo_train.rollout.limits import Limits
from tapo_train.tools.crop import ZoomTool
from tapo_train.tools.toolbox import Toolbox
from tapo_train.types import Group, Image, ImageRef, Task

ROOT = Path(__file__).resolve().parent.parent
TASKS, ZOOMS, SIDE = 32, 8, 128


def noise(rng: np.random.Generator) -> Image:
    """A picture that nobody has seen before."""
    pixels = rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "JPEG")
    data = buffer.getvalue()
    digest = hashlib.sha256(data).hexdigest()
    ref = ImageRef(root=f"sha256:{digest}")
    return Image(sha256=digest, data=data, width=SIDE, height=SIDE, ref=ref)


def play(chat: ChatFormat, toolbox: Toolbox, rng: np.random.Generator, step: int) -> list[Group]:
    """One step's groups: each trajectory zooms into corners of its picture, then answers."""
    answer = chat.assistant("<answer>noise</answer>")
    calls = []
    for turn in range(ZOOMS):
        x, y = (turn % 4) * 200, (turn // 4) * 400
        box = f'{{"bbox_2d": [{x}, {y}, {x + 300}, {y + 300}], "img_idx": 0}}'
        call = f'{{"name": "image_zoom_in_tool", "arguments": {box}}}'
        calls.append(chat.assistant(f"<tool_call>{call}</tool_call>"))

    def reply(request: GenerationRequest) -> tuple[Any, float]:
        turn = int(request.id.rpartition(":")[2])
        return (calls[turn] if turn < ZOOMS else answer), 0.0

    tasks = [
        Task(id=f"{step}.{n}", question="What?", images=(noise(rng),), answers=("noise",))
        for n in range(TASKS)
    ]
    return collect(
        tasks,
        engine=TimedEngine(reply),
        chat=chat,
        toolbox=toolbox,
        system_prompt="Look.",
        rollouts_per_task=1,
        limits=Limits(max_turns=ZOOMS + 1, max_turn_tokens=200, max_tokens=8192),
        sampling=Sampling(),
    )


def resident_mb() -> float:
    """[MB] of this process, from /proc."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=200_000)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "image_memory.png")
    arguments = parser.parse_args()
    chat, rng = ChatFormat(ROOT / "assets" / "warm_start"), np.random.default_rng(0)
    toolbox = Toolbox([ZoomTool(chat.decoder)], deadline_s=60.0)
    seen, encoded, curve, step = 0, 0, [], 0
    while seen < arguments.pictures:
        groups = play(chat, toolbox, rng, step)
        for group in groups:
            images = group.trajectories[0].images
            chat.pixels(images)
            seen += len(images)
            encoded += sum(len(image.data) for image in images)
        toolbox.ledger.drain()  # as the audit of a step does
        curve.append((seen, resident_mb()))
        step += 1
        if step % 50 == 1:
            print(
                f"{seen} pictures, {encoded / 1e6:.0f} MB encoded, {curve[-1][1]:.0f} MB resident"
            )
    draw(curve, arguments.out)
    half = [mb for at, mb in curve if at > arguments.pictures / 2]
    print(
        f"second half: {min(half):.0f} to {max(half):.0f} MB resident; {encoded / 1e6:.0f} MB seen"
    )


def draw(curve: list[tuple[int, float]], out: Path) -> None:
    """Write the curve as PNG."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.2))
    axes.plot([at / 1000 for at, _ in curve], [mb for _, mb in curve], color="tab:blue")
    axes.set(xlabel="pictures seen [thousands]", ylabel="resident memory [MB]", ylim=(0, None))
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main()
