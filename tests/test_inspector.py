"""Pages of a run: reasons in words, data that can become nothing but text, and what is refused."""

from __future__ import annotations

import http.client
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inspected_run import HOSTILE, PICTURE, call, four_attempts, row_of, view, write_run
from loopback import threaded

from tapo_train.__main__ import main
from tapo_train.credit.assigners import Tapo
from tapo_train.credit.options import TapoOptions
from tapo_train.credit.reasons import explain
from tapo_train.credit.rollout_file import read_rollouts
from tapo_train.credit.steps import CreditCall, CreditRow, CreditStep
from tapo_train.inspector.pieces import Pieces
from tapo_train.inspector.run_pages import write_pages
from tapo_train.inspector.serve import page_server

DUMP = Path("tokens") / "step_000000.jsonl"
SCORES = Path("scores") / "step_000000.jsonl"


def data(out: Path, key: str) -> Any:
    """What a page's data file hands over."""
    text = (out / "data" / f"{key}.js").read_text()
    start = f'tapo.put("{key}",'
    assert text.startswith(start) and text.endswith(");\n")
    return json.loads(text[len(start) : -3])


def row(name: str, advantage: float, correct: float, *calls: CreditCall, **other: Any) -> CreditRow:
    """A trajectory with one call per turn."""
    steps = tuple(CreditStep(turn=i, calls=(made,)) for i, made in enumerate(calls))
    return CreditRow(
        id=name,
        group="q",
        correct=correct,
        advantage=advantage,
        num_turns=len(steps) + 1,
        steps=steps,
        **other,
    )


def search(query: str, **other: Any) -> CreditCall:
    """A text search."""
    return CreditCall(name="text_search_tool", arguments={"query": query}, **other)


TAUGHT = [row(f"s{i}", 1.0, 1.0, search("anna house")) for i in range(2)]
OTHERS = [row(f"t{i}", 1.0, 1.0, search("red car")) for i in range(3)]
LONELY = row("s9", 1.0, 1.0, search("blue boat"))


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([*TAUGHT, row("f", -1.0, 0.0, search("anna house"))], "asked for the same"),
        ([*TAUGHT, row("f", -1.0, 0.0, search("weather"))], "too far .*: 0.00 < 0.50"),
        (
            [*TAUGHT, *OTHERS, LONELY, row("f", -1.0, 0.0, search("blue boat"))],
            r"too rare .* similarity × support 0.17 < 0.25",
        ),
        ([row("f", -1.0, 0.0, search("anna"))], "no attempt at this question succeeded"),
        (
            [*TAUGHT, row("f", -1.0, 0.0, CreditCall(name="other", arguments={"x": 1}))],
            "no successful attempt used other",
        ),
        ([*TAUGHT, row("f", -1.0, 0.0, search("anna house", executed=False))], "not executed"),
        ([*TAUGHT, row("f", -1.0, 0.0, search("anna house", valid=False))], "could not be read"),
        (
            [*TAUGHT, row("f", -1.0, 0.0, search("anna house", status="model_error"))],
            "ended in model_error",
        ),
        ([*TAUGHT, row("f", 0.0, 0.0, search("anna house"))], "advantage is 0"),
        ([*TAUGHT, row("f", 1.0, 0.0, search("anna house"))], "answer is wrong .* above 0"),
        ([*TAUGHT, row("f", -1.0, 1.0, search("anna house"))], "answer is right .* below 0"),
        ([*TAUGHT], "the attempt succeeded"),
        (
            [*TAUGHT, row("f", -1.0, 0.0, search("anna house"), discarded=True)],
            "failed outside the policy",
        ),
    ],
)
def test_a_reason_names_the_rule_that_decided(rows: list[CreditRow], why: str) -> None:
    reason = explain(rows, TapoOptions())[-1][0].calls[0]
    assert re.search(why, reason.why), reason.why
    assert reason.corrected == (why == "asked for the same")


def test_a_corrected_step_says_by_how_much_and_whose_calls_justify_it() -> None:
    rows = [*TAUGHT, row("f", -0.5, 0.0, search("anna house"))]
    (step,) = explain(rows, TapoOptions())[2]
    assert (step.before, step.after, step.transfer, step.clipped) == (-0.5, 0.0, 1.0, True)
    (reason,) = step.calls
    assert (reason.similarity, reason.support, reason.reference_advantage) == (1.0, 1.0, 1.0)
    assert reason.theta == 0.5
    assert [(held.row, held.turn, held.call) for held in reason.cluster] == [(0, 0, 0), (1, 0, 0)]


def test_reasons_end_in_the_advantages_of_the_credit_stage() -> None:
    numbers = np.random.default_rng(5)
    words = ["anna", "house", "boat", "red"]
    rows = []
    for i in range(60):
        correct = float(numbers.integers(2))
        query = " ".join(numbers.choice(words, 2))
        calls = [search(query), search(" ".join(numbers.choice(words, 2)))]
        rows.append(row(f"r{i}", (2 * correct - 1) * float(numbers.random()), correct, *calls))
    stage = Tapo(TapoOptions())(rows)
    corrected = 0
    for held, after, reasons in zip(
        rows, stage.step_advantages, explain(rows, TapoOptions()), strict=True
    ):
        assert [reason.after for reason in reasons] == after[:2].tolist()
        corrected += sum(reason.after != held.advantage for reason in reasons)
    assert corrected > 5


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write_run(tmp_path_factory.mktemp("inspected") / "run", [four_attempts()])
    assert main(["inspect", str(run)]) == 0
    return run / "inspect"


def test_the_pages_say_what_the_dump_says(pages: Path) -> None:
    (line,) = data(pages, "run")["steps"]
    assert (line["number"], line["questions"], line["attempts"], line["right"]) == (1, 1, 4, 2)
    assert (line["failing"], line["corrected_attempts"], line["cut"]) == (2, 1, 2)
    question = data(pages, "step_000000/q_0000")
    same = question["attempts"][2]
    assert [turn["advantage"] for turn in same["turns"]] == [0.0, 0.0, -0.5]
    (reason,) = same["turns"][1]["reason"]["calls"]
    assert reason["why"] == "successful attempts asked for the same"
    assert [(ref["attempt"], ref["turn"]) for ref in reason["cluster"]] == [(0, 1), (1, 1)]
    assert "too far" in question["attempts"][3]["turns"][0]["reason"]["calls"][0]["why"]


def test_scores_are_those_of_any_rank_and_may_be_missing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [four_attempts()])
    first, second, *_ = (run / SCORES).read_text().splitlines()
    (run / SCORES).write_text(first + "\n")
    (run / DUMP).with_name("step_000000.rank_1.jsonl").touch()
    (run / SCORES).with_name("step_000000.rank_1.jsonl").write_text(second + "\n")
    write_pages(run, tmp_path / "out")
    attempts = data(tmp_path / "out", "step_000000/q_0000")["attempts"]
    assert attempts[0]["turns"][1]["scores"]["entropy"] == [0.5, 0.625]
    assert attempts[1]["turns"][0]["scores"]["ratio"] == [1.0, 1.002]
    assert attempts[2]["turns"][0]["scores"] is None
    assert attempts[0]["turns"][0]["versions"] == [[0, 1, 2], [1, 2, 3]]
    assert attempts[0]["turns"][1]["versions"] == [[0, 2, 3]]


def test_a_reference_is_counted_among_all_attempts_also_those_left_out(tmp_path: Path) -> None:
    attempts = four_attempts()
    run = write_run(tmp_path / "run", [attempts])
    rows = [row_of(held) for held in attempts[1:]]
    lines = "".join(json.dumps(held) + "\n" for held in rows)
    (run / "rollouts" / "step_000000.jsonl").write_text(lines)
    write_pages(run, tmp_path / "out")
    question = data(tmp_path / "out", "step_000000/q_0000")
    assert question["attempts"][0]["left_out"]
    (reason,) = question["attempts"][2]["turns"][1]["reason"]["calls"]
    assert [held["attempt"] for held in reason["cluster"]] == [1]


def test_no_text_of_a_dump_can_end_a_script(pages: Path) -> None:
    for path in pages.rglob("*.js"):
        if path.parent.name != "inspect":
            assert "<" not in path.read_text() and path.read_text().isascii()
    assert data(pages, "step_000000/q_0000")["attempts"][3]["answer"] == HOSTILE


def test_only_pictures_that_dumps_can_name_are_taken_over(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    odd = four_attempts()
    odd[0]["images"][0]["file"] = "../../secret.png"
    odd[1]["images"][0]["file"] = ["x"]
    linked = "ef" * 32 + ".png"
    odd[2]["images"][0]["file"] = linked
    run = write_run(tmp_path / "run", [odd])
    (run / "images" / linked).symlink_to(secret)
    write_pages(run, tmp_path / "out")
    taken = sorted(path.name for path in (tmp_path / "out" / "images").iterdir())
    assert taken == [f"{PICTURE}.png", f"{'cd' * 32}.png"]


def test_rows_of_any_framework_become_pages(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row_of(held)) + "\n" for held in four_attempts()))
    assert main(["inspect", str(path), "--out", str(tmp_path / "out")]) == 0
    question = data(tmp_path / "out", "step_000000/q_0000")
    assert [a["advantage"] for a in question["attempts"]] == [1.0, 1.0, -0.5, -1.5]
    assert question["attempts"][2]["turns"][1]["reason"]["calls"][0]["corrected"]
    assert question["attempts"][2]["corrected"] == 2
    assert len(read_rollouts(path).rows) == 4


def test_steps_that_are_written_stay_and_new_ones_are_added(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [four_attempts()])
    out = tmp_path / "out"
    assert write_pages(run, out) == 1
    first = (out / "data" / "step_000000.js").stat().st_mtime_ns
    write_run(run, [four_attempts(), four_attempts()])
    (run / "tokens" / "step_000000.jsonl").touch()
    assert write_pages(run, out, first=2) == 1
    assert write_pages(run, out) == 2
    assert [line["number"] for line in data(out, "run")["steps"]] == [1, 2]
    assert (out / "data" / "step_000000.js").stat().st_mtime_ns > first
    second = (out / "data" / "step_000001.js").stat().st_mtime_ns
    write_pages(run, out)
    assert (out / "data" / "step_000001.js").stat().st_mtime_ns == second


def test_another_credit_stage_is_said_and_given_no_reasons(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [four_attempts()])
    (run / "recipe.yaml").write_text("credit: {name: gigpo}\n")
    write_pages(run, tmp_path / "out")
    assert "credit=gigpo" in data(tmp_path / "out", "run")["notes"][0]
    turns = data(tmp_path / "out", "step_000000/q_0000")["attempts"][2]["turns"]
    assert all(turn["reason"] is None for turn in turns)


def test_a_library_of_the_whole_batch_is_said_and_given_no_reasons(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [four_attempts()], scope="batch")
    write_pages(run, tmp_path / "out")
    assert "credit.scope=batch" in data(tmp_path / "out", "run")["notes"][0]
    turns = data(tmp_path / "out", "step_000000/q_0000")["attempts"][2]["turns"]
    assert all(turn["reason"] is None for turn in turns)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda run: (run / "tokens" / "step_000000.jsonl").write_text("[]\n"),
            "line 1: found list",
        ),
        (
            lambda run: (run / "tokens" / "step_000000.jsonl").write_text('{"id": 1}\n'),
            "line 1: id is '1', wanted text",
        ),
        (lambda run: (run / "recipe.yaml").write_text("a: ["), "wanted the resolved recipe"),
        (
            lambda run: (run / "recipe.yaml").write_text("credit: {name: tapo, beta: x}"),
            "wanted the options of TAPO",
        ),
        (lambda run: (run / DUMP).unlink(), "has no dump"),
        (
            lambda run: (run / SCORES).write_text('{"id": "same", "logprobs": "<b>"}\n'),
            "line 1: logprobs is '<b>', wanted a list of numbers",
        ),
        (
            lambda run: (run / SCORES).write_text(
                '{"id": "same", "logprobs": [0], "ratio": [1], "entropy": [null]}\n'
            ),
            "scores of same: wanted 6 each",
        ),
    ],
)
def test_a_damaged_run_is_refused_in_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Any, message: str
) -> None:
    run = write_run(tmp_path / "run", [four_attempts()])
    damage(run)
    assert main(["inspect", str(run)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--steps", "5:2"], ["--steps", "x"]])
def test_steps_that_cannot_be_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    run = write_run(tmp_path / "run", [four_attempts()])
    assert main(["inspect", str(run), *arguments]) == 2
    assert "--steps" in capsys.readouterr().err


def test_pieces_are_the_text_token_by_token(tiny_qwen3_vl: Path) -> None:
    from transformers import AutoTokenizer

    text = "<think>né 東</think><|im_end|>"
    tokens = AutoTokenizer.from_pretrained(tiny_qwen3_vl)(text)["input_ids"]
    read = Pieces(tiny_qwen3_vl / "tokenizer.json")
    pieces = read([0, *tokens, 0], 1, len(tokens) + 1)
    assert len(pieces) == len(tokens)
    assert "".join(pieces) == text
    runs = Pieces(tiny_qwen3_vl / "tokenizer.json")(
        [[tokens[0], 5], *tokens[1:]], 5, 4 + len(tokens)
    )
    assert "".join(runs) == text.removeprefix(pieces[0])


def test_the_server_answers_the_loopback_alone_and_adds_steps(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [[view("a", advantage=0.0, accuracy=1.0, calls=[call("x")])]])
    out = tmp_path / "out"
    write_pages(run, out)
    with threaded(page_server(out, 0, lambda: write_pages(run, out))) as server:
        assert server.server_address[0] == "127.0.0.1"
        assert _get(server.server_port, "/index.html") == 200
        assert _get(server.server_port, "/data/run.js") == 200
        assert _get(server.server_port, "/data/") == 404
        assert _get(server.server_port, "/../recipe.yaml") == 404
        assert _get(server.server_port, "/index.html", host="elsewhere.example:80") == 421


def _get(port: int, path: str, host: str | None = None) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", path, headers={"Host": host or f"127.0.0.1:{port}"})
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status
