"""The picture search beside a perceptual hash: what is found of a picture that was changed, what is
found of a picture that is not there, and what it costs among many others.

    python scripts/bench_picture_search.py --photographs DIR [DIR…] --folder /tmp/x

DIR holds photographs of your own (or a parquet with `images`), half of which are left out of the
index. The others in it are invented from photographs: two regions, mirrored or turned, in other
colours, blended by a soft mask. Emblems of the demo world are added as drawings. The hash is
ImageHash's phash within 6 of 64 bits, of the picture and of what is within its margin.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
from bench_search import memory_mb, peak_mb
from PIL import Image

from tapo_train.demo.world.pictures import draw_distinct_emblems
from tapo_train.tools.picture_files import Described, described
from tapo_train.tools.picture_index import (
    MANIFEST,
    MIN_AGREEMENT,
    ImageIndex,
    write_pictures,
)
from tapo_train.tools.picture_vectors import margin_box

ASKED = 120
"""Random crops of all pictures together, or one of each."""
HASH_BITS = 6


def photographs(folders: list[Path]) -> list[Image.Image]:
    found = []
    for path in sorted(path for folder in folders for path in [folder, *folder.rglob("*")]):
        if path.suffix in (".jpg", ".jpeg", ".png", ".webp"):
            found.append(Image.open(path).convert("RGB"))
        elif path.suffix == ".parquet":
            from pyarrow import parquet

            for row in parquet.read_table(path, columns=["images"]).to_pylist():
                found += [Image.open(io.BytesIO(i["bytes"])).convert("RGB") for i in row["images"]]
    return found


def encoded(picture: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def halved(picture: Image.Image) -> Image.Image:
    return picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.LANCZOS)


def with_margin(picture: Image.Image) -> Image.Image:
    wide = round(0.1 * max(picture.size))
    framed = Image.new("RGB", (picture.width + 2 * wide, picture.height + 2 * wide), "white")
    framed.paste(picture, (wide, wide))
    return framed


def cropped(share: float, rng: random.Random) -> Callable[[Image.Image], Image.Image]:
    def crop(picture: Image.Image) -> Image.Image:
        width, height = round(picture.width * share), round(picture.height * share)
        x, y = rng.randint(0, picture.width - width), rng.randint(0, picture.height - height)
        return picture.crop((x, y, x + width, y + height))

    return crop


def changes() -> dict[str, Callable[[Image.Image], Image.Image]]:
    rng = random.Random(0)
    crop90, crop70, crop50 = (cropped(share, rng) for share in (0.9, 0.7, 0.5))
    return {
        "JPEG of quality 40": lambda picture: encoded(picture, 40),
        "half as wide": halved,
        "white margin of 10 %": with_margin,
        "random crop to 90 %": crop90,
        "random crop to 70 %": crop70,
        "70 %, halved, JPEG 40": lambda picture: encoded(halved(crop70(picture)), 40),
        "random crop to 50 %": crop50,
    }


def invented(sources: list[Image.Image], count: int) -> Iterator[Image.Image]:
    rng = np.random.default_rng(0)
    small = [np.asarray(source.resize((160, 160)), np.float32) for source in sources]
    for _ in range(count):
        parts = []
        for number in rng.integers(len(small), size=2):
            side = int(rng.integers(40, 120))
            x, y = rng.integers(0, 160 - side, size=2)
            part = Image.fromarray(small[number][y : y + side, x : x + side].astype(np.uint8))
            turned = np.asarray(part.resize((64, 64)), np.float32)[:, ::-1]
            parts.append(np.rot90(turned, int(rng.integers(4)))[:, :, rng.permutation(3)])
        mask = Image.fromarray(rng.integers(0, 256, (3, 3), dtype=np.uint8)).resize((64, 64))
        share = np.asarray(mask, np.float32)[:, :, None] / 255
        mixed = share * parts[0] + (1 - share) * parts[1]
        yield Image.fromarray(np.clip(mixed, 0, 255).astype(np.uint8))


def hashes(picture: Image.Image) -> list[int]:
    return [int(str(imagehash.phash(p)), 16) for p in (picture, picture.crop(margin_box(picture)))]


def drawn_from(pictures: list[Image.Image], change: str) -> list[Image.Image]:
    """Several times where the change is drawn by chance."""
    return pictures * (max(1, ASKED // len(pictures)) if "70" in change or "crop" in change else 1)


def found_of(index: ImageIndex, known: list[Image.Image], first: int) -> dict[str, Any]:
    """Of pictures that stand in the index from `first` on."""
    codes, rows = [hashes(picture)[0] for picture in known], {}
    for name, change in changes().items():
        is_first = is_kept = wrong = by_hash = count = 0
        took = []
        for number, picture in enumerate(drawn_from(known, name)):
            number %= len(known)
            asked = change(picture)
            started = time.perf_counter()
            ranked = index.ranked(asked)
            took.append(time.perf_counter() - started)
            kept = [place for place, agrees in ranked if agrees >= MIN_AGREEMENT]
            is_first += bool(ranked) and ranked[0][0] == first + number
            is_kept += kept[:1] == [first + number]
            wrong += any(place != first + number for place in kept)
            near = [min((a ^ code).bit_count() for a in hashes(asked)) for code in codes]
            by_hash += int(np.argmin(near)) == number and min(near) <= HASH_BITS
            count += 1
        rows[name] = {
            "rank 1 %": 100 * is_first / count,
            "shown %": 100 * is_kept / count,
            "another shown %": 100 * wrong / count,
            "hash %": 100 * by_hash / count,
            "n": count,
            "p50_ms": 1e3 * float(np.quantile(took, 0.5)),
            "p95_ms": 1e3 * float(np.quantile(took, 0.95)),
        }
    return rows


def wrongly_found(index: ImageIndex, unknown: list[Image.Image]) -> dict[str, Any]:
    """Of pictures that are not in the index."""
    best = []
    for name, change in changes().items():
        for picture in drawn_from(unknown, name):
            ranked = index.ranked(change(picture))
            best.append(ranked[0][1] if ranked else -1.0)
    return {
        "asked": len(best),
        "shown": sum(agrees >= MIN_AGREEMENT for agrees in best),
        "highest agreement": max(best),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photographs", type=Path, nargs="+", required=True)
    parser.add_argument("--pictures", type=int, default=100_000)
    parser.add_argument("--emblems", type=int, default=480)
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()
    photos = photographs(arguments.photographs)
    known, unknown = photos[::2], photos[1::2]
    emblems = draw_distinct_emblems(0, arguments.emblems + 40)
    drawn, undrawn = emblems[:-40], emblems[-40:]
    index_folder = arguments.folder / f"pictures-{arguments.pictures}"
    others = arguments.pictures - len(known) - len(drawn)
    result: dict[str, Any] = {"pictures": arguments.pictures, "photographs": len(known)}

    def everything() -> Iterator[Described]:
        for group in (known, drawn, invented(photos, others)):
            for number, picture in enumerate(group):
                yield described(f"picture {number}", picture, thumbnail_side_px=64)

    if not (index_folder / MANIFEST).exists():
        index_folder.mkdir(parents=True, exist_ok=True)
        started = time.process_time()
        write_pictures(index_folder, everything(), what="the bench")
        result["build_cpu_s"] = time.process_time() - started
        result["build_peak_mb"] = peak_mb("self")
    result["disk_mb"] = {f.name: f.stat().st_size / 1e6 for f in sorted(index_folder.iterdir())}
    before, started = memory_mb(), time.perf_counter()
    index = ImageIndex.load(index_folder)
    result["open_s"] = time.perf_counter() - started
    result["found of photographs"] = found_of(index, known, 0)
    result["found of emblems"] = found_of(index, drawn[:ASKED], len(known))
    result["not there"] = {
        "photographs": wrongly_found(index, unknown),
        "emblems": wrongly_found(index, undrawn),
    }
    after = memory_mb()
    result["grown_mb"] = {name: after[name] - before[name] for name in after}
    print(json.dumps(result, indent=1), flush=True)


if __name__ == "__main__":
    main()
