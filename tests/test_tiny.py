"""The tiny policy: loads like a downloaded one; its tokenizer keeps syllables whole."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

from tapo_train.demo.tiny.corpus import tokenizer_texts
from tapo_train.demo.tiny.tokenizer import learn_merges, without_names
from tapo_train.demo.world.lexicon import SYLLABLES, draw_name


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_the_folder_loads_like_a_downloaded_model(
    family: str, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(f"tiny_{family}")
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    assert model.config.model_type == family
    assert 1e6 < sum(p.numel() for p in model.parameters()) < 4e6
    assert model.config.image_token_id == processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")


def test_a_name_has_the_same_tokens_wherever_it_stands(tiny_qwen3_vl: Path) -> None:
    tokenizer = AutoProcessor.from_pretrained(tiny_qwen3_vl).tokenizer
    rng = random.Random(0)
    for _ in range(50):
        name = draw_name(rng, num_syllables=3)
        wanted = [name[:2], name[2:4], name[4:]]
        for text in (
            f'"query": "{name} seat"',
            f"the seat of {name} is",
            f"<answer>{name}</answer>",
        ):
            pieces = tokenizer.tokenize(text)
            start = pieces.index(wanted[0])
            assert pieces[start : start + 3] == wanted


def test_a_tool_call_is_short_and_every_text_survives_the_round_trip(tiny_qwen3_vl: Path) -> None:
    tokenizer = AutoProcessor.from_pretrained(tiny_qwen3_vl).tokenizer
    call = (
        '{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [0, 50, 500, 1000], "img_idx": 0}}'
    )
    assert len(tokenizer(call).input_ids) <= 11
    for text in (call, "Grüße, 東京! 12345 \n\n\t {x}", "the seat of Tavore is Miko."):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_names_do_not_reach_the_tokenizer_corpus() -> None:
    assert without_names("the seat of Tavore is Miko.", syllables=SYLLABLES) == "the seat of  is ."
    assert without_names("Name the house", syllables=SYLLABLES) == " the house"
    assert not any("Tavore" in text for text in tokenizer_texts())


def test_merges_are_the_most_frequent_pairs_and_never_join_atoms() -> None:
    from collections import Counter

    words = Counter({("t", "a", "t", "a"): 9, ("x", "y", "z"): 5, ("y", "z"): 1})
    learned = learn_merges(words, [("t", "a")], atoms=frozenset({"ta"}), count=9)
    assert learned == [("y", "z"), ("x", "yz")]
