"""Measure C7 with pictures of a megapixel: how often each is processed in an update, what is held,
and how long the thread that feeds the device waits for them.

    python scripts/bench_pictures.py [--pictures 24] [--out FILE]

Photographs of 1280 x 960 pixels (noise of low frequency, JPEG) go through the image processor of
Qwen3-VL in micro-batches of four, once to score the step's start and once for the update. As peer
the cache holds 512 MiB and the feeding thread processes by itself; the device is a pause of as
long as a micro-batch's pictures take, so that a thread that is ahead can hide them whole.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from measures import RESULTS, Measure, append, load, versions
from transformers import Qwen2VLImageProcessor

from tapo_train.learner.scorer import made_ahead
from tapo_train.rollout.pixels import Pixels
from tapo_train.tools.images import ImageDecoder
from tapo_train.types import Image, ImageRef

WIDTH, HEIGHT = 1280, 960
TOGETHER = 4
"""Pictures of a micro-batch."""
BEFORE, AFTER = 512 * 2**20, 4 * 2**30
"""[B] of the cache."""
TARGET_WAIT = 0.25


def photograph(seed: int) -> Image:
    """A smooth picture of 1.2 megapixels as JPEG."""
    coarse = np.random.default_rng(seed).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(coarse).resize((WIDTH, HEIGHT)).save(buffer, "JPEG", quality=90)
    data = buffer.getvalue()
    digest = hashlib.sha256(data).hexdigest()
    ref = ImageRef(root=f"sha256:{digest}")
    return Image(sha256=digest, data=data, width=WIDTH, height=HEIGHT, ref=ref)


class Counted:
    """An image processor that counts the pictures it is given."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self.merge_size = processor.merge_size
        self.get_number_of_image_patches = processor.get_number_of_image_patches
        self.pictures = 0

    def __call__(self, *, images: Sequence[Any], **options: Any) -> Any:
        self.pictures += len(images)
        return self._processor(images=images, **options)


def processor() -> Counted:
    """Qwen3-VL's, with its published limits."""
    size = {"shortest_edge": 65_536, "longest_edge": 16_777_216}
    return Counted(
        Qwen2VLImageProcessor(patch_size=16, merge_size=2, temporal_patch_size=2, size=size)
    )


def alone(make: Callable[[Any], Any], items: Sequence[Any]) -> Any:
    """What `made_ahead` does, without a thread."""
    return ((item, make(item)) for item in items)


def step(cache: int, feed: Any, batches: Sequence[Sequence[Image]], device_s: float) -> Any:
    """(pictures processed, share of the time spent waiting) of scoring and update."""
    counted = processor()
    pixels = Pixels(counted, ImageDecoder(), cache_bytes=cache)
    started = time.perf_counter()
    for _ in ("scoring", "update"):
        for _ in feed(pixels.process, batches):
            time.sleep(device_s)
    taken = time.perf_counter() - started
    busy = 2 * len(batches) * device_s
    return counted.pictures, (taken - busy) / taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    pictures = [photograph(seed) for seed in range(arguments.pictures)]
    batches = [pictures[at : at + TOGETHER] for at in range(0, len(pictures), TOGETHER)]
    pixels = Pixels(processor(), ImageDecoder(), cache_bytes=AFTER)
    pixels.process(pictures[:1])
    started = time.perf_counter()
    made = pixels.process(batches[1])
    device_s = time.perf_counter() - started
    megabytes = made["pixel_values"].nbytes / len(batches[1]) / 1e6
    print(f"{megabytes:.1f} MB a picture, {device_s / len(batches[1]) * 1e3:.0f} ms to process one")
    before, waited_before = step(BEFORE, alone, batches, device_s)
    after, waited = step(AFTER, made_ahead, batches, device_s)
    count = len(pictures)
    append(
        [
            figure(
                "C7.megapixel.processed", after / count, "times per picture", before / count, 1.0
            ),
            figure(
                "C7.megapixel.waiting", waited, "share of the update", waited_before, TARGET_WAIT
            ),
        ],
        arguments.out,
    )


def figure(name: str, value: float, unit: str, peer: float, target: float) -> Measure:
    """One line."""
    return Measure(
        id=name,
        value=round(value, 3),
        unit=unit,
        peer="512 MiB of cache, no thread",
        peer_value=round(peer, 3),
        ratio=round(peer / value, 2) if value else None,
        target=f"value <= {target}",
        met=value <= target,
        versions=versions("transformers", "torch", "pillow"),
        load=load(),
    )


if __name__ == "__main__":
    main()
