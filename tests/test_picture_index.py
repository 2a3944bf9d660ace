"""Pictures are found by what they show, changed as the world changes them, and others are not."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PilImage

from tapo_train.commands import index as command
from tapo_train.errors import DataError
from tapo_train.tools.image_search import ImageIndex
from tapo_train.tools.picture_files import described
from tapo_train.tools.picture_index import MANIFEST, build_picture_index
from tapo_train.tools.picture_match import agreement, brightness_of
from tapo_train.tools.picture_vectors import DIMENSIONS, REGIONS, covered, squashed, vectors_of
from tapo_train.tools.vector_index import VectorIndex, write_vectors

Change = Callable[[PilImage.Image], PilImage.Image]


def photograph(seed: int, width: int = 240, height: int = 160) -> PilImage.Image:
    """Noise of all frequencies, stronger at low ones, as photographs have it."""
    rng = np.random.default_rng(seed)
    summed = np.zeros((height, width, 3), np.float32)
    for cells in (3, 6, 12, 24, 48):
        noise = PilImage.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        summed += np.asarray(noise.resize((width, height), PilImage.Resampling.BICUBIC)) / cells
    summed -= summed.min()
    return PilImage.fromarray((255 * summed / summed.max()).astype(np.uint8))


def jpeg(picture: PilImage.Image) -> PilImage.Image:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=40)
    return PilImage.open(buffer).convert("RGB")


def margin(picture: PilImage.Image) -> PilImage.Image:
    wide = PilImage.new("RGB", (picture.width + 80, picture.height + 30), (255, 255, 255))
    wide.paste(picture, (60, 10))
    return wide


CHANGES: dict[str, Change] = {
    "JPEG 40": jpeg,
    "halved": lambda picture: picture.resize((picture.width // 2, picture.height // 2)),
    "margin": margin,
    "90 %": lambda picture: picture.crop((5, 12, 5 + 216, 12 + 144)),
    "70 %": lambda picture: picture.crop((61, 3, 61 + 168, 3 + 112)),
    "70 x 90 %": lambda picture: picture.crop((31, 9, 31 + 168, 9 + 144)),
    "70 %, halved, JPEG": lambda p: jpeg(p.crop((20, 40, 188, 152)).resize((84, 56))),
}


@pytest.fixture(scope="module")
def index() -> ImageIndex:
    return ImageIndex.of(
        described(f"picture {seed}", photograph(seed), thumbnail_side_px=32) for seed in range(40)
    )


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_picture_is_found_alone_and_one_that_is_not_there_is_not(
    index: ImageIndex, change: Change
) -> None:
    for seed in (3, 17):
        found = index.search(change(photograph(seed)), top_k=3)
        assert [one.title for one in found] == [f"picture {seed}"]
    assert index.search(change(photograph(99)), top_k=3) == []


def test_mirrored_turned_and_flat_pictures_are_not_found(index: ImageIndex) -> None:
    picture = photograph(5)
    for other in (
        picture.transpose(PilImage.Transpose.FLIP_LEFT_RIGHT),
        picture.transpose(PilImage.Transpose.ROTATE_180),
        PilImage.new("RGB", (50, 50), (10, 200, 30)),
        PilImage.new("RGB", (1, 1)),
    ):
        assert index.search(other, top_k=3) == []


def test_equal_pictures_come_in_the_order_of_the_index() -> None:
    twins = [described(name, photograph(1), thumbnail_side_px=8) for name in ("first", "second")]
    found = ImageIndex.of(twins).search(photograph(1), top_k=3)
    assert [one.title for one in found] == ["first", "second"]
    assert [one.title for one in ImageIndex.of(twins).search(photograph(1), top_k=1)] == ["first"]


def test_a_logo_within_its_own_margin_is_found_within_another() -> None:
    logo = PilImage.new("RGB", (200, 200), "white")
    logo.paste(photograph(8, 120, 90), (70, 10))
    wider = PilImage.new("RGB", (300, 150), "white")
    wider.paste(photograph(8, 120, 90).resize((100, 75)), (20, 60))
    found = ImageIndex.of([described("logo", logo, thumbnail_side_px=8)]).search(wider, top_k=1)
    assert [one.title for one in found] == ["logo"]


def test_regions_are_the_whole_and_squares_of_a_grid() -> None:
    assert len(REGIONS) == 1 + 4 + 9 + 16 + 25
    assert REGIONS[0].tolist() == [0, 0, 1, 1]
    assert np.allclose(
        REGIONS[1:5], [[0, 0, 0.9, 0.9], [0.1, 0, 1, 0.9], [0, 0.1, 0.9, 1], [0.1, 0.1, 1, 1]]
    )
    sides = REGIONS[:, 2:] - REGIONS[:, :2]
    assert np.allclose(sides[-25:], 0.6) and np.allclose(sides[:, 0], sides[:, 1])


def test_cells_are_means_of_the_pixels_they_cover() -> None:
    """By hand: 0.1 to 0.35 of 64 pixels is 6.4 to 22.4; two cells of 8 pixels each."""
    start, end = np.array([0.1], np.float32), np.array([0.35], np.float32)
    first, second = covered(start, end, 2)[0]
    assert first[6] == pytest.approx(0.6 / 8, abs=1e-5) and first[7] == pytest.approx(1 / 8)
    assert first[14] == pytest.approx(0.4 / 8, abs=1e-5) and second[14] == pytest.approx(0.6 / 8)
    assert second[22] == pytest.approx(0.4 / 8, abs=1e-5) and first[:6].sum() == 0
    assert first.sum() == pytest.approx(1) and second.sum() == pytest.approx(1)


def test_vectors_are_the_low_frequencies_of_brightness_and_colour() -> None:
    """Against SciPy's transform of the same means."""
    from scipy.fft import dctn

    pixels = squashed(photograph(2))
    vectors = vectors_of(pixels)
    assert vectors.shape == (55, DIMENSIONS) == (55, 60)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    cells = pixels.reshape(8, 8, 8, 8, 3).mean(axis=(1, 3))
    brightness = cells @ [0.299, 0.587, 0.114]
    waves = dctn(brightness, norm="ortho")
    down, across = np.indices((8, 8))
    wanted = waves[(down + across > 0) & (down + across <= 8)]
    ours = vectors[0, : len(wanted)]
    assert np.allclose(ours / np.linalg.norm(ours), wanted / np.linalg.norm(wanted), atol=1e-3)


def test_a_region_is_aligned_from_a_neighbour() -> None:
    picture = photograph(4, 256, 256)
    asked = squashed(picture.crop((40, 60, 200, 220)))
    stored = brightness_of(squashed(picture))[None]
    box = np.array([[0.2, 0.2, 0.8, 0.8]], np.float32)
    assert agreement(asked, stored, box)[0] > 0.95
    assert agreement(asked, brightness_of(squashed(photograph(6)))[None], box)[0] < 0.6


def test_a_folder_finds_what_memory_finds(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for seed in range(4):
        photograph(seed).save(pictures / f"view {seed}.png")
    photograph(7).save(pictures / "big.JPG", quality=95)
    (pictures / "notes.txt").write_text("no picture")
    command.main(["pictures", str(pictures), "--out", str(tmp_path / "index")])
    mapped = ImageIndex.load(tmp_path / "index")
    held = ImageIndex.load(pictures, thumbnail_side_px=256)
    assert len(mapped) == 5 and mapped.digest == held.digest
    for seed, title in ((2, "view 2"), (7, "big")):
        asked = photograph(seed).crop((30, 20, 220, 150))
        found = mapped.search(asked, top_k=2)
        assert [one.title for one in found] == [title]
        assert found == held.search(asked, top_k=2)
    assert found[0].thumbnail.data.startswith(b"\xff\xd8"), "photographs are kept as JPEG"
    with pytest.raises(DataError, match="found something there"):
        build_picture_index(tmp_path / "index", pictures)


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no pictures"):
        build_picture_index(tmp_path / "index", tmp_path / "empty")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_a_damaged_folder_is_named(tmp_path: Path) -> None:
    source = tmp_path / "index.jsonl"
    photograph(1).save(tmp_path / "one.png")
    source.write_text(json.dumps({"title": "one", "image": "one.png"}))
    folder = tmp_path / "index"
    build_picture_index(folder, source, thumbnail_side_px=16)
    (folder / "vectors.faiss").rename(folder / "away")
    write_vectors(folder / "vectors.faiss", np.eye(3, DIMENSIONS, dtype=np.float32))
    with pytest.raises(DataError, match="found 3 vectors, wanted 56"):
        ImageIndex.load(folder)
    (folder / "vectors.faiss").write_bytes(b"nothing")
    with pytest.raises(DataError, match="wanted a FAISS index"):
        ImageIndex.load(folder)
    (folder / "away").rename(folder / "vectors.faiss")
    whole = (folder / "brightness.u8").read_bytes()
    (folder / "brightness.u8").write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"brightness.u8: .*wanted \(1, 64, 64\)"):
        ImageIndex.load(folder)
    (folder / "brightness.u8").write_bytes(whole)
    (folder / "entries.bin").write_bytes(b"x" * (folder / "entries.bin").stat().st_size)
    with pytest.raises(DataError, match="entry 0 cannot be read"):
        ImageIndex.load(folder).search(photograph(1), top_k=1)
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"format": 0}))
    with pytest.raises(DataError, match="found format 0, wanted 1"):
        ImageIndex.load(folder)


def test_many_vectors_are_kept_in_cells_and_still_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tapo_train.tools import vector_index

    monkeypatch.setattr(vector_index, "FLAT_ROWS", 1000)
    monkeypatch.setattr(vector_index, "CELLS", 16)
    monkeypatch.setattr(vector_index, "PROBED", 4)
    vectors = np.random.default_rng(0).normal(size=(1001, 12)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    write_vectors(tmp_path / "cells", vectors)
    write_vectors(tmp_path / "flat", vectors[:1000])
    for name, count in (("cells", 1001), ("flat", 1000)):
        stored = VectorIndex.load(tmp_path / name)
        scores, rows = stored.search(vectors[:20], 3)
        assert (len(stored), stored.dimensions) == (count, 12)
        assert rows[:, 0].tolist() == list(range(20)) and np.allclose(scores[:, 0], 1, atol=0.02)
    assert vector_index.faiss.read_index(str(tmp_path / "cells")).nprobe == 4
    assert VectorIndex.of(vectors[:2]).search(vectors[1:2], 3)[1].tolist() == [[1, 0, -1]]
