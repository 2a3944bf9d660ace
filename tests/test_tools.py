"""Tools: what they return, what they refuse, and that nothing is clamped silently."""

from __future__ import annotations

import asyncio
import gzip
import io
import pickle
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PilImage
from PIL import ImageDraw
from pydantic import BaseModel

from tapo_train.errors import (
    ConfigError,
    DataError,
    ReplayMissError,
    ToolDownError,
    ToolError,
    ToolRefusedError,
)
from tapo_train.tools import image_search
from tapo_train.tools.base import ToolContext
from tapo_train.tools.crop import ZoomTool, compose
from tapo_train.tools.image_search import ImageIndex, ImageSearchTool
from tapo_train.tools.images import ImageDecoder, encode_png, image_from_bytes
from tapo_train.tools.page_text import numbered
from tapo_train.tools.picture_files import described
from tapo_train.tools.text_search import CorpusIndex, Passage, TextSearchTool
from tapo_train.tools.toolbox import Toolbox
from tapo_train.types import Image, ImageRef, Observation, Outcome, Task


def picture(width: int = 200, height: int = 100) -> Image:
    """A picture whose pixels tell where they came from: red is x, green is y."""
    pixels = PilImage.new("RGB", (width, height))
    pixels.putdata([(x, y, 0) for y in range(height) for x in range(width)])
    return image_from_bytes(encode_png(pixels), width=width, height=height)


def context(*images: Image) -> ToolContext:
    task = Task(id="t", question="?", images=images, answers=("a",))
    return ToolContext(images=images, task=task)


def run(
    box: Toolbox, name: str, arguments: Mapping[str, Any] | None, *images: Image
) -> Observation:
    return asyncio.run(box.execute(box.read(name, arguments), context(*images)))


def zoom_box(min_side_px: int = 16) -> Toolbox:
    return Toolbox([ZoomTool(ImageDecoder(), min_side_px=min_side_px)], deadline_s=5)


def test_a_transparent_picture_is_found_in_an_index_that_holds_it(tmp_path: Path) -> None:
    """Transparency becomes white for the query, so it must in the index and in its thumbnail."""
    logo = PilImage.new("RGBA", (128, 128), (0, 0, 0, 0))
    ImageDraw.Draw(logo).ellipse((20, 20, 70, 100), fill=(10, 10, 10, 255))
    ImageDraw.Draw(logo).rectangle((80, 30, 110, 60), fill=(30, 30, 30, 255))
    logo.save(tmp_path / "logo.png")
    (tmp_path / "index.jsonl").write_text('{"title": "ACME", "image": "logo.png"}\n')
    index = ImageIndex.load(tmp_path / "index.jsonl", thumbnail_side_px=32)
    box = Toolbox([ImageSearchTool(index, ImageDecoder())], deadline_s=5)
    image = image_from_bytes((tmp_path / "logo.png").read_bytes(), width=128, height=128)
    seen = run(box, "image_search_tool", {}, image)
    assert "Title 1: ACME" in seen.text
    thumbnail = ImageDecoder().decode(seen.images[0])
    assert thumbnail.size == (32, 32) and thumbnail.getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("lengths", "max_chars", "shown"),
    [
        ([5, 5], 100, [5, 5]),
        ([5, 5], 17, [5, 5]),
        ([5, 5], 16, [4, 4]),
        ([1000, 5, 20], 100, [64, 5, 20]),
        ([1000, 1000, 5], 100, [42, 42, 5]),
        ([1000, 1000], 0, [0, 0]),
        ([], 100, []),
    ],
)
def test_a_long_passage_leaves_room_for_the_others(
    lengths: list[int], max_chars: int, shown: list[int]
) -> None:
    """By hand: "1. " and a line end are 4 characters a passage, but for the last line's."""
    passages = ["x" * length for length in lengths]
    text = numbered(passages, max_chars=max_chars)
    assert [line.count("x") for line in text.splitlines()] == shown
    cut = [length > left for length, left in zip(lengths, shown, strict=True)]
    assert [line.endswith(" [cut]") for line in text.splitlines()] == cut


def test_a_zoom_returns_the_pixels_of_its_region() -> None:
    arguments = {"bbox_2d": [100, 200, 300, 700], "img_idx": 0}
    seen = run(zoom_box(), "image_zoom_in_tool", arguments, picture())
    assert seen.outcome is Outcome.OK and seen.text == "Here is the zoomed image:"
    crop = seen.images[0]
    assert (crop.width, crop.height) == (40, 50)
    with PilImage.open(io.BytesIO(crop.data)) as pixels:
        assert pixels.getpixel((0, 0)) == (20, 20, 0)
        assert pixels.getpixel((39, 49)) == (59, 69, 0)


def test_a_zoom_into_a_zoom_is_resolved_to_the_root() -> None:
    root = ImageRef(root="sha256:r")
    half = compose(root, (500, 0, 1000, 500))
    assert half.box == (0.5, 0.0, 1.0, 0.5)
    assert compose(half, (500, 500, 1000, 1000)) == ImageRef(
        root="sha256:r", box=(0.75, 0.25, 1.0, 0.5)
    )


def test_a_zoom_keeps_the_requested_box_and_not_the_rounded_one() -> None:
    seen = run(zoom_box(), "image_zoom_in_tool", {"bbox_2d": [1, 1, 333, 667]}, picture())
    assert seen.images[0].ref.box == (0.001, 0.001, 0.333, 0.667)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({}, "bbox_2d is missing"),
        ({"bbox_2d": [1, 2, 3]}, "4 items"),
        ({"bbox_2d": [0, 0, 1001, 10]}, "0 to 1000"),
        ({"bbox_2d": [-1, 0, 100, 100]}, "0 to 1000"),
        ({"bbox_2d": [500, 0, 500, 100]}, "x1 < x2"),
        ({"bbox_2d": [0, 200, 500, 100]}, "y1 < y2"),
        ({"bbox_2d": [0, 0, float("nan"), 100]}, "finite"),
        ({"bbox_2d": [0, 0, 500, 500], "img_idx": 1}, "img_idx must be 0 to 0, found 1"),
        ({"bbox_2d": [0, 0, 500, 500], "img_idx": -1}, "img_idx must be 0 to 0, found -1"),
        ({"bbox_2d": [0, 0, 500, 500], "img_idx": 0.5}, "img_idx"),
        ({"bbox_2d": [0, 0, 50, 500]}, "10 x 50 pixels, at least 16 x 16"),
        ({"bbox_2d": "everything"}, "bbox_2d"),
    ],
)
def test_a_wrong_zoom_is_a_model_error_that_says_why(
    arguments: dict[str, Any], complaint: str
) -> None:
    seen = run(zoom_box(), "image_zoom_in_tool", arguments, picture())
    assert seen.outcome is Outcome.MODEL_ERROR and seen.images == ()
    assert seen.text.startswith("Error: ") and complaint in seen.text


def test_aliases_and_whole_floats_are_understood() -> None:
    arguments = {"bbox": [0, 0, 1000, 1000], "image_index": 0.0, "label": "ignored"}
    seen = run(zoom_box(), "image_zoom_in_tool", arguments, picture())
    assert seen.outcome is Outcome.OK and seen.images[0].width == 200


def test_a_strip_no_vision_processor_takes_is_refused() -> None:
    seen = run(zoom_box(1), "image_zoom_in_tool", {"bbox_2d": [0, 0, 1000, 10]}, picture(400, 100))
    assert seen.outcome is Outcome.MODEL_ERROR and "too thin" in seen.text


def test_text_search_ranks_the_fact_first_and_keeps_ties_in_order() -> None:
    passages = [
        Passage(id="0", title="", text="the lore of rivers and hills"),
        Passage(id="1", title="Tavore", text="the seat of Tavore is Miko."),
        Passage(id="2", title="Tavore", text="the beast of Tavore is bear."),
        Passage(id="3", title="Tavore", text="the metal of Tavore is iron."),
    ]
    index = CorpusIndex(passages)
    assert [p.id for p in index.search("Tavore beast", top_k=2)] == ["2", "1"]
    assert [p.id for p in index.search("TAVORE!", top_k=9)] == ["1", "2", "3"]
    assert index.search("unheard", top_k=3) == []
    box = Toolbox([TextSearchTool(index, top_k=1)], deadline_s=5)
    seen = run(box, "text_search_tool", {"query": "beast"})
    assert seen.text == "1. Tavore: the beast of Tavore is bear."
    assert run(box, "text_search_tool", {"query": "zzz"}).text == "No results were found."
    assert run(box, "text_search_tool", {"query": "  "}).outcome is Outcome.MODEL_ERROR


def test_long_results_are_cut_and_the_cut_is_said() -> None:
    index = CorpusIndex([Passage(id="0", title="", text="word " * 100)])
    box = Toolbox([TextSearchTool(index, max_chars=20)], deadline_s=5)
    assert run(box, "text_search_tool", {"query": "word"}).text == "1. word word word wo [cut]"


def test_image_search_finds_what_the_index_holds_and_says_when_it_does_not(
    small_world: Path,
) -> None:
    decoder = ImageDecoder()
    index = ImageIndex.load(small_world / "image_index.jsonl")
    box = Toolbox([ImageSearchTool(index, decoder)], deadline_s=5)
    emblem = sorted((small_world / "images" / "emblems").glob("*.png"))[3]
    image = image_from_bytes(emblem.read_bytes(), width=96, height=96)
    seen = run(box, "image_search_tool", {}, image)
    assert seen.text.splitlines()[1] == f"Title 1: Emblem of {emblem.stem}"
    assert [thumbnail.width for thumbnail in seen.images] == [64]
    scene = (small_world / "images" / "scenes" / "test-0.png").read_bytes()
    whole = image_from_bytes(scene, width=256, height=256)
    assert run(box, "image_search_tool", {}, whole).text == "No matching images were found."
    assert run(box, "image_search_tool", {"img_idx": 1}, whole).outcome is Outcome.MODEL_ERROR
    assert "no pictures" in run(box, "image_search_tool", {}).text


def test_a_picture_is_looked_up_once_until_so_many_others_were(
    small_world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_search, "REMEMBERED", 2)
    decoder, asked = ImageDecoder(), []
    decode = decoder.decode

    def counted(image: Image) -> PilImage.Image:
        asked.append(image.width)
        return decode(image)

    monkeypatch.setattr(decoder, "decode", counted)
    index = ImageIndex.load(small_world / "image_index.jsonl")
    box = Toolbox([ImageSearchTool(index, decoder)], deadline_s=5)
    pictures = {width: picture(width) for width in (60, 70, 80)}
    said = {width: run(box, "image_search_tool", {}, pictures[width]) for width in (60, 70)}
    again = run(box, "image_search_tool", {}, pictures[60])
    assert again.text == said[60].text
    assert asked == [60, 70]
    for width in (80, 70, 60):
        run(box, "image_search_tool", {}, pictures[width])
    assert asked == [60, 70, 80, 60], "the first one made room for the third"


def test_an_index_entry_outside_its_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    (tmp_path / "secret.png").write_bytes(picture().data)
    index = tmp_path / "w" / "image_index.jsonl"
    index.write_text('{"title": "x", "image": "../secret.png"}\n')
    with pytest.raises(DataError, match=r"image_index.jsonl:1: .*leads out"):
        ImageIndex.load(index)


@pytest.mark.parametrize("load", [CorpusIndex.load, ImageIndex.load])
@pytest.mark.parametrize(
    ("data", "said"),
    [
        ('\n{"title": "Café"}'.encode("latin-1"), ":2: found the byte 0xe9 at 14, which is not U"),
        (
            gzip.compress(b'{"text": "x y"}', mtime=0),
            ":1: found a compressed file; wanted jsonl, unpacked",
        ),
    ],
)
def test_an_index_that_is_no_utf_8_is_named_with_its_line(
    tmp_path: Path, load: Callable[[Path], object], data: bytes, said: str
) -> None:
    (tmp_path / "index.jsonl").write_bytes(data)
    with pytest.raises(DataError, match=r"index\.jsonl" + said):
        load(tmp_path / "index.jsonl")


def test_a_corpus_may_begin_with_a_byte_order_mark_and_have_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "harbour tower"}\n\n{"text": "old mill"}\n')
    assert [p.id for p in CorpusIndex.load(path).search("mill", top_k=1)] == [f"{path}:3"]


def test_a_malformed_corpus_line_is_named(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"id": "0", "title": "a", "text": "good words"}\n{"id": "1"}\n')
    with pytest.raises(DataError, match=r"corpus\.jsonl:2"):
        CorpusIndex.load(corpus)
    with pytest.raises(DataError, match="no passages"):
        CorpusIndex([])


class Nothing(BaseModel):
    """No arguments."""


class MisbehavingTool:
    """Ends in the way it was told to."""

    name = "bad"
    version = "1"
    description = "Misbehaves."
    arguments_model: type[BaseModel] = Nothing

    def __init__(self, error: Exception | None) -> None:
        self._error = error

    async def run(self, arguments: Nothing, context: ToolContext) -> Observation:
        if self._error is None:
            await asyncio.sleep(60)
        assert self._error is not None
        raise self._error


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, Outcome.TIMEOUT),
        (ToolError("down"), Outcome.TOOL_ERROR),
        (ToolRefusedError("no"), Outcome.REFUSED),
        (ToolDownError("HTTP 503"), Outcome.INFRA_ERROR),
        (OSError("disk"), Outcome.INFRA_ERROR),
        (ZeroDivisionError("bug"), Outcome.INFRA_ERROR),
    ],
)
def test_every_way_a_tool_can_fail_has_its_outcome(
    error: Exception | None, outcome: Outcome
) -> None:
    started = time.perf_counter()
    seen = run(Toolbox([MisbehavingTool(error)], deadline_s=0.2), "bad", {})
    assert seen.outcome is outcome and seen.text.startswith("Error: ")
    assert time.perf_counter() - started < 5
    assert seen.latency_s > 0


def test_leaving_the_recording_of_a_replay_ends_the_run() -> None:
    with pytest.raises(ReplayMissError, match="not recorded"):
        run(Toolbox([MisbehavingTool(ReplayMissError("not recorded"))], deadline_s=1), "bad", {})


def test_a_tool_that_is_down_says_across_processes_whether_to_try_again() -> None:
    error = pickle.loads(pickle.dumps(ToolDownError("HTTP 500", retryable=False)))
    assert str(error) == "HTTP 500" and error.retryable is False
    assert ToolDownError("HTTP 503").retryable is True


def test_an_unknown_tool_is_named_with_the_known_ones() -> None:
    seen = run(zoom_box(), "image_zoom", {})
    assert seen.outcome is Outcome.MODEL_ERROR
    assert "'image_zoom'" in seen.text and "image_zoom_in_tool" in seen.text


def test_two_tools_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="names must differ"):
        Toolbox([MisbehavingTool(None), MisbehavingTool(None)], deadline_s=1)


def test_a_damaged_picture_is_a_tool_error_and_not_a_crash() -> None:
    broken = image_from_bytes(picture().data[:200], width=200, height=100)
    seen = run(zoom_box(), "image_zoom_in_tool", {"bbox_2d": [0, 0, 500, 500]}, broken)
    assert seen.outcome is Outcome.TOOL_ERROR and "cannot be decoded" in seen.text


def test_the_schema_is_an_openai_function_without_generated_titles() -> None:
    (schema,) = Toolbox([ZoomTool(ImageDecoder())], deadline_s=1).schemas()
    assert schema["type"] == "function"
    function = schema["function"]
    assert function["name"] == "image_zoom_in_tool"
    assert function["parameters"]["required"] == ["bbox_2d"]
    box = function["parameters"]["properties"]["bbox_2d"]
    assert box["type"] == "array" and box["items"] == {"type": "number"} and "title" not in box


def test_transparent_pixels_are_white_for_a_tool() -> None:
    clear = PilImage.new("RGBA", (40, 40), (0, 0, 0, 0))
    image = image_from_bytes(encode_png(clear), width=40, height=40)
    assert ImageDecoder().decode(image).getpixel((0, 0)) == (255, 255, 255)


class InstantTool(MisbehavingTool):
    """Answers at once, from a thread."""

    async def run(self, arguments: Nothing, context: ToolContext) -> Observation:
        return await asyncio.to_thread(Observation, text="done")


def test_a_tool_that_finished_while_the_loop_was_held_is_not_late() -> None:
    async def held() -> Observation:
        box = Toolbox([InstantTool(None)], deadline_s=0.2)
        call = asyncio.ensure_future(box.execute(box.read("bad", {}), context()))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        time.sleep(0.5)  # an engine step that takes longer than the deadline
        return await call

    assert asyncio.run(held()).text == "done"


@pytest.mark.parametrize(
    "arguments",
    [
        {"bbox_2d": [0, 0, 500, 500], "img_idx": "0"},
        {"bbox_2d": [0, 0, 500, 500], "img_idx": False},
        {"bbox_2d": ["0", "0", "500", "500"]},
        {"bbox_2d": [False, 0, True, 500]},
    ],
)
def test_text_and_truth_values_are_not_numbers(arguments: dict[str, Any]) -> None:
    seen = run(zoom_box(), "image_zoom_in_tool", arguments, picture())
    assert seen.outcome is Outcome.MODEL_ERROR and "must be a number" in seen.text


def test_a_tools_version_tells_its_answers_apart() -> None:
    one = [Passage(id="0", title="ab", text="cats"), Passage(id="1", title="c", text="dogs")]
    other = [Passage(id="0", title="a", text="bcats"), Passage(id="1", title="c", text="dogs")]
    versions = {
        TextSearchTool(CorpusIndex(passages), top_k=top_k, max_chars=chars).version
        for passages in (one, other, one[:1])
        for top_k in (1, 2)
        for chars in (10, 20)
    }
    assert len(versions) == 12
    assert TextSearchTool(CorpusIndex(one)).version == TextSearchTool(CorpusIndex(one)).version
    entry = described("x", ImageDecoder().decode(picture()), thumbnail_side_px=20)
    indexes = [
        [],
        [entry],
        [replace(entry, header=b'{"title": "y", "width": 20, "height": 10}')],
        [replace(entry, digest="other")],
        [replace(entry, thumbnail=picture(20, 10).data)],
    ]
    tools = [ImageSearchTool(ImageIndex.of(entries), ImageDecoder()) for entries in indexes]
    assert len({tool.version for tool in tools}) == 5
    assert ZoomTool(ImageDecoder()).version != ZoomTool(ImageDecoder(), min_side_px=9).version
