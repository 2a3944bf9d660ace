"""FVQA and LiveVQA in their published schemas: made-up rows, and real ones where they lie."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow

from tapo_train.data.intake import Intake
from tapo_train.data.tasks import load_task_files, load_tasks
from tapo_train.errors import DataError

REAL = Path(__file__).parents[2] / "shared" / "data"
needs_real_rows = pytest.mark.skipif(
    not REAL.is_dir(), reason=f"real rows of FVQA and LiveVQA are not there: {REAL}"
)
BOUNDED = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def encoded(size: tuple[int, int] = (9, 7)) -> bytes:
    stream = io.BytesIO()
    Pillow.new("RGB", size, "green").save(stream, "JPEG")
    return stream.getvalue()


def fvqa_row(**changes: Any) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": "Who designed this tower?"}],
        "images": [{"bytes": encoded(), "path": None}],
        "reward_model": {
            "candidate_answers": '["G. Eiffel", "Gustave Eiffel"]',
            "ground_truth": "Gustave Eiffel",
            "style": "rule",
        },
        "data_source": "mmsearch_r1/fvqa_train",
        "image_urls": None,
        "data_id": "fvqa_train_0",
        "category": "search_required",
        **changes,
    }


def fvqa_file(tmp_path: Path, *rows: dict[str, Any]) -> Path:
    path = tmp_path / "fvqa.parquet"
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def truth(**changes: Any) -> dict[str, Any]:
    return {**fvqa_row()["reward_model"], **changes}


def test_an_fvqa_row_becomes_a_task_with_every_accepted_answer_once(tmp_path: Path) -> None:
    (task,) = load_tasks(fvqa_file(tmp_path, fvqa_row()))
    assert (task.id, task.question) == ("fvqa_train_0", "Who designed this tower?")
    assert task.answers == ("Gustave Eiffel", "G. Eiffel")
    assert task.source == "mmsearch_r1/fvqa_train"
    assert task.metadata == {"category": "search_required"}
    assert task.images[0].data == encoded()


def test_fvqa_rows_without_data_id_are_named_after_file_and_row(tmp_path: Path) -> None:
    rows = [fvqa_row(data_id=None), fvqa_row(data_id=None)]
    assert [task.id for task in load_tasks(fvqa_file(tmp_path, *rows))] == ["fvqa_0", "fvqa_1"]


@pytest.mark.parametrize(
    ("changes", "answers"),
    [
        ({"candidate_answers": ["1931 AD"], "ground_truth": "1931"}, ("1931", "1931 AD")),
        ({"candidate_answers": '[1931, "", null]', "ground_truth": "x"}, ("x", "1931")),
        ({"candidate_answers": '"1931"', "ground_truth": "x"}, ("x", "1931")),
        ({"candidate_answers": "[]", "ground_truth": 1931}, ("1931",)),
        ({"ground_truth": {"target": ["Eve", "Eva"]}, "candidate_answers": None}, ("Eve", "Eva")),
    ],
)
def test_answers_of_a_parquet_row_are_read_in_the_shapes_they_are_published_in(
    tmp_path: Path, changes: dict[str, Any], answers: tuple[str, ...]
) -> None:
    row = fvqa_row(reward_model={"style": "rule", **changes}, data_id=7)
    other = fvqa_row(reward_model={"style": "rule", **changes}, data_id=8, images=None)
    first, second = load_tasks(fvqa_file(tmp_path, row, other))
    assert (first.id, first.answers) == ("7", answers)
    assert (second.id, second.images) == ("8", ())


def test_a_parquet_row_may_hold_its_picture_under_image_or_none_at_all(tmp_path: Path) -> None:
    single = {**fvqa_row(), "image": {"bytes": encoded(), "path": None}}
    del single["images"]
    assert len(load_tasks(fvqa_file(tmp_path, single))[0].images) == 1
    del single["image"]
    assert load_tasks(fvqa_file(tmp_path, single).rename(tmp_path / "A.PARQUET"))[0].images == ()


def test_a_livevqa_item_that_cannot_be_used_is_left_out_with_both_its_questions(
    tmp_path: Path,
) -> None:
    bad, good = {**item(), "id": "8", "img_path": "gone.jpg"}, item(Ground_Truth_List=[1931])
    intake = Intake(drop=True)
    tasks = load_task_files([livevqa_folder(tmp_path, [bad, good])], intake=intake)
    assert [task.id for task in tasks] == ["7/level1", "7/level2"]
    assert tasks[1].answers == ("1931", "Regatta: day 1")
    assert len(intake.problems) == 1 and "item 0: picture 'gone.jpg'" in intake.problems[0]


@pytest.mark.parametrize("candidates", [None, "[]", "", " ", []])
def test_an_fvqa_row_without_candidates_accepts_its_ground_truth(
    tmp_path: Path, candidates: str | list[str] | None
) -> None:
    row = fvqa_row(reward_model=truth(candidate_answers=candidates))
    (task,) = load_tasks(fvqa_file(tmp_path, row))
    assert task.answers == ("Gustave Eiffel",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward_model": truth(candidate_answers="[broken")}, "candidate_answers: not valid JSON"),
        ({"reward_model": truth(candidate_answers='[{"a": 1}]')}, "wanted a text, a number or a"),
        ({"reward_model": truth(ground_truth=" ")}, "reward_model: field 'ground_truth'"),
        ({"images": [{"bytes": None, "path": "a.jpg"}]}, r"images\[0\]: .* wanted embedded bytes"),
        ({"images": [{"bytes": b"GIF89a", "path": None}]}, r"images\[0\]: not a readable picture"),
        ({"prompt": []}, "field 'prompt'"),
        ({"data_id": 5.5}, "field 'data_id'"),
        ({"images": None, "image_urls": ["http://a/b.jpg"]}, "field 'image_urls'"),
    ],
)
def test_a_wrong_fvqa_field_is_named_with_its_row(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_tasks(fvqa_file(tmp_path, fvqa_row(**changes)))
    assert "fvqa.parquet: row 0" in str(caught.value)


def test_a_parquet_file_of_another_schema_is_refused_with_the_missing_columns(
    tmp_path: Path,
) -> None:
    with pytest.raises(DataError, match=r"columns \['prompt'\] are missing"):
        load_tasks(fvqa_file(tmp_path, {"reward_model": truth(), "x": 1}))


def item(**level2: Any) -> dict[str, Any]:
    def qa(**changes: Any) -> dict[str, Any]:
        return {
            "question": "Which event?",
            "question_type": "event",
            "options": ["A. Cup final", "B) Regatta: day 1"],
            "Ground_Truth": "B",
            "Ground_Truth_List": ["Regatta", "boat race"],
            **changes,
        }

    return {
        "id": "7",
        "img_path": "a.jpg",
        "level1_qa": qa(),
        "level2_qa": qa(**{"question": "When?", **level2}),
        "source": "AP News",
        "time": "2025-04-28T02:00:35",
    }


def livevqa_folder(tmp_path: Path, items: Any) -> Path:
    (tmp_path / "News_imgs").mkdir(exist_ok=True)
    (tmp_path / "News_imgs" / "a.jpg").write_bytes(encoded())
    (tmp_path / "benchmark.json").write_text(json.dumps(items))
    return tmp_path


def test_a_livevqa_item_becomes_two_tasks_that_share_a_picture(tmp_path: Path) -> None:
    first, second = load_tasks(livevqa_folder(tmp_path, [item()]))
    assert (first.id, first.question, first.source) == (
        "7/level1",
        "Which event?",
        "livevqa/level1",
    )
    assert (second.id, second.question, second.source) == ("7/level2", "When?", "livevqa/level2")
    assert first.answers == ("Regatta", "boat race", "Regatta: day 1")
    assert first.images[0] is second.images[0]
    assert first.metadata == {
        "question_type": "event",
        "publisher": "AP News",
        "time": "2025-04-28T02:00:35",
    }


def test_livevqa_pictures_may_lie_in_a_folder_given_by_hand(tmp_path: Path) -> None:
    folder = livevqa_folder(tmp_path, [item()])
    (folder / "News_imgs").rename(folder / "elsewhere")
    tasks = load_tasks(folder / "benchmark.json", root=folder / "elsewhere")
    assert len(tasks) == 2


@pytest.mark.parametrize(
    ("level2", "message"),
    [
        ({"Ground_Truth": "C"}, r"'Ground_Truth': found 'C'; .* \['A', 'B'\]"),
        ({"Ground_Truth_List": []}, "Ground_Truth_List"),
        ({"options": ["Cup final"]}, "texts like 'A. Boston'"),
        ({"options": ["A. x", "A. y"]}, "each letter once"),
        ({"question": ""}, "'question'"),
    ],
)
def test_a_wrong_livevqa_field_is_named_with_its_item(
    tmp_path: Path, level2: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_tasks(livevqa_folder(tmp_path, [item(**level2)]))
    assert "benchmark.json: item 0: level2_qa" in str(caught.value)


@pytest.mark.parametrize("items", [{}, [3], [{}], [item(), item()]])
def test_livevqa_files_of_another_shape_are_refused(tmp_path: Path, items: Any) -> None:
    with pytest.raises(DataError, match=r"benchmark\.json"):
        load_tasks(livevqa_folder(tmp_path, items))


VALUES = (
    st.none() | st.integers(-9, 9) | st.text(max_size=5) | st.lists(st.text(max_size=5), max_size=2)
)


@BOUNDED
@given(name=st.sampled_from(sorted(item()["level2_qa"])), value=VALUES)
def test_any_value_in_a_livevqa_field_gives_tasks_or_a_data_error(
    tmp_path: Path, name: str, value: Any
) -> None:
    try:
        assert len(load_tasks(livevqa_folder(tmp_path, [item(**{name: value})]))) == 2
    except DataError as error:
        assert "benchmark.json: item 0" in str(error)


@BOUNDED
@given(name=st.sampled_from(sorted(fvqa_row())), value=VALUES)
def test_any_value_in_an_fvqa_column_gives_tasks_or_a_data_error(
    tmp_path: Path, name: str, value: Any
) -> None:
    try:
        assert len(load_tasks(fvqa_file(tmp_path, fvqa_row(**{name: value})))) == 1
    except DataError as error:
        assert "fvqa.parquet" in str(error)


@BOUNDED
@given(place=st.floats(0, 1), patch=st.binary(min_size=1, max_size=8))
def test_a_damaged_parquet_file_is_read_or_a_data_error(
    tmp_path: Path, place: float, patch: bytes
) -> None:
    data = bytearray(fvqa_file(tmp_path, fvqa_row()).read_bytes())
    start = int(place * len(data))
    data[start : start + len(patch)] = patch
    path = tmp_path / "damaged.parquet"
    path.write_bytes(bytes(data))
    try:
        assert len(load_tasks(path)) == 1
    except DataError as error:
        assert "damaged.parquet" in str(error)


@needs_real_rows
def test_the_real_fvqa_rows_are_read() -> None:
    tasks = load_tasks(REAL / "fvqa_mini.parquet")
    assert len(tasks) == 5
    assert tasks[0].question == "What is the country of origin of this food?"
    assert tasks[0].answers[:2] == ("Spain", "Kingdom of Spain")
    assert {(len(task.images), task.source) for task in tasks} == {
        (1, "mmsearch_r1/infoseek_train_split")
    }


@needs_real_rows
def test_the_real_livevqa_items_are_read() -> None:
    tasks = load_tasks(REAL / "livevqa_news")
    assert len(tasks) == 80
    assert tasks[2].answers == ("New York Knicks", "Knicks", "NY Knicks")
    assert max(max(task.images[0].width, task.images[0].height) for task in tasks) == 512
