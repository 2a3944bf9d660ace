"""Whatever a policy writes or a stranger sends: a result or a typed error, nothing else.

TAPO_FUZZ=20000 sets the number of cases of each test; a commit's test run takes a few.
"""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import os
import struct
import zlib
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow
from rollout_world import draw_image

from tapo_train.credit.regions import iou, zoom_region
from tapo_train.credit.steps import CreditRow, CreditStep
from tapo_train.data.images import ImageLimits, read_image
from tapo_train.errors import ConfigError, DataError, ToolDownError, ToolError, ToolRefusedError
from tapo_train.rollout.parse import ParsedTurn, parse_turn
from tapo_train.tools.addresses import AllowedHosts
from tapo_train.tools.base import ToolContext
from tapo_train.tools.crop import ZoomTool
from tapo_train.tools.http_answer import Body
from tapo_train.tools.images import ImageDecoder
from tapo_train.tools.net import FetchLimits, HttpClient
from tapo_train.tools.page_text import CUT, html_to_text, readable
from tapo_train.tools.sandbox_worker import DONE, PICTURE, REFUSED, REPLY, answer
from tapo_train.tools.search_answer import found_pictures, found_texts, retrieved_texts
from tapo_train.tools.toolbox import Toolbox
from tapo_train.types import Image, Outcome, Task

CASES = int(os.environ.get("TAPO_FUZZ", "40"))
many = settings(
    max_examples=CASES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=CASES <= 1000,
    database=None,
)
SIZES = ((64, 48), (300, 20))
PICTURES = tuple(draw_image(width, height) for width, height in SIZES)
TASK = Task(id="t", question="?", images=PICTURES, answers=("a",))
BOX = Toolbox([ZoomTool(ImageDecoder(), min_side_px=4)], deadline_s=5)
LIMITS = ImageLimits(max_bytes=100_000, max_pixels=100_000)

numbers = (
    st.integers(-(10**30), 10**30)
    | st.integers(-3, 1003)
    | st.floats(0, 1000)
    | st.floats()
    | st.sampled_from([0, 1000, -0.0, 1e308, True, 2**63])
)
anything = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
boxes = st.lists(numbers, min_size=3, max_size=5) | st.lists(
    st.integers(0, 1000) | st.floats(0, 1000), min_size=4, max_size=4
).map(lambda box: sorted(box[::2])[:1] + sorted(box[1::2])[:1] + sorted(box[::2])[1:] + box[1:2])
zoom_arguments = st.fixed_dictionaries(
    {},
    optional={
        "bbox_2d": boxes | anything,
        "bbox": boxes | anything,
        "img_idx": st.integers(-1, 2) | numbers | anything,
        "image_index": numbers,
        "label": anything,
    },
)
TAGS = (
    *("<tool_call>", "</tool_call>", "<think>", "</think>", "<answer>", "</answer>", "<thinking>"),
    *('{"name": "a", "arguments": {}}', '{"name":', '"arguments":', "{", "}", "[" * 5000, "NaN"),
    *('"\\ud800"', "1e999", "-", "\\", "<|im_end|>", "\0", "9" * 5000),
)
turns = st.lists(st.sampled_from(TAGS) | st.text(max_size=6) | anything.map(json.dumps)).map(
    "".join
)
calls = st.builds(
    lambda value: f"<tool_call>{value}</tool_call>",
    st.builds(json.dumps, st.fixed_dictionaries({"name": anything, "arguments": anything})),
)


@given(turns | calls | st.text())
@many
def test_every_turn_can_be_read(text: str) -> None:
    turn = parse_turn(text)
    assert isinstance(turn, ParsedTurn)
    for call in turn.calls:
        assert 0 <= call.start < call.end <= len(text)
        assert (call.error is None) == (call.arguments is not None)
        if call.arguments is not None:
            json.dumps([call.name, call.arguments], ensure_ascii=False).encode()
            BOX.read(call.name, call.arguments)


@given(zoom_arguments)
@many
def test_every_zoom_ends_as_a_crop_or_as_the_policys_error(arguments: dict[str, Any]) -> None:
    request = BOX.read("image_zoom_in_tool", arguments)
    seen = asyncio.run(BOX.execute(request, ToolContext(images=PICTURES, task=TASK)))
    assert seen.outcome in (Outcome.OK, Outcome.MODEL_ERROR), seen.text
    region = zoom_region(arguments, CREDIT_ROW, CREDIT_ROW.steps[0], pixels=False)
    if seen.outcome is Outcome.OK:
        assert region is not None and seen.images[0].ref.root == region.root
        assert all(0 <= value <= 1 for value in seen.images[0].ref.box)
    if region is not None:
        assert 0.0 <= iou(region.box, (0.2, 0.2, 0.7, 0.9)) <= 1.0
    zoom_region(arguments, CREDIT_ROW, CREDIT_ROW.steps[0], pixels=True)


CREDIT_ROW = CreditRow(
    id="r",
    group="g",
    correct=1.0,
    advantage=1.0,
    num_turns=1,
    images=tuple(image.ref for image in PICTURES),
    image_sizes=SIZES,
    steps=(CreditStep(turn=0, calls=(), num_images=2),),
)

MARKUP = (
    *("<p>", "</p>", "<script>", "</script>", "<style", "<!--", "-->", "<![CDATA[", "]]>", "<!"),
    *("<![x", "<?", "&#", "&#x110000;", "&#55296;", "&amp", "<a href='", "</", "<body", "<svg/>"),
    *("\0", "\ud800", "\u202e", "<head>", "\r", "\n \n", "<!DOCTYPE [", "<template>", "<br/>"),
)
pages = st.lists(st.sampled_from(MARKUP) | st.text(max_size=5)).map("".join)


@given(pages, st.integers(0, 50))
@many
def test_every_page_becomes_text_that_can_be_written(page: str, max_chars: int) -> None:
    for text in (html_to_text(page, max_chars=max_chars), readable(page, max_chars=max_chars)):
        text.encode()
        assert len(text) <= max_chars + len(CUT)
        assert not set(text) & {"\0", "\r", "\u202e", "\x1b"}


def encoded(format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pixels = Pillow.frombytes("RGB", (40, 30), bytes(range(256)) * 15 + bytes(-3840 % 3600))
    pixels.save(buffer, format, **options)
    return buffer.getvalue()


SEEDS = (
    encoded("PNG"),
    encoded("JPEG"),
    encoded("JPEG", progressive=True),
    encoded("WEBP"),
    encoded("WEBP", lossless=True),
    encoded("WEBP", save_all=True, append_images=[Pillow.new("RGB", (40, 30))]),
    encoded("PNG", save_all=True, append_images=[Pillow.new("RGB", (40, 30))]),
)
changes = st.lists(st.tuples(st.integers(0, 400), st.binary(min_size=1, max_size=6)), max_size=6)


def with_right_checksums(data: bytes) -> bytes:
    """A PNG whose chunks are what they are, checksums mended so that decoders go on."""
    out, position = bytearray(data[:8]), 8
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        end = position + 8 + length
        if end + 4 > len(data):
            break
        checksum = zlib.crc32(data[position + 4 : end])
        out += data[position:end] + struct.pack(">I", checksum)
        position = end + 4
    return bytes(out) + data[position:]


@given(st.sampled_from(SEEDS), changes, st.integers(0, 4000), st.booleans())
@many
def test_every_damaged_picture_is_read_or_refused(
    seed: bytes, damage: list[tuple[int, bytes]], kept: int, mend: bool
) -> None:
    data = bytearray(seed)
    for position, piece in damage:
        data[position : position + len(piece)] = piece
    whole = bytes(data[:kept]) if kept < len(data) else bytes(data)
    if mend and whole.startswith(b"\x89PNG"):
        whole = with_right_checksums(whole)
    try:
        image = read_image(whole, where="fuzz", limits=LIMITS)
        assert image.width * image.height <= LIMITS.max_pixels
    except DataError:
        pass
    status, width, height, length = REPLY.unpack_from(
        reply := answer(PICTURE, 16, whole, LIMITS, 400)
    )
    assert status in (DONE, REFUSED) and len(reply) == REPLY.size + length
    assert (0 < max(width, height) <= 16) == (status == DONE)


PIECES = (
    *(
        "http://",
        "https://",
        "//",
        "file:",
        "@",
        ":",
        "/",
        "?",
        "#",
        "[",
        "]",
        "%",
        "\\",
        ".",
        "。",
    ),
    *("127.0.0.1", "0x7f.1", "017700000001", "::1", "::ffff:10.0.0.1", "a.test", "xn--a", "é", "٣"),
    *(":80", ":443", ":0", ":99999", "%00", "\n", "\t", " ", "\ud800", "\u202e", "a" * 70),
)
addresses = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=8).map("".join)


@given(addresses | addresses.map(lambda tail: f"http://{tail}"))
@many
def test_every_address_is_refused_when_names_lead_inside(url: str) -> None:
    async def inside(host: str, port: int) -> list[str]:
        return ["10.0.0.1" if port % 2 else "169.254.169.254"]

    def connect() -> Any:
        raise AssertionError(f"connected for {url!r}")

    with pytest.raises((ToolRefusedError, ToolDownError)):
        asyncio.run(HttpClient(resolve=inside, connect=connect).get(url))
    with suppress(ConfigError):
        AllowedHosts.parse([url])


@given(st.binary(max_size=200), st.binary(max_size=40), st.integers(0, 230), st.integers(1, 50))
@many
def test_every_packed_body_is_unpacked_within_its_limits_or_refused(
    content: bytes, rest: bytes, kept: int, step: int
) -> None:
    sent = (gzip.compress(content * 50, mtime=0) + rest)[:kept]
    body = Body(FetchLimits(max_bytes=150, max_unpacked_bytes=5000), packed=True)
    try:
        for start in range(0, len(sent), step):
            body.add(sent[start : start + step])
        data = body.whole()
        assert data == content * 50 and len(data) <= 5000
    except ToolError as error:
        assert type(error) in (ToolRefusedError, ToolDownError)


@given(
    st.binary()
    | anything.map(json.dumps).map(str.encode)
    | st.lists(anything).map(lambda hits: json.dumps({"result": [hits]}).encode())
    | turns.map(lambda text: text.encode("utf-8", "replace"))
)
@many
def test_every_answer_of_a_back_end_is_read_or_it_is_down(data: bytes) -> None:
    for read in (found_texts, found_pictures, retrieved_texts):
        with suppress(ToolDownError):
            read(data)


def test_the_pictures_that_are_damaged_here_are_whole_to_begin_with() -> None:
    for seed in SEEDS:
        image = read_image(seed, where="seed", limits=LIMITS)
        assert isinstance(image, Image) and (image.width, image.height) == (40, 30)
        assert REPLY.unpack_from(answer(PICTURE, 16, seed, LIMITS, 400))[:3] == (DONE, 16, 12)
