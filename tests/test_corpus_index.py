"""The text index: what it finds, in memory and on disk, and how a folder of it grows."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from tapo_train.__main__ import main
from tapo_train.errors import DataError
from tapo_train.tools.corpus import Passage, contents_of, read_passages, title_and_text
from tapo_train.tools.corpus_index import CorpusIndex, add_to_index, build_index, words_asked
from tapo_train.tools.text_search import TextSearchTool
from tapo_train.tools.words import spread


def passages(*texts: str) -> list[Passage]:
    return [Passage(id=str(number), title="", text=text) for number, text in enumerate(texts)]


def written(path: Path, *texts: str) -> Path:
    path.write_text("".join(json.dumps({"id": text[:9], "text": text}) + "\n" for text in texts))
    return path


def ids(index: CorpusIndex, query: str, *, top_k: int = 9) -> list[str]:
    return [passage.id for passage in index.search(query, top_k=top_k)]


TOWERS = CorpusIndex(
    [
        Passage(id="zh", title="埃菲尔铁塔", text="埃菲尔铁塔位于法国巴黎，高330米。"),
        Passage(id="zh2", title="东京塔", text="东京塔是日本东京的一座电波塔，高333米。"),
        Passage(id="ja", title="東京スカイツリー", text="東京にある電波塔で、634メートルです。"),
        Passage(id="ko", title="남산타워", text="남산타워는 서울특별시에 있는 탑이다."),
        Passage(id="th", title="หอไอเฟล", text="หอไอเฟลตั้งอยู่ในกรุงปารีส ประเทศฝรั่งเศส"),
        Passage(id="km", title="", text="ប្រាសាទអង្គរវត្តស្ថិតនៅខេត្តសៀមរាប"),
        Passage(id="en", title="Harbour Tower", text="Built in 1931, it is 634m high."),
        Passage(id="fr", title="", text="La Société des Cafés opened its towers."),
        Passage(id="hi", title="", text="कुतुब मीनार दिल्ली में है"),
    ]
)  # fmt: skip


@pytest.mark.parametrize(
    ("query", "first"),
    [
        ("埃菲尔铁塔的高度是多少", "zh"),
        ("东京塔有多高", "zh2"),
        ("東京スカイツリーの高さ", "ja"),
        ("634メートル", "ja"),
        ("ﾒｰﾄﾙ", "ja"),  # half width
        ("서울의 남산타워가 얼마나 높은가", "ko"),
        ("서울", "ko"),
        ("หอไอเฟลอยู่ที่ไหน", "th"),
        ("ប្រាសាទអង្គរ", "km"),
        ("harbour tower built", "en"),
        ("harbour", "en"),
        ("ＢＵＩＬＤ １９３１", "en"),  # full width
        ("societe cafe", "fr"),
        ("मीनार", "hi"),
    ],
)
def test_a_question_finds_its_passage_in_every_script(query: str, first: str) -> None:
    assert ids(TOWERS, query)[0] == first


def test_one_han_character_is_a_word_and_digits_beside_letters_are_their_own() -> None:
    assert set(ids(TOWERS, "塔")) == {"zh", "zh2", "ja"}
    assert ids(TOWERS, "高330米") == ["zh", "zh2"]
    assert ids(TOWERS, "330") == ["zh"]
    assert spread("高330米 and 铁塔们") == " 高 330 米  and  铁塔 塔们 铁 塔 们 "
    assert spread("铁塔") == " 铁塔 铁 塔 " and spread("塔") == " 塔 "
    assert spread("がもも x") == " がも もも  x", "pairs alone, composed"
    assert spread("The x1!") == "The x1!" and spread("é\ud83d") == "é?"


def test_english_words_are_found_by_their_stems_and_stop_words_only_when_alone() -> None:
    index = CorpusIndex(passages("the founding of towns", "to be or not to be", "a town's founder"))
    assert ids(index, "Towns") == ["0", "2"] and ids(index, "FOUNDED") == ["0"]
    assert words_asked("what is the town of the founders") == ["what", "town", "founder"]
    assert words_asked("मीनार don't") == ["मीनार", "don", "t"], "marks belong to their letters"
    assert ids(index, "not to be") == ["1"] and ids(index, "of the") == ["0"]


def bm25(tokens: list[list[str]], query: list[str]) -> list[float]:
    """Robertson's formula in Lucene's form, k1 1.2, b 0.75."""
    mean = sum(map(len, tokens)) / len(tokens)
    scores = [0.0] * len(tokens)
    for word in set(query):
        holding = sum(word in document for document in tokens)
        rarity = math.log(1 + (len(tokens) - holding + 0.5) / (holding + 0.5))
        for place, document in enumerate(tokens):
            count = document.count(word)
            norm = 1.2 * (1 - 0.75 + 0.75 * len(document) / mean)
            scores[place] += rarity * count * 2.2 / (count + norm)
    return scores


def test_scores_are_bm25_and_equal_ones_come_in_the_order_of_the_corpus(tmp_path: Path) -> None:
    rng = random.Random(5)
    words = ["kafo", "melu", "nito", "pabe", "rudo", "sive"]
    texts = [" ".join(rng.choices(words, k=rng.randint(1, 9))) for _ in range(60)]
    folder = tmp_path / "index"
    build_index(folder, [written(tmp_path / "a.jsonl", *texts)])
    for query in ("kafo", "kafo sive", "sive melu melu nito"):
        exact = bm25([text.split() for text in texts], query.split())
        order = sorted(range(60), key=lambda place: (-round(exact[place], 4), place))
        wanted = [place for place in order if exact[place] > 0]
        for index in (CorpusIndex(passages(*texts)), CorpusIndex.load(folder)):
            ranked = index.ranked(query, top_k=100)
            assert [passage.text for passage, _ in ranked] == [texts[place] for place in wanted]
            assert [score for _, score in ranked] == pytest.approx(
                [exact[place] for place in wanted], rel=1e-4
            )


ODD = (
    *("the's", 'what is "the', "(", "kafo AND", "-x", "title:kafo", "*", "kafo~2", "[a TO b]"),
    *("^", "/kafo/", "\x00", "\ud83d", "😀", "…", "kafo\n\nkafo", "<|im_end|>", "a" * 9000, "_"),
)


@pytest.mark.parametrize("query", ODD)
def test_nothing_in_a_query_is_syntax(query: str) -> None:
    index = CorpusIndex(passages("kafo melu", "nito"))
    assert ids(index, query) == (["0"] if "kafo" in query else [])


def test_a_long_query_is_read_as_far_as_its_256th_word() -> None:
    index = CorpusIndex(passages("w300", "w256", "w255"))
    assert ids(index, " ".join(f"w{number}" for number in range(400))) == ["2"]
    assert ids(index, "w0 " * 400 + "w300") == ["0"], "different words count"


def test_an_index_on_disk_grows_in_place_and_who_has_it_open_keeps_what_it_sees(
    tmp_path: Path,
) -> None:
    folder, first = tmp_path / "i", written(tmp_path / "a.jsonl", "kafo one", "nito")
    assert main(["index", "build", str(first), "--out", str(folder)]) == 0
    before = CorpusIndex.load(folder)
    assert before.digest == CorpusIndex.load(first).digest, "same passages, same version"
    second = written(tmp_path / "b.jsonl", "kafo one", "kafo two")
    assert main(["index", "add", str(folder), str(second)]) == 0
    after = CorpusIndex.load(folder)
    assert len(before) == 2 and ids(before, "kafo") == ["kafo one"]
    assert len(after) == 4 and ids(after, "kafo") == ["kafo one", "kafo one", "kafo two"]
    versions = {TextSearchTool(index).version for index in (before, after)}
    assert versions == {f"3 corpus={index.digest} top_k=3 max_chars=8192"
                        for index in (before, after)}  # fmt: skip
    assert len(versions) == 2
    with pytest.raises(DataError, match=r"2 passages of b\.jsonl are in it already"):
        add_to_index(folder, [second])
    written(tmp_path / "c.jsonl", "rudo").open("a").write("{")
    with pytest.raises(DataError, match=r"c\.jsonl:2"):
        add_to_index(folder, [tmp_path / "c.jsonl"])
    assert ids(CorpusIndex.load(folder), "rudo") == [], "all of an addition or nothing"
    written(tmp_path / "c.jsonl", "rudo")
    assert add_to_index(folder, [tmp_path / "c.jsonl"]).passages == 1
    for number in range(6):
        add_to_index(folder, [written(tmp_path / "d.jsonl", f"rudo {number}")])
        assert ids(CorpusIndex.load(folder), "rudo", top_k=2) == ["rudo", "rudo 0"]


def test_a_build_that_fails_leaves_nothing_and_nothing_is_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "kafo"}\n[]\n')
    folder = tmp_path / "i"
    assert main(["index", "build", str(tmp_path / "bad.jsonl"), "--out", str(folder)]) == 2
    assert "bad.jsonl:2: found list; wanted" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match="no passages"):
        build_index(folder, [tmp_path / "empty.jsonl"])
    folder.mkdir()
    good = written(tmp_path / "good.jsonl", "kafo")
    build_index(folder, [good])
    with pytest.raises(DataError, match="wanted a new or an empty folder"):
        build_index(folder, [good])
    assert ids(CorpusIndex.load(folder), "kafo") == ["kafo"]


def test_a_folder_that_is_no_whole_index_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"index build {tmp_path} --out DIR"):
        CorpusIndex.load(tmp_path)
    folder = tmp_path / "i"
    build_index(folder, [written(tmp_path / "a.jsonl", "kafo", "nito")])
    manifest = folder / "corpus_index.json"
    whole = manifest.read_text()
    for found, wanted in (
        (whole.replace('"passages": 2', '"passages": 1'), "found 2 passages, wanted 1"),
        (whole.replace('"format": 1', '"format": 0'), "found format 0, wanted 1"),
        (whole.replace('"digest"', '"other"'), "wanted a whole index"),
        (whole[:-5], "wanted a whole index"),
        ("[]", "wanted a whole index"),
    ):
        manifest.write_text(found)
        with pytest.raises(DataError, match=wanted):
            CorpusIndex.load(folder)
        with pytest.raises(DataError, match=wanted):
            add_to_index(folder, [tmp_path / "a.jsonl"])
    manifest.write_text(whole)
    (folder / "meta.json").unlink()
    with pytest.raises(DataError, match="wanted it whole"):
        CorpusIndex.load(folder)


def test_rows_of_our_own_form_and_of_search_r1s_are_read_from_jsonl_and_parquet(
    tmp_path: Path,
) -> None:
    rows = [
        {"id": "a", "title": "T", "text": "one"},
        {"id": 7, "contents": '"Kafo "x" melu"\nfirst\nsecond'},
        {"id": "c", "contents": "no title\n"},
        {"id": "d", "contents": "one line"},
        {"id": "e", "title": None, "text": "", "contents": "x"},
        {"id": "f", "title": "given", "contents": '"inside"\nbody'},
    ]
    seen = [("a", "T", "one"), ("7", 'Kafo "x" melu', "first\nsecond"), ("c", "no title", ""),
            ("d", "", "one line"), ("e", "", ""), ("f", "given", "body")]  # fmt: skip
    lines, table = tmp_path / "r.jsonl", tmp_path / "r.parquet"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = [{**row, "id": str(row["id"])} for row in rows]
    schema = [(name, pyarrow.string()) for name in ("contents", "id", "title", "text")]
    parquet.write_table(pyarrow.Table.from_pylist(named, pyarrow.schema(schema)), table)
    for path in (lines, table):
        read = list(read_passages([path]))
        assert [(passage.id, passage.title, passage.text) for passage in read] == seen
    for passage in read:
        assert title_and_text(contents_of(passage)) == (passage.title, passage.text)
    assert title_and_text('"') == ("", '"') and title_and_text('"\nx') == ('"', "x")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"bad\.parquet.*wanted a parquet file"):
        list(read_passages([tmp_path / "bad.parquet"]))
    parquet.write_table(pyarrow.table({"words": ["x"]}), table)
    with pytest.raises(DataError, match=r"r\.parquet:1: found title str, text NoneType"):
        list(read_passages([table]))


def test_a_folder_of_texts_becomes_passages_of_whole_paragraphs(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    long = "x" * 700
    (tmp_path / "b" / "z.md").write_text(f"intro\n\n# Height\nis 9\n#no heading\n## \n{long}\n")
    (tmp_path / "a.txt").write_text(f"# kept\n{long}\n\n{long}\n\nshort\n")
    (tmp_path / "c.txt").write_text("word " * 1000)
    (tmp_path / "d.csv").write_text("not read")
    read = list(read_passages([tmp_path]))
    assert [(p.id, p.title, p.text) for p in read if p.title != "c"] == [
        ("a.txt#1", "a", f"# kept\n{long}\n\n{long}"),
        ("a.txt#2", "a", "short"),
        ("b/z.md#1", "z", "intro"),
        ("b/z.md#2", "Height", "is 9\n#no heading"),
        ("b/z.md#3", "z", long),
    ]
    pieces = [p.text for p in read if p.title == "c"]
    assert " ".join(pieces).split() == ["word"] * 1000 and max(map(len, pieces)) <= 3600
    assert next(read_passages([tmp_path / "c.txt"])).id == "c.txt#1"
    (tmp_path / "a.txt").write_bytes(b"good\nbad \xff\n")
    with pytest.raises(DataError, match=r"a\.txt:2: found the byte 0xff"):
        list(read_passages([tmp_path]))
    with pytest.raises(DataError, match="found no text"):
        (tmp_path / "none").mkdir()
        list(read_passages([tmp_path / "none"]))


def test_a_corpus_is_read_passage_by_passage(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", "kafo", "nito")
    path.open("a").write("{")
    reading = read_passages([path])
    assert [next(reading).text, next(reading).text] == ["kafo", "nito"]
    with pytest.raises(DataError, match=r"a\.jsonl:3"):
        next(reading)


def test_texts_of_a_folder_come_in_the_order_of_their_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever order the file system has: ids and ties hang on it."""
    (tmp_path / "b").mkdir()
    for name in ("c.txt", "b/a.txt", "a.md"):
        (tmp_path / name).write_text(name)
    listed = sorted(tmp_path.rglob("*"), reverse=True)
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: iter(listed))
    found = [passage.id for passage in read_passages([tmp_path])]
    assert found == ["a.md#1", "b/a.txt#1", "c.txt#1"]
