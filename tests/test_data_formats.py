"""Files in the exact form each benchmark is published in, and pictures that stay where they are."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import pickle
import threading
import tracemalloc
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as Pillow

from tapo_train.__main__ import main
from tapo_train.data.check import check_files
from tapo_train.data.formats import BY_NAME, FORMATS
from tapo_train.data.intake import Intake
from tapo_train.data.sealed import CANARY_VARIABLE, require_open
from tapo_train.data.stored import Share, StoredImage
from tapo_train.data.tasks import load_tasks, write_tasks
from tapo_train.errors import DataError
from tapo_train.recipe.run import Data


def picture(colour: str = "red", size: tuple[int, int] = (12, 8), format: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Pillow.new("RGB", size, colour).save(stream, format)
    return stream.getvalue()


RED, BLUE = picture("red"), picture("blue", (9, 7), "JPEG")
CANARY = "MMSearch-Plus"


def text_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def closed(text: str) -> str:
    """As the authors of MMSearch-Plus close a text."""
    key = cycle(hashlib.sha256(CANARY.encode()).digest())
    return text_of(bytes(a ^ b for a, b in zip(text.encode(), key, strict=False)))


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return path


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def listed(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return path


def vision_deepresearch(folder: Path) -> Path:
    packed = [{"filename": "a.png", "data": text_of(RED)}, {"filename": "b", "data": text_of(BLUE)}]
    row = {"question": "<image>Who?", "answer": "Ed", "images": ["a.png"]}
    return parquet(folder / "fvqa_300.parquet", [{**row, "image_packed": json.dumps(packed)}])


def mmsearch(folder: Path) -> Path:
    row = {
        "sample_id": "0",
        "query": "Who won?",
        "query_image": {"bytes": RED, "path": "a.png"},
        "image_search_result": {"bytes": BLUE, "path": "b.png"},
        "gt_requery": "winner",
        "gt_answer": "Ed",
        "alternative_gt_answers": ["Edward", "Ed"],
        "area": "news",
        "subfield": "sports",
    }
    return parquet(
        folder / "end2end.parquet", [row, {**row, "sample_id": "1", "query_image": None}]
    )


def mmsearch_plus(folder: Path) -> Path:
    row = {"question": closed("Qui? é"), "answer": [closed("Ed"), closed("Edward")]}
    pictures = {"img_1": {"bytes": RED, "path": None}, "img_2": {"bytes": BLUE, "path": None}}
    rest = {"img_3": None, "img_4": None, "img_5": None, "video_url": closed("x"), "category": "c"}
    return parquet(folder / "train.parquet", [{**row, **pictures, **rest, "arxiv_id": closed("y")}])


def infoseek(folder: Path) -> Path:
    (folder / "oven_01963180.JPEG").write_bytes(RED)
    row = {"image_id": "oven_01963180", "question": "How?", "answer": ["12"]}
    jsonl(
        folder / "infoseek_val_qtype.jsonl",
        [
            {"data_id": "v0", "question_type": "Numerical"},
            {"data_id": "v1", "question_type": "String"},
        ],
    )
    withkb = [{"data_id": "v1", "entity_id": "Q1", "entity_text": "an entity"}]
    jsonl(folder / "infoseek_val_withkb.jsonl", withkb)
    number = {"answer_eval": [{"wikidata": 12.0, "range": [10.8, 13.2]}]}
    text = {"answer_eval": ["Ed", "Edward"]}
    split = {"data_split": "val_unseen_question"}
    return jsonl(
        folder / "infoseek_val.jsonl",
        [{"data_id": "v0", **row, **number, **split}, {"data_id": "v1", **row, **text, **split}],
    )


def simplevqa(folder: Path) -> Path:
    row = {
        "data_id": 0,
        "image": text_of(RED),
        "image_description": "red",
        "language": "EN",
        "question": "Who?",
        "answer": "Ed",
        "original_category": "people",
        "source": "web",
        "atomic_question": "?",
        "atomic_fact": "Ed",
        "vqa_category": "entity",
    }
    return parquet(folder / "test.parquet", [row])


def mat_search(folder: Path) -> Path:
    (folder / "MAT-Search-image").mkdir()
    (folder / "MAT-Search-image" / "0.jpg").write_bytes(RED)
    row = {"id": 0, "question": "Who?", "answer": "Ed", "image_path": "0.jpg"}
    return listed(folder / "MAT-Search.json", [row])


def hr_mmsearch(folder: Path) -> Path:
    (folder / "a.png").write_bytes(RED)
    row = {"sample_id": "h1", "query": "Who?", "query_image": "a.png", "ground_truth": "Ed"}
    return jsonl(folder / "hr.jsonl", [{**row, "difficulty": "hard", "category": "sports"}])


def livevqa_preview(folder: Path) -> Path:
    (folder / "image").mkdir()
    (folder / "image" / "0.jpg").write_bytes(RED)
    row = {"sample_id": "s", "query": "Who?", "query_image": "image/0.jpg", "gt_answer": "Ed"}
    return listed(folder / "qa_detailed.json", [{**row, "topic": "news", "context": "c"}])


def vistahop(folder: Path) -> Path:
    """Its evaluator reads the native form."""
    (folder / "a.png").write_bytes(RED)
    row = {"prompt": [{"role": "user", "content": "<image>\nWho?"}], "image": ["a.png"], "id": "0"}
    truth = {"reward_model": {"ground_truth": ["Ed"], "style": "rule"}, "data_source": "vistahop"}
    return jsonl(folder / "vistahop.jsonl", [{**row, **truth}])


def browsecomp_vl(folder: Path) -> Path:
    (folder / "p.jpg").write_bytes(RED)
    row = {"prompt": "Who?", "file_path": "https://host.example/x/p.jpg?w=3", "answers": ["Ed"]}
    rest = {"question_id": "b0", "task": "bcvl", "tags": [], "lang": "en", "source": "web"}
    return jsonl(folder / "bcvl.jsonl", [{**row, **rest}])


def text_qa(folder: Path) -> Path:
    rows = [{"id": "train_0", "question": "Who?", "golden_answers": ["Ed"], "metadata": {"a": [1]}}]
    return jsonl(folder / "nq.jsonl", rows)


def text_qa_parquet(folder: Path) -> Path:
    return parquet(
        folder / "hotpotqa.parquet",
        [
            {
                "id": "dev_0",
                "question": "Who?",
                "golden_answers": ["Ed"],
                "data_source": "hotpotqa",
                "prompt": [{"role": "user", "content": "Answer the given question. … Who?"}],
                "ability": "fact-reasoning",
                "reward_model": {"ground_truth": {"target": ["Ed"]}, "style": "rule"},
                "extra_info": {"index": 0, "split": "dev"},
            }
        ],
    )


def bird(folder: Path) -> Path:
    row = {"question_id": 3, "db_id": "schools", "question": "How many?", "evidence": "count"}
    return listed(folder / "dev.json", [{**row, "SQL": "SELECT 1", "difficulty": "simple"}])


def spider(folder: Path) -> Path:
    row = {"db_id": "concert", "question": "How many?", "query": "SELECT 1", "query_toks": ["S"]}
    return listed(folder / "dev.json", [{**row, "sql": {"from": {"conds": []}}}])


ONE = (RED,)
PUBLISHED: dict[
    Callable[[Path], Path], tuple[str, str, str, tuple[str, ...], tuple[bytes, ...]]
] = {
    vision_deepresearch: ("vision_deepresearch", "fvqa_300_0", "Who?", ("Ed",), (RED, BLUE)),
    mmsearch: ("mmsearch", "0", "Who won?", ("Ed", "Edward"), ONE),
    mmsearch_plus: ("mmsearch_plus", "train_0", "Qui? é", ("Ed", "Edward"), (RED, BLUE)),
    infoseek: ("infoseek", "v0", "How?", ("10.8 - 13.2",), ONE),
    simplevqa: ("simplevqa", "0", "Who?", ("Ed",), ONE),
    mat_search: ("mat_search", "0", "Who?", ("Ed",), ONE),
    hr_mmsearch: ("hr_mmsearch", "h1", "Who?", ("Ed",), ONE),
    livevqa_preview: ("livevqa", "s", "Who?", ("Ed",), ONE),
    vistahop: ("vistahop", "0", "Who?", ("Ed",), ONE),
    browsecomp_vl: ("browsecomp_vl", "b0", "Who?", ("Ed",), ONE),
    text_qa: ("text_qa", "train_0", "Who?", ("Ed",), ()),
    text_qa_parquet: ("hotpotqa", "dev_0", "Who?", ("Ed",), ()),
    bird: ("bird", "3", "How many?\nHint: count", ("SELECT 1",), ()),
    spider: ("spider", "dev_0", "How many?", ("SELECT 1",), ()),
}


@pytest.fixture(autouse=True)
def _canary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CANARY_VARIABLE, CANARY)


@pytest.mark.parametrize("write", PUBLISHED, ids=lambda write: write.__name__)
def test_a_file_in_its_published_form_is_told_apart_and_read(
    tmp_path: Path, write: Callable[[Path], Path]
) -> None:
    source, identifier, question, answers, pictures = PUBLISHED[write]
    first, *_ = load_tasks(write(tmp_path))
    assert (first.source, first.id, first.question, first.answers) == (
        source,
        identifier,
        question,
        answers,
    )
    assert tuple(image.data for image in first.images) == pictures
    if "sealed" not in first.metadata:
        write_tasks(tmp_path / "native" / "t.jsonl", [first])
        assert load_tasks(tmp_path / "native" / "t.jsonl") == [first]


def test_the_files_beside_an_infoseek_file_say_more_about_its_rows(tmp_path: Path) -> None:
    path = infoseek(tmp_path)
    first, second = load_tasks(path)
    assert first.metadata["question_type"] == "Numerical" and "entity_id" not in first.metadata
    assert (second.answers, second.metadata["entity_id"]) == (("Ed", "Edward"), "Q1")
    jsonl(tmp_path / "infoseek_val_withkb.jsonl", [{"data_id": n} for n in ("v1", "v0")])
    with pytest.raises(DataError, match=r"withkb\.jsonl: data_id 'v0' did not come"):
        load_tasks(path)


def test_an_encrypted_benchmark_is_read_in_memory_and_neither_written_nor_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = mmsearch_plus(tmp_path)
    tasks = load_tasks(path)
    assert set(tasks[0].metadata) == {"sealed", "category", "metric"}
    with pytest.raises(DataError, match="wanted no plain copy of it"):
        write_tasks(tmp_path / "plain.jsonl", tasks)
    with pytest.raises(DataError, match="wanted no training on it"):
        require_open(tasks, doing="training on it")
    assert [file.name for file in tmp_path.iterdir()] == ["train.parquet"]
    monkeypatch.setenv(CANARY_VARIABLE, "another")
    with pytest.raises(DataError, match="cannot be decrypted"):
        load_tasks(path)
    monkeypatch.delenv(CANARY_VARIABLE)
    with pytest.raises(
        DataError, match=f"wanted its canary in the environment variable {CANARY_VARIABLE}"
    ):
        load_tasks(path)


@pytest.mark.parametrize(
    "row",
    [
        {"problem": "q", "answer": "a", "canary": "c"},  # BrowseComp's and MM-BrowseComp's
        {"query_id": "1", "query": "q", "gold_docs": []},  # BrowseComp-Plus
        {"image_id": 1, "caption": "c"},
    ],
)
def test_a_file_of_another_form_is_refused_with_the_columns_of_those_that_are_known(
    tmp_path: Path, row: dict[str, Any]
) -> None:
    for path in (jsonl(tmp_path / "a.jsonl", [row]), listed(tmp_path / "a.json", [row])):
        with pytest.raises(DataError, match="of no known form; wanted those") as caught:
            load_tasks(path)
        for format in FORMATS:
            assert f"{format.name}: {', '.join(format.columns)}" in str(caught.value)
        assert f"columns {', '.join(row)}" in str(caught.value)


def test_the_recipe_knows_every_format() -> None:
    assert set(get_args(get_type_hints(Data)["format"])) == {"auto", *BY_NAME}


def test_a_picture_is_read_when_it_is_looked_at_and_must_not_have_changed(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(RED)
    path = vistahop(tmp_path)
    (task,) = load_tasks(path)
    (image,) = task.images
    assert isinstance(image, StoredImage)
    assert (image.width, image.height) == (12, 8)
    (tmp_path / "a.png").write_bytes(BLUE)
    with pytest.raises(DataError, match="has changed since the start"):
        _ = image.data
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match="is not a file"):
        _ = image.data
    (tmp_path / "a.png").write_bytes(RED)
    elsewhere = pickle.loads(pickle.dumps(image))
    assert elsewhere == image and elsewhere.data == RED


def test_readers_open_a_share_of_the_pictures_each_and_all_learn_what_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = []
    for number in range(6):
        data = picture(size=(10 + number, 8)) if number != 3 else b"damaged"
        rows.append(
            {
                "sample_id": str(number),
                "query": "q",
                "query_image": {"bytes": data, "path": None},
                "gt_requery": "",
                "gt_answer": "a",
            }
        )
    path = parquet(tmp_path / "e.parquet", rows)
    opened: list[str] = []
    real = Pillow.open
    monkeypatch.setattr(
        Pillow,
        "open",
        lambda *a, **k: (opened.append(threading.current_thread().name), real(*a, **k))[1],
    )
    said: list[dict[int, Any]] = [{}, {}]
    barrier = threading.Barrier(2, timeout=30)
    got: dict[int, Any] = {}

    def read(rank: int) -> None:
        def gather(found: dict[int, Any]) -> list[dict[int, Any]]:
            said[rank] = found
            barrier.wait()
            return said

        intake = Intake(drop=True)
        tasks = load_tasks(path, intake=intake, share=Share(rank, 2, gather))
        got[rank] = ([(task.id, task.images[0].width) for task in tasks], intake.problems)

    threads = [threading.Thread(target=read, args=(rank,), name=str(rank)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got[0] == got[1]
    assert got[0][0] == [(str(n), 10 + n) for n in (0, 1, 2, 4, 5)]
    assert "row 3: query_image[0]: not a readable picture" in got[0][1][0]
    assert set(said[0]) == {0, 2, 4} and set(said[1]) == {1, 3, 5}
    assert opened.count("0") == 6 and opened.count("1") == 5  # a PNG is opened twice, a wreck once


def test_memory_does_not_grow_with_the_pictures_of_a_file(tmp_path: Path) -> None:
    def row(number: int) -> dict[str, Any]:
        stream = io.BytesIO()
        noise = number.to_bytes(1) + os.urandom(600 * 500 * 3 - 1)
        Pillow.frombytes("RGB", (600, 500), noise).save(stream, "PNG", compress_level=0)
        packed = [{"filename": "x", "data": text_of(stream.getvalue())}]
        return {"question": "q", "answer": "a", "image_packed": json.dumps(packed)}

    path = parquet(tmp_path / "big.parquet", [row(number) for number in range(12)])
    tracemalloc.start()
    tasks = load_tasks(path)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert path.stat().st_size > 12 * 600 * 500 * 3 > 10 * held
    assert len(tasks[7].images[0].data) > 600 * 500 * 3


def spoiled(folder: Path) -> Path:
    """Ten rows with one fault of each kind."""
    (folder / "a.png").write_bytes(RED)
    (folder / "b.png").write_bytes(BLUE)
    (folder / "cut.png").write_bytes(RED[:40])
    Pillow.new("1", (8001, 8000)).save(folder / "long.png")

    def row(id: str, image: str | None = "a.png", **more: Any) -> dict[str, Any]:
        own = {"prompt": f"Who is {id}?", "reward_model": {"ground_truth": "Ed"}}
        return {"id": id, **own, **({"image": image} if image else {}), **more}

    rows = [row("1"), row("2", "b.png"), row("3", None), row("1", None), row("5", "gone.png")]
    rows += [row("6", "cut.png"), row("7", "long.png"), row("8", reward_model={"ground_truth": ""})]
    return jsonl(folder / "train.jsonl", [*rows, row("9", prompt=""), row("10", None)])


def test_a_check_counts_every_kind_of_fault_and_what_is_shared_with_the_test_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = spoiled(tmp_path)
    other = {"prompt": "Another", "reward_model": {"ground_truth": "x"}}
    test = jsonl(
        tmp_path / "test.jsonl",
        [{"id": "t1", "image": "b.png", **other}, {"id": "t2", **other, "prompt": "WHO is  10? "}],
    )
    found = check_files([path], against=[test])
    assert (found.rows, found.tasks) == (10, 5)
    assert found.counts == {
        "missing picture": 1,
        "unreadable picture": 1,
        "oversized picture": 1,
        "no answer": 1,
        "other": 1,
        "duplicate id": 1,
        "picture of a test task": 1,
        "same question and pictures as a test task": 1,
    }
    assert main(["data", "check", str(path)]) == 1
    said = capsys.readouterr().out
    assert "10 rows, 5 tasks that can be used" in said and "train.jsonl:5: picture 'gone" in said
    assert main(["data", "check", str(test)]) == 0


def test_published_files_are_prepared_as_native_ones_row_by_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed, plain = vision_deepresearch(tmp_path), text_qa(tmp_path)
    out = tmp_path / "native" / "all.jsonl"
    assert main(["data", "prepare", str(packed), str(plain), "--out", str(out)]) == 0
    assert load_tasks(out) == [*load_tasks(packed), *load_tasks(plain)]
    assert len(list((tmp_path / "native" / "images").iterdir())) == 2
    (tmp_path / "closed").mkdir()
    assert (
        main(["data", "prepare", str(mmsearch_plus(tmp_path / "closed")), "--out", str(out)]) == 2
    )
    assert "wanted no plain copy" in capsys.readouterr().err
    assert load_tasks(out) and not out.with_name("all.jsonl.partial").exists()
