"""Recording what tools answer, and playing it back."""

from __future__ import annotations

import asyncio
import hashlib
import json
import sqlite3
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from forked_runs import train_forked
from process_environment import ROOT, environment
from pydantic import BaseModel
from rollout_world import draw_image
from whole_runs import digest_of_weights

from tapo_train.build.tools import build_toolbox
from tapo_train.errors import (
    ConfigError,
    ReplayMissError,
    ToolArgumentError,
    ToolDownError,
    ToolError,
    ToolRefusedError,
)
from tapo_train.recipe.compose import load_recipe
from tapo_train.tools.base import EVERYTHING, ToolContext
from tapo_train.tools.crop import ZoomTool
from tapo_train.tools.images import ImageDecoder
from tapo_train.tools.ledger import Ledger
from tapo_train.tools.limits import ToolLimits
from tapo_train.tools.recording import Mode, Recording, Replay
from tapo_train.tools.toolbox import Toolbox
from tapo_train.types import Image, ImageRef, Observation, Outcome, Task

PICTURES = (draw_image(40, 30, seed=1), draw_image(40, 30, seed=2))
TASK = Task(id="t", question="?", images=PICTURES[:1], answers=("a",))


DESCRIBED = {"sha256": "0" * 64, "width": 1, "height": 1, "root": "r", "box": [0, 0, 1, 1]}
"""A picture as a row describes it."""


class Words(BaseModel):
    """Arguments of `count`."""

    word: str = ""
    img_idx: int = 0
    scale: float = 1.0


class CountingTool:
    """Answers differently each time it is asked, with a picture, or fails as told."""

    name = "count"
    description = "Counts."
    arguments_model: type[BaseModel] = Words

    def __init__(
        self,
        *,
        version: str = "1",
        reads: frozenset[str] = frozenset(),
        fails: Exception | None = None,
    ) -> None:
        self.version = version
        self.reads = reads
        self.fails = fails
        self.asked = 0

    async def run(self, arguments: Words, context: ToolContext) -> Observation:
        self.asked += 1
        if self.fails is not None:
            raise self.fails
        drawn = draw_image(20, 24, seed=self.asked)
        image = replace(drawn, ref=ImageRef(root="sha256:r", box=(0.1, 0.2, 1 / 3, 0.9)))
        return Observation(text=f"answer {self.asked} é", images=(image,))


def ask(
    tool: CountingTool | ZoomTool,
    folder: Path,
    mode: Mode,
    arguments: Mapping[str, Any] | None = None,
    *,
    images: tuple[Image, ...] = PICTURES,
    task: Task = TASK,
) -> Observation:
    """One call through a toolbox; clocks are left out of the answer."""
    recording = Recording(folder, must_exist=mode == "replay")
    box = Toolbox([tool], deadline_s=5, replay=Replay(recording, mode))
    request = box.read(tool.name, arguments or {})
    seen = asyncio.run(box.execute(request, ToolContext(images=images, task=task)))
    box.close()
    return replace(seen, latency_s=0.0)


def test_a_replay_gives_the_recorded_bytes_without_asking_the_tool(tmp_path: Path) -> None:
    recorded = ask(CountingTool(), tmp_path, "record", {"word": "ä"})
    silent = CountingTool(fails=AssertionError("asked"))
    replayed = ask(silent, tmp_path, "replay", {"scale": 1, "word": "ä"})
    assert replayed == replace(recorded, cached=True) and silent.asked == 0
    assert replayed.images[0].data == draw_image(20, 24, seed=1).data
    assert replayed.images[0].ref.box == (0.1, 0.2, 1 / 3, 0.9)


def test_the_first_answer_to_a_call_is_everybodys(tmp_path: Path) -> None:
    tool = CountingTool()
    answers = [ask(tool, tmp_path, "record").text for _ in range(3)]
    assert answers == ["answer 1 é"] * 3 and tool.asked == 3
    assert not ask(tool, tmp_path, "record").cached, "the tool was asked, and paid"
    assert ask(tool, tmp_path, "replay_or_record").cached and tool.asked == 4
    assert ask(tool, tmp_path, "replay_or_record", {"word": "new"}).text == "answer 5 é"
    assert ask(tool, tmp_path, "replay", {"word": "new"}).text == "answer 5 é"


def test_a_call_that_was_not_recorded_ends_a_strict_replay(tmp_path: Path) -> None:
    ask(CountingTool(), tmp_path, "record")
    with pytest.raises(
        ReplayMissError, match=r'count \{"img_idx":0,"scale":1.0,"word":"b"\}.* 1 c'
    ):
        ask(CountingTool(), tmp_path, "replay", {"word": "b"})
    with pytest.raises(ReplayMissError, match="version 2"):
        ask(CountingTool(version="2"), tmp_path, "replay")


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (ToolArgumentError("wrong"), Outcome.MODEL_ERROR),
        (ToolError("HTTP 404"), Outcome.TOOL_ERROR),
        (ToolRefusedError("no"), Outcome.REFUSED),
    ],
)
def test_a_no_is_an_answer_and_is_recorded(
    tmp_path: Path, error: ToolError, outcome: Outcome
) -> None:
    tool = CountingTool(fails=error)
    unrecorded = asyncio.run(
        (box := Toolbox([tool], deadline_s=5)).execute(
            box.read("count", {}), ToolContext(images=(), task=TASK)
        )
    )
    assert ask(tool, tmp_path, "record") == replace(unrecorded, latency_s=0.0)
    replayed = ask(CountingTool(), tmp_path, "replay")
    assert replayed == replace(unrecorded, latency_s=0.0, cached=True)
    assert replayed.outcome is outcome


@pytest.mark.parametrize(
    "error", [ToolDownError("HTTP 500"), TimeoutError("slow"), OSError("disk"), KeyError("bug")]
)
def test_a_back_end_that_is_down_is_no_answer(tmp_path: Path, error: Exception) -> None:
    seen = ask(CountingTool(fails=error), tmp_path, "record")
    assert seen.outcome in (Outcome.INFRA_ERROR, Outcome.TIMEOUT)
    assert len(Recording(tmp_path)) == 0
    assert ask(CountingTool(), tmp_path, "replay_or_record").outcome is Outcome.OK


@pytest.mark.parametrize(
    ("reads", "change", "is_same"),
    [
        (frozenset(), "picture", True),
        (frozenset({"picture"}), "picture", False),
        (frozenset({"picture"}), "origin", False),
        (frozenset({"picture"}), "other picture", True),
        (frozenset({"pictures"}), "other picture", False),
        (frozenset({"picture"}), "task", True),
        (frozenset({"task"}), "task", False),
        (EVERYTHING, "other picture", False),
    ],
)
def test_a_key_holds_what_the_tool_reads_and_nothing_else(
    tmp_path: Path, reads: frozenset[str], change: str, is_same: bool
) -> None:
    first, second = PICTURES
    ask(CountingTool(reads=reads), tmp_path, "record")
    third = draw_image(40, 30, seed=3)
    moved = replace(first, ref=ImageRef(root=first.ref.root, box=(0.0, 0.0, 0.5, 0.5)))
    images = {
        "picture": (third, second),
        "other picture": (first, third),
        "origin": (moved, second),
    }
    task = replace(TASK, question="other?") if change == "task" else TASK
    tool = CountingTool(reads=reads)
    seen = ask(tool, tmp_path, "replay_or_record", images=images.get(change, PICTURES), task=task)
    assert seen.cached is is_same and tool.asked == (0 if is_same else 1)


def test_a_wrong_index_is_answered_with_the_number_of_pictures_there_are(tmp_path: Path) -> None:
    zoom = ZoomTool(ImageDecoder())
    arguments = {"bbox_2d": [0, 0, 1000, 1000], "img_idx": 5}
    two = ask(zoom, tmp_path, "record", arguments)
    one = ask(zoom, tmp_path, "record", arguments, images=PICTURES[:1])
    assert "0 to 1" in two.text and "0 to 0" in one.text


def test_a_crop_of_equal_pixels_from_another_place_is_another_call(tmp_path: Path) -> None:
    zoom = ZoomTool(ImageDecoder())
    arguments = {"bbox_2d": [0, 0, 1000, 1000]}
    part = replace(PICTURES[0], ref=ImageRef(root="sha256:r", box=(0.5, 0.5, 1.0, 1.0)))
    whole = ask(zoom, tmp_path, "record", arguments)
    cut = ask(zoom, tmp_path, "record", arguments, images=(part,))
    assert whole.images[0].sha256 == cut.images[0].sha256
    assert cut.images[0].ref.box == (0.5, 0.5, 1.0, 1.0) != whole.images[0].ref.box


@pytest.mark.parametrize("mode", ["replay", "replay_or_record"])
def test_recorded_answers_are_free_however_many_are_asked_for_at_once(
    tmp_path: Path, mode: Mode
) -> None:
    ask(CountingTool(), tmp_path, "record", {"word": "known"})
    ledger = Ledger()
    box = Toolbox(
        [CountingTool()],
        deadline_s=5,
        replay=Replay(Recording(tmp_path), mode),
        limits={"count": ToolLimits(price=3.0)},
        ledger=ledger,
    )
    ledger.fill(Decimal(3))

    async def all_at_once(*words: str) -> list[Outcome]:
        context = ToolContext(images=PICTURES, task=TASK)
        requests = [box.read("count", {"word": word}) for word in words]
        seen = await asyncio.gather(*(box.execute(request, context) for request in requests))
        return sorted(answer.outcome for answer in seen)

    assert asyncio.run(all_at_once(*["known"] * 8)) == [Outcome.OK] * 8
    assert (ledger.spent, ledger.is_exhausted) == (0, False)
    records = ledger.drain()
    assert [(r.attempts, r.cost, r.cached) for r in records] == [(1, 0.0, True)] * 8
    if mode == "replay_or_record":
        found = asyncio.run(all_at_once("new", "newer", "known"))
        assert found == [Outcome.INFRA_ERROR, Outcome.OK, Outcome.OK]
        assert (ledger.spent, ledger.is_exhausted) == (3, True)
    box.close()


def test_what_is_damaged_or_strange_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="found no"):
        Recording(tmp_path / "none", must_exist=True)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "calls.sqlite").write_text("not a data base, but long enough " * 40)
    with pytest.raises(ConfigError, match="cannot be used"):
        Recording(tmp_path / "text")
    ask(CountingTool(), tmp_path, "record")
    (blob,) = (tmp_path / "blobs").glob("*/*")
    blob.write_bytes(b"something else")
    with pytest.raises(ReplayMissError, match="damaged"):
        ask(CountingTool(), tmp_path, "replay")
    blob.unlink()
    with pytest.raises(ReplayMissError, match="cannot be read"):
        ask(CountingTool(), tmp_path, "replay")
    with sqlite3.connect(tmp_path / "calls.sqlite") as file:
        described = json.dumps([DESCRIBED | {"sha256": "../../../../etc/passwd"}])
        file.execute("update calls set images = ?", (described,))
    with pytest.raises(ReplayMissError, match="wanted a digest"):
        ask(CountingTool(), tmp_path, "replay")
    with sqlite3.connect(tmp_path / "calls.sqlite") as file:
        file.execute("pragma user_version = 7")
    with pytest.raises(ConfigError, match="its format is 7"):
        Recording(tmp_path)


@pytest.mark.parametrize(
    ("column", "value", "complaint"),
    [
        ("outcome", "lost", "outcome: Input should be 'ok'"),
        ("outcome", 3, "outcome: "),
        ("text", b"\xff", "text: Input should be a valid string"),
        ("images", "[", "images: Invalid JSON"),
        ("images", "[" * 100_000, "images: Invalid JSON"),
        ("images", "7", "images: Input should be a valid tuple"),
        ("images", "[{}]", "images.0.sha256: Field required"),
        ("images", json.dumps([DESCRIBED | {"width": "1"}]), "images.0.width: "),
        ("images", json.dumps([DESCRIBED | {"box": [0, 1]}]), "images.0.box.2: "),
        ("images", json.dumps([DESCRIBED | {"box": [0, 0, 1, float("nan")]}]), "images.0.box.3: "),
    ],
)
def test_a_row_that_is_no_answer_ends_a_strict_replay_naming_file_and_key(
    tmp_path: Path, column: str, value: object, complaint: str
) -> None:
    ask(CountingTool(), tmp_path, "record")
    with sqlite3.connect(tmp_path / "calls.sqlite") as file:
        ((key,),) = file.execute("select key from calls")
        file.execute(f"update calls set {column} = ?", (value,))
    with pytest.raises(ReplayMissError) as caught:
        ask(CountingTool(), tmp_path, "replay")
    said = f"{tmp_path}/calls.sqlite: the answer to {key} cannot be used: {complaint}"
    assert str(caught.value).startswith(said)


def test_a_recorded_picture_is_what_its_row_says_and_a_picture_at_all(tmp_path: Path) -> None:
    ask(CountingTool(), tmp_path, "record")
    with sqlite3.connect(tmp_path / "calls.sqlite") as file:
        ((images,),) = file.execute("select images from calls")
        (described,) = json.loads(images)
        text = hashlib.sha256(b"no picture").hexdigest()
        (tmp_path / "blobs" / text[:2]).mkdir(exist_ok=True)
        (tmp_path / "blobs" / text[:2] / text).write_bytes(b"no picture")
        for change, complaint in (
            ({"width": 21}, "has 20 x 24 pixels; the row says 21 x 24"),
            ({"sha256": text}, "not a readable picture"),
        ):
            file.execute("update calls set images = ?", (json.dumps([described | change]),))
            file.commit()
            with pytest.raises(ReplayMissError, match=complaint):
                ask(CountingTool(), tmp_path, "replay")


def test_a_file_that_was_damaged_after_it_was_opened_ends_a_strict_replay(tmp_path: Path) -> None:
    recording = Recording(tmp_path)
    recording.close()
    with pytest.raises(ReplayMissError, match=r"calls\.sqlite: the answer to k cannot be used"):
        recording.get("k")


WRITER = """
import sys
from pathlib import Path
from tapo_train.tools.base import CallName
from tapo_train.tools.recording import Recording
from tapo_train.types import Observation
recording, who = Recording(Path(sys.argv[1])), sys.argv[2]
for number in range(150):
    call = CallName(tool="t", version="1", arguments="{}", key=f"{number:064x}")
    kept = recording.put(call, Observation(text=who))
    print(kept.text)
"""


def test_processes_that_write_at_once_agree_on_every_answer(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path / "recording")]
    writers = [
        subprocess.Popen(
            [*command, str(who)], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
        )
        for who in range(4)
    ]
    told = [writer.communicate(timeout=60)[0].split() for writer in writers]
    assert all(writer.returncode == 0 for writer in writers)
    assert told[0] == told[1] == told[2] == told[3] and len(told[0]) == 150
    recording = Recording(tmp_path / "recording")
    kept = [recording.get(f"{number:064x}") for number in range(150)]
    assert [answer.text for answer in kept if answer] == told[0]


def test_every_tool_of_a_recipe_is_wrapped_and_the_folder_is_the_runs(
    small_world: Path, tmp_path: Path
) -> None:
    paths = [
        f"tools.corpus={small_world}/corpus.jsonl",
        f"tools.image_index={small_world}/image_index.jsonl",
        f"run.dir={tmp_path}/run",
    ]
    recipe = load_recipe("recipes/demo_cpu.yaml", [*paths, "tools.replay=record"])
    box = build_toolbox(recipe)
    request = box.read("text_search_tool", {"query": "seat"})
    seen = asyncio.run(box.execute(request, ToolContext(images=(), task=TASK)))
    box.close()
    assert seen.outcome is Outcome.OK
    with sqlite3.connect(tmp_path / "run" / "recording" / "calls.sqlite") as file:
        rows = file.execute("select tool, arguments, outcome, text from calls").fetchall()
    assert rows == [("text_search_tool", '{"query":"seat"}', "ok", seen.text)]
    with pytest.raises(ConfigError, match="found no"):
        build_toolbox(
            load_recipe("recipes/demo_cpu.yaml", [*paths[:2], "run.dir=x", "tools.replay=replay"])
        )


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_replayed_run_is_the_recorded_one_token_for_token_and_loss_for_loss(
    small_world: Path, tmp_path: Path
) -> None:
    recording = f"tools.recording={tmp_path}/recording"
    short = ("rollout/engine=hf", "run.steps=2", recording)
    recorded, replayed = (
        train_forked(small_world, tmp_path / f"{mode}ed", *short, f"tools.replay={mode}", ranks=2)
        for mode in ("record", "replay")
    )
    assert without_cache(recorded) == without_cache(replayed)
    assert all(row["rollout/call_rate"] > 0 for row in recorded)
    for name in ("step_000000.jsonl", "step_000001.rank_1.jsonl"):
        ours, theirs = (
            [timeless(json.loads(line)) for line in (run / "tokens" / name).open()]
            for run in (tmp_path / "recorded", tmp_path / "replayed")
        )
        assert ours == theirs and any(turn["calls"] for row in ours for turn in row["turns"])
    weights = {digest_of_weights(tmp_path / run / "export") for run in ("recorded", "replayed")}
    assert len(weights) == 1


def without_cache(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics without those that say where the answers came from."""
    return [{k: v for k, v in row.items() if not k.endswith("/cached")} for row in rows]


def timeless(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the dump without latencies."""
    calls = [call for turn in row["turns"] for call in turn["calls"]]
    for call in calls:
        call["latency_s"] = None
    return row
