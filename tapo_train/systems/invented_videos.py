"""Small invented videos with questions about when something happens, so that video runs offline.

python -m tapo_train.systems.invented_videos --seed 1 --out runs/videos

OUT/videos/V.mp4    a square that has another colour for a while
OUT/train.jsonl     native tasks; the field `clip` names the file, the answer is an interval
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tapo_train.data.tasks import write_tasks
from tapo_train.demo.world.lexicon import COLOURS
from tapo_train.types import Task

__all__ = ["write_videos"]

RATE = 4
"""[1/s] frames."""
SIDE = 64
"""[px]"""


def write_videos(out: Path, seed: int, *, count: int = 8) -> None:
    """So many videos with a question each."""
    (out / "videos").mkdir(parents=True, exist_ok=True)
    tasks = []
    for index in range(count):
        rng = random.Random(f"videos/{seed}/{index}")
        before, during = rng.sample(sorted(COLOURS), 2)
        seconds = rng.randint(6, 12)
        start = rng.randint(1, seconds - 3)
        end = rng.randint(start + 1, seconds - 1)
        changed = range(start * RATE, end * RATE)
        colours = [during if i in changed else before for i in range(seconds * RATE)]
        name = f"videos/{index}.mp4"
        write_video(out / name, [COLOURS[colour] for colour in colours])
        tasks.append(
            Task(
                id=f"video{index}",
                question=f"When is the picture {during}? Answer as start-end in seconds.",
                images=(),
                answers=(f"{start}-{end}",),
                source="invented_videos",
                metadata={"clip": name},
            )
        )
    write_tasks(out / "train.jsonl", tasks)


def write_video(path: Path, colours: Sequence[tuple[int, int, int]]) -> None:
    """A video whose frames have these colours, RATE of them a second."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        for colour in colours:
            pixels = np.full((SIDE, SIDE, 3), colour, dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def main(arguments: Sequence[str] | None = None) -> None:
    """Write videos and questions to a folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=8)
    chosen = parser.parse_args(arguments)
    write_videos(chosen.out, chosen.seed, count=chosen.count)


if __name__ == "__main__":
    main()
