"""Task files: what is read, what is refused, and that nothing else escapes."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow

from tapo_train.data.images import ImageLimits, read_image
from tapo_train.data.intake import Intake
from tapo_train.data.rows import shown
from tapo_train.data.tasks import fingerprint, load_task_files, load_tasks, write_tasks
from tapo_train.errors import DataError
from tapo_train.types import ImageRef, Task

BOUNDED = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def encoded(format: str = "PNG", size: tuple[int, int] = (12, 8), colour: str = "red") -> bytes:
    stream = io.BytesIO()
    Pillow.new("RGB", size, colour).save(stream, format)
    return stream.getvalue()


def row(**changes: Any) -> dict[str, Any]:
    """A good native row; `key=None` removes the key."""
    fields: dict[str, Any] = {
        "id": "q1",
        "prompt": [{"role": "user", "content": "<image>\nWho built this?"}],
        "image": ["tower.png"],
        "reward_model": {"ground_truth": ["Gustave Eiffel", "Eiffel"], "style": "rule"},
        "data_source": "towers",
        **changes,
    }
    return {key: value for key, value in fields.items() if value is not None}


def folder_with(tmp_path: Path, *rows: dict[str, Any]) -> Path:
    (tmp_path / "tower.png").write_bytes(encoded())
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps(fields) + "\n" for fields in rows), encoding="utf-8")
    return path


def parts(*texts: str) -> list[dict[str, Any]]:
    """A user turn of parts; "<image>" is a picture."""
    content = [
        {"type": "image"} if text == "<image>" else {"type": "text", "text": text} for text in texts
    ]
    return [{"role": "user", "content": content}]


def asked(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def test_a_native_row_becomes_a_task_with_its_picture(tmp_path: Path) -> None:
    (task,) = load_tasks(folder_with(tmp_path, row(hops=2)))
    assert (task.id, task.question, task.source) == ("q1", "Who built this?", "towers")
    assert task.answers == ("Gustave Eiffel", "Eiffel")
    assert task.metadata == {"hops": 2}
    (image,) = task.images
    assert (image.width, image.height, image.data) == (12, 8, encoded())
    assert image.ref == ImageRef(root=f"sha256:{image.sha256}")


def test_blank_lines_are_skipped_and_lines_keep_their_number(tmp_path: Path) -> None:
    path = folder_with(tmp_path)
    path.write_text(f"\n{json.dumps(row())}\n\n{json.dumps(row(id=None))}\n")
    with pytest.raises(DataError, match=r"tasks\.jsonl:4: field 'id': found nothing"):
        load_tasks(path)


def test_equal_pictures_are_held_once(tmp_path: Path) -> None:
    path = folder_with(tmp_path, row(), row(id="q2"), row(id="q3", image=["copy.png"]))
    (tmp_path / "copy.png").write_bytes(encoded())
    first, second, third = (task.images[0] for task in load_tasks(path))
    assert first is second is third


def test_an_integer_index_serves_as_id_and_a_single_path_as_picture_list(tmp_path: Path) -> None:
    (task,) = load_tasks(folder_with(tmp_path, row(id=None, index=7, image="tower.png")))
    assert (task.id, len(task.images), task.metadata) == ("7", 1, {})


def test_an_index_beside_an_id_is_kept_as_metadata_and_written_back(tmp_path: Path) -> None:
    tasks = load_tasks(folder_with(tmp_path, row(index=7)))
    assert (tasks[0].id, tasks[0].metadata) == ("q1", {"index": 7})
    write_tasks(tmp_path / "again.jsonl", tasks)
    assert load_tasks(tmp_path / "again.jsonl") == tasks


@pytest.mark.parametrize(
    ("content", "images"),
    [
        ("Who?", ["tower.png"]),
        ("Who?\n<image>", ["tower.png"]),
        ("<image>\n<image>\n Who? ", ["tower.png", "tower.png"]),
        ("Who?", None),
        ("Who?", []),
    ],
)
def test_placeholders_at_the_ends_leave_the_question(
    tmp_path: Path, content: str, images: list[str] | None
) -> None:
    (task,) = load_tasks(folder_with(tmp_path, row(prompt=asked(content), image=images)))
    assert (task.question, len(task.images)) == ("Who?", len(images or []))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": asked("Is <image> red?")}, "only before or after"),
        ({"prompt": asked("<image><image>Who?")}, "1 <image> as there are pictures"),
        ({"prompt": asked("<image>")}, "a question with"),
        ({"prompt": asked("  ")}, "not blank"),
        ({"prompt": []}, "one message"),
        ({"prompt": [*asked("a"), *asked("b")]}, "one message"),
        ({"prompt": ["a"]}, "one message"),
        ({"prompt": [*asked("a"), {"role": "system", "content": "x"}]}, "one message"),
        ({"prompt": "<image> Is <image> red?"}, r"'prompt': .*1 <image> as there are pictures"),
        ({"prompt": " "}, "'prompt': .*not blank"),
        ({"prompt": parts("<image>", "red?", "<image>")}, "1 <image> as there are pictures"),
        ({"prompt": parts("Is", "<image>", "red?")}, "only before or after"),
        ({"prompt": parts("<image>")}, "a question with"),
        ({"prompt": [{"role": "user", "content": [{"type": "video"}]}]}, r"content\[0\]: .*'type'"),
        ({"prompt": [{"role": "user", "content": [{"type": "text"}]}]}, "'text' with a text"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image", "image": "b.png"}]}]},
            "found 'b.png'; wanted nothing: the pictures of a row stand in its field 'image'",
        ),
        ({"prompt": [{"role": "system", "content": "x"}]}, "'user'"),
        ({"reward_model": None}, "'reward_model': found nothing"),
        ({"reward_model": {"ground_truth": []}}, "reward_model: field 'ground_truth'"),
        ({"reward_model": {"ground_truth": [" ", None]}}, "not all blank"),
        ({"reward_model": {"ground_truth": ["ok", True]}}, "a text, a number or a list"),
        ({"reward_model": {"ground_truth": [["ok"]]}}, "a text, a number or a list"),
        ({"reward_model": {"ground_truth": float("inf")}}, "a text, a number or a list"),
        ({"image": "data:image/png;base64," + "A" * 200_000}, r"A…; wanted the path of a file"),
        ({"image": "x" * 100_000}, "impossible path 'xxx"),
        ({"image": ["tower.png"], "images": ["tower.png"]}, "the pictures under 'image' alone"),
        ({"image": None, "img_path": "tower.png"}, r"'img_path': found 'tower.png'; wanted pic"),
        ({"image": None, "image_url": "http://a/b.png"}, "'image_url'"),
        ({"videos": ["a.mp4"]}, "'videos'"),
        ({"image": "missing.png"}, "'missing.png' is not a file"),
        ({"image": "."}, "is not a file"),
        ({"image": {}}, "field 'image'"),
        ({"image": "a\0b"}, "impossible path"),
        ({"id": True}, "a text or an integer"),
        ({"id": "\ud800"}, "a text or an integer"),
        ({"data_source": 3}, "field 'data_source'"),
    ],
)
def test_a_wrong_field_is_named_with_file_and_line(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_tasks(folder_with(tmp_path, row(**changes)))
    assert "tasks.jsonl:1" in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "key_and_value",
    [
        ("image", "tower.png"),
        ("images", ["tower.png"]),
        ("images", [{"path": "tower.png", "bytes": None}]),
        ("image_path", "tower.png"),
        ("image_paths", ["tower.png"]),
    ],
    ids=str,
)
def test_pictures_are_read_under_every_name_they_are_published_by(
    tmp_path: Path, key_and_value: tuple[str, Any]
) -> None:
    key, value = key_and_value
    path = folder_with(tmp_path, row(**{"image": None, key: value, "image_url": "http://a/b"}))
    (task,) = load_tasks(path)
    assert [image.data for image in task.images] == [encoded()]
    assert task.metadata == {"image_url": "http://a/b"}, "said where the picture is from"


@pytest.mark.parametrize(
    "prompt",
    [
        "<image>Who?",
        "Who?",
        [{"role": "system", "content": "Call <search>."}, {"role": "user", "content": "Who?"}],
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Who?"}]}],
        [
            {
                "role": "user",
                "content": [{"type": "text", "text": "Who?"}, {"type": "image", "text": None}],
            }
        ],
    ],
    ids=str,
)
def test_questions_are_read_in_the_shapes_they_are_published_in(
    tmp_path: Path, prompt: Any
) -> None:
    intake = Intake()
    (task,) = load_tasks(folder_with(tmp_path, row(prompt=prompt)), intake=intake)
    assert (task.question, len(task.images)) == ("Who?", 1)
    has_system_turn = len(prompt) == 2
    assert intake.report() == (
        ["1 rows have a system turn of their own, which is not used: data.system_prompt is"]
        if has_system_turn
        else []
    )


@pytest.mark.parametrize(
    ("truth", "answers"),
    [
        ("Eve", ("Eve",)),
        (1931, ("1931",)),
        (1931.0, ("1931",)),
        (2.5, ("2.5",)),
        (["Eve", 1931, None, " ", float("nan")], ("Eve", "1931")),
        ({"target": ["Eve", "Eva"]}, ("Eve", "Eva")),
    ],
)
def test_answers_are_read_in_the_shapes_they_are_published_in(
    tmp_path: Path, truth: Any, answers: tuple[str, ...]
) -> None:
    (task,) = load_tasks(folder_with(tmp_path, row(reward_model={"ground_truth": truth})))
    assert task.answers == answers


def cut(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


def damaged(tmp_path: Path) -> Path:
    """Four rows of which two have a damaged picture and one is no JSON."""
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(cut(encoded("JPEG", (200, 200))))
    path = folder_with(tmp_path, row(), row(id="a", image="a.jpg"), row(id="b", image="b.jpg"))
    with path.open("a") as file:
        file.write(json.dumps(row(id="q1")) + "\n" + "{\n" + json.dumps(row(id="q2")) + "\n")
    return path


def test_all_bad_rows_are_named_in_one_message(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_task_files([damaged(tmp_path)])
    lines = str(caught.value).splitlines()
    assert lines[0] == "4 rows cannot be used (data.bad_rows=drop leaves them out):"
    assert [line.split(": ")[0].rpartition(":")[2] for line in lines[1:]] == ["2", "3", "4", "5"]


def test_bad_rows_can_be_left_out_and_are_counted(tmp_path: Path) -> None:
    intake = Intake(drop=True)
    assert [task.id for task in load_task_files([damaged(tmp_path)], intake=intake)] == ["q1", "q2"]
    report = intake.report()
    assert report[0] == "4 rows left out (data.bad_rows=drop):"
    assert "tasks.jsonl:2: not a readable picture" in report[1]
    assert "id 'q1' was used before" in report[3]


def test_a_file_without_a_usable_row_is_refused_though_rows_are_left_out(tmp_path: Path) -> None:
    path = folder_with(tmp_path, row(image="missing.png"))
    with pytest.raises(DataError, match=r"found no task that can be used:(.|\n)*'missing\.png'"):
        load_task_files([path], intake=Intake(drop=True))


def test_reading_ends_where_there_are_too_many_bad_rows_to_name(tmp_path: Path) -> None:
    path = folder_with(tmp_path, *(row(id=str(n), image="missing.png") for n in range(50)))
    with pytest.raises(DataError, match=r"^20 rows and more cannot be used") as caught:
        load_tasks(path)
    assert len(str(caught.value).splitlines()) == 21
    intake = Intake(drop=True)
    load_tasks(path, intake=intake)
    assert len(intake.problems) == 50
    assert intake.report()[-1] == "  and 30 more"


@pytest.mark.parametrize("line", ["{", "[1]", '"x"', "[" * 100_000, "1" * 5000, "\udcff{}"])
def test_a_line_that_is_no_json_object_is_refused_with_its_place(tmp_path: Path, line: str) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_bytes(line.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=r"tasks\.jsonl:1: "):
        load_tasks(path)


def test_what_was_found_is_shown_up_to_80_characters() -> None:
    assert shown("x" * 78) == "'" + "x" * 78 + "'"
    assert shown("x" * 79) == "'" + "x" * 78 + "…"


def test_an_id_used_twice_is_refused_with_both_places(tmp_path: Path) -> None:
    path = folder_with(tmp_path, row(), row(id="other"), row())
    with pytest.raises(DataError, match=r"jsonl:3: id 'q1' was used before, at .*jsonl:1"):
        load_tasks(path)


def test_a_picture_outside_the_root_is_refused_also_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(encoded())
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "secret.png")
    for name in ("../secret.png", "link.png", str(tmp_path / "secret.png")):
        with pytest.raises(DataError, match="leads out of the data folder"):
            load_tasks(folder_with(tmp_path / "data", row(image=name)))


def test_pictures_may_lie_in_folders_that_are_named(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    (disk / "1.png").write_bytes(encoded(size=(3, 5)))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "linked").symlink_to(disk)
    for name in ("linked/1.png", str(disk / "1.png"), "1.png"):
        path = folder_with(tmp_path / "set", row(image=name))
        (task,) = load_task_files([path], image_roots=[tmp_path / "other", disk])
        assert (task.images[0].width, task.images[0].height) == (3, 5)
        if name != "1.png":
            with pytest.raises(DataError, match=r"leads out .* folder in data\.image_roots"):
                load_tasks(path)
    (tmp_path / "secret.png").write_bytes(encoded())
    with pytest.raises(DataError, match="leads out of the data folder"):
        load_task_files(
            [folder_with(tmp_path / "set", row(image="../secret.png"))], image_roots=[disk]
        )


def test_a_given_root_replaces_the_folder_of_the_file(tmp_path: Path) -> None:
    path = folder_with(tmp_path, row(image="other.png"))
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "other.png").write_bytes(encoded(size=(3, 5)))
    (task,) = load_tasks(path, root=tmp_path / "pictures")
    assert (task.images[0].width, task.images[0].height) == (3, 5)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_the_three_formats_are_read_with_their_size(format: str) -> None:
    image = read_image(encoded(format, (33, 17)), where="here")
    assert (image.width, image.height) == (33, 17)


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF", "PPM"])
def test_other_formats_are_refused(format: str) -> None:
    with pytest.raises(DataError, match=r"here: not a readable picture .* PNG, JPEG, WEBP"):
        read_image(encoded(format), where="here")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_a_truncated_picture_is_found_when_it_is_read(format: str) -> None:
    whole = encoded(format, (200, 200))
    with pytest.raises(DataError, match="not a readable picture"):
        read_image(whole[: len(whole) - len(whole) // 3], where="here")


def test_limits_hold_exactly() -> None:
    data = encoded(size=(10, 10))
    read_image(data, where="", limits=ImageLimits(max_bytes=len(data), max_pixels=100))
    with pytest.raises(DataError, match="at most 99 pixels"):
        read_image(data, where="", limits=ImageLimits(max_pixels=99))
    with pytest.raises(DataError, match=f"of {len(data)} bytes"):
        read_image(data, where="", limits=ImageLimits(max_bytes=len(data) - 1))


def test_a_damaged_picture_of_exactly_the_largest_size_is_found() -> None:
    data = encoded(size=(10, 10))[:-20]
    with pytest.raises(DataError, match="not a readable picture"):
        read_image(data, where="", limits=ImageLimits(max_pixels=100))


def test_a_file_over_the_byte_limit_is_not_read_whole(tmp_path: Path) -> None:
    path = folder_with(tmp_path, row())
    (tmp_path / "tower.png").write_bytes(encoded() + b"\0" * 5000)
    with pytest.raises(DataError, match="picture of 1001 bytes; at most 1000"):
        load_tasks(path, limits=ImageLimits(max_bytes=1000))


def test_written_tasks_are_read_back_equal(tmp_path: Path) -> None:
    red, blue = (read_image(encoded(colour=name), where="") for name in ("red", "blue"))
    photo = read_image(encoded("JPEG"), where="")
    tasks = [
        Task(id="a", question="Ünïcode\n\u2028?", images=(red, blue), answers=("x",)),
        Task(id="b", question="q", images=(red,), answers=("y", "z"), metadata={"hops": [1]}),
        Task(id="c", question="q", images=(photo,), answers=("n",), source="s"),
        Task(id="d", question="q", images=(), answers=("n",)),
    ]
    write_tasks(tmp_path / "out" / "train.jsonl", tasks)
    assert load_tasks(tmp_path / "out" / "train.jsonl") == tasks
    stored = {path.name for path in (tmp_path / "out" / "images").iterdir()}
    assert stored == {f"{red.sha256}.png", f"{blue.sha256}.png", f"{photo.sha256}.jpg"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"images", "train.jsonl"}


@pytest.mark.parametrize(
    "task",
    [
        Task(id="a", question=" q", images=(), answers=("x",)),
        Task(id="a", question="<image> q", images=(), answers=("x",)),
        Task(id="a", question="q", images=(), answers=()),
        Task(id="", question="q", images=(), answers=("x",)),
        Task(id="a", question="q", images=(), answers=("x",), metadata={"image": 1}),
        Task(id="a", question="q", images=(), answers=("x",), metadata={"x": object()}),
    ],
)
def test_a_task_that_would_not_be_read_back_is_not_written(tmp_path: Path, task: Task) -> None:
    with pytest.raises(DataError, match="task "):
        write_tasks(tmp_path / "t.jsonl", [task])
    assert not (tmp_path / "t.jsonl").exists()


def test_the_fingerprint_sees_question_answers_pictures_and_order(tmp_path: Path) -> None:
    def of(*rows: dict[str, Any]) -> str:
        return fingerprint(load_tasks(folder_with(tmp_path, *rows)))

    base = of(row(), row(id="q2"))
    assert base == of(row(), row(id="q2"))
    others = [
        of(row(id="q2"), row()),
        of(row(prompt=asked("What?")), row(id="q2")),
        of(row(reward_model={"ground_truth": "Eve"}), row(id="q2")),
        of(row(image=None, prompt=asked("Who built this?")), row(id="q2")),
    ]
    assert len({base, *others}) == 5


def test_format_is_told_from_the_ending_or_said_outright(tmp_path: Path) -> None:
    path = folder_with(tmp_path, row()).rename(tmp_path / "tasks.txt")
    with pytest.raises(DataError, match=r"cannot tell the task format from the ending '\.txt'"):
        load_tasks(path)
    assert len(load_tasks(path, format="native")) == 1
    with pytest.raises(DataError, match="unknown task format 'csv'"):
        load_tasks(path, format="csv")


def test_endings_are_read_in_capitals_and_a_list_of_rows_in_json(tmp_path: Path) -> None:
    path = folder_with(tmp_path, row()).rename(tmp_path / "tasks.JSONL")
    assert len(load_tasks(path)) == 1
    array = tmp_path / "tasks.json"
    array.write_text(json.dumps([row(), row(id="q2")]))
    assert [task.id for task in load_tasks(array)] == ["q1", "q2"]
    array.write_text(json.dumps([row(), row(id=None), 3]))
    with pytest.raises(DataError, match=r"item 1: field 'id'(.|\n)*item 2: found 3; wanted an obj"):
        load_tasks(array)


def test_a_folder_stands_for_its_one_file_or_for_the_shards_of_one_split(tmp_path: Path) -> None:
    def shard(split: str, number: int) -> None:
        path = folder_with(tmp_path, row(id=f"{split}{number}"))
        path.rename(tmp_path / f"{split}-{number:05d}-of-00002.jsonl")

    with pytest.raises(DataError, match="found no task file; wanted one task file"):
        load_tasks(tmp_path)
    shard("train", 1)
    assert [task.id for task in load_tasks(tmp_path)] == ["train1"]
    shard("train", 0)
    assert [task.id for task in load_tasks(tmp_path)] == ["train0", "train1"]
    shard("test", 0)
    with pytest.raises(DataError, match="wanted one task file, or the shards of one split"):
        load_tasks(tmp_path)
    (tmp_path / "train-00000-of-00002.jsonl").unlink()
    (tmp_path / "train-00001-of-00002.jsonl").rename(tmp_path / "test-00002-of-00002.jsonl")
    with pytest.raises(DataError, match=r"found 2 of 2 shards .*; wanted them all"):
        load_tasks(tmp_path)


def test_an_empty_or_absent_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"empty\.jsonl: found no task"):
        load_tasks(tmp_path / "empty.jsonl")
    with pytest.raises(DataError, match=r"absent\.jsonl: cannot be read"):
        load_tasks(tmp_path / "absent.jsonl")


def test_several_files_are_read_in_order_and_may_not_share_an_id(tmp_path: Path) -> None:
    for name, ids in (("a", ("q1", "q2")), ("b", ("q3",)), ("c", ("q2",))):
        (tmp_path / name).mkdir()
        folder_with(tmp_path / name, *(row(id=identifier) for identifier in ids))
    files = [tmp_path / name / "tasks.jsonl" for name in "abc"]
    assert [task.id for task in load_task_files(files[:2])] == ["q1", "q2", "q3"]
    with pytest.raises(DataError, match=r"c/tasks\.jsonl:1: id 'q2' was used before, at .*/a/tas"):
        load_task_files(files)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


@BOUNDED
@given(name=st.sampled_from(sorted(row())), value=JSON_VALUES)
def test_any_json_in_any_field_gives_tasks_or_a_data_error(
    tmp_path: Path, name: str, value: Any
) -> None:
    path = folder_with(tmp_path, {**row(), name: value})
    try:
        (task,) = load_tasks(path)
    except DataError as error:
        assert "tasks.jsonl:1" in str(error)
    else:
        write_tasks(tmp_path / "again.jsonl", [task])
        assert load_tasks(tmp_path / "again.jsonl") == [task]


@BOUNDED
@given(data=st.binary(max_size=60), format=st.sampled_from(["native", "fvqa", "livevqa"]))
def test_any_bytes_as_a_file_give_a_data_error(tmp_path: Path, data: bytes, format: str) -> None:
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(DataError, match="file"):
        load_tasks(tmp_path / "file", format=format)


@BOUNDED
@given(
    format=st.sampled_from(["PNG", "JPEG", "WEBP"]),
    place=st.floats(0, 1),
    patch=st.binary(min_size=1, max_size=6),
)
def test_any_damage_to_a_picture_is_read_or_a_data_error(
    format: str, place: float, patch: bytes
) -> None:
    data = bytearray(encoded(format, (40, 30)))
    start = int(place * len(data))
    data[start : start + len(patch)] = patch
    try:
        assert read_image(bytes(data), where="here").width > 0
    except DataError as error:
        assert str(error).startswith("here: ")
