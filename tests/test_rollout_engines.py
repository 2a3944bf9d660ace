"""The fast engine and the slow reference give the same numbers, before and after weight syncs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import engine_contract as it
import pytest
import torch
from engine_contract import SAMPLING, changed_weights, request_for, serve
from rollout_world import SYSTEM_PROMPT, draw_image, picture_task, teach_calls
from vllm.renderers.inputs.preprocess import parse_model_prompt

from tapo_train.errors import AlignmentError, ConfigError, EngineError
from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.engine import Engine, Sampling
from tapo_train.rollout.hf_engine import HfEngine
from tapo_train.rollout.vllm_engine import VllmEngine, VllmOptions
from tapo_train.types import Image

pytestmark = pytest.mark.slow

NAMES = ("fast", "slow")


@dataclass
class Pair:
    """Engines over one folder of weights."""

    chat: ChatFormat
    fast: VllmEngine
    slow: HfEngine


@pytest.fixture(scope="module", params=["tiny_qwen3_vl", "tiny_qwen2_5_vl"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp(request.param)
    chat = ChatFormat(teach_calls(request.getfixturevalue(request.param), folder))
    options = VllmOptions(dtype="float32", max_model_len=1024, max_num_seqs=32, seeded=True)
    fast = VllmEngine(chat, options)
    yield Pair(chat=chat, fast=fast, slow=HfEngine(chat))
    fast.close()


def test_engines_agree_on_sampled_trajectories_before_and_after_three_weight_syncs(
    pair: Pair,
) -> None:
    it.agrees_before_and_after_weight_syncs(pair.fast, pair.slow, pair.chat, versions=(1, 2, 3))


def test_logprobs_are_those_of_the_sampled_distribution_also_when_it_is_cut(pair: Pair) -> None:
    it.says_the_logprobs_of_the_sampled_distribution(pair.fast, pair.slow, pair.chat)


def test_greedy_turns_are_the_same_on_both_engines(pair: Pair) -> None:
    it.is_greedy_like_the_reference(pair.fast, pair.slow, pair.chat)


@pytest.mark.parametrize("name", NAMES)
def test_banned_tokens_are_never_sampled(pair: Pair, name: str) -> None:
    it.never_samples_banned_tokens(getattr(pair, name), pair.chat)


@pytest.mark.parametrize("name", NAMES)
def test_a_seeded_request_is_the_same_in_any_company(pair: Pair, name: str) -> None:
    it.seeds_a_request_in_any_company(getattr(pair, name), pair.chat)


def test_the_next_turn_reuses_the_keys_and_values_of_the_turns_before(pair: Pair) -> None:
    it.reuses_keys_until_the_weights_change(pair.fast, pair.chat, version=9)
    pair.slow.load_weights(changed_weights(pair.chat, seed=9).items(), version=9)


def test_a_text_request_after_one_with_a_picture_has_its_own_positions(pair: Pair) -> None:
    it.gives_a_text_its_own_positions_after_a_picture(pair.fast, pair.slow, pair.chat)


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_refused_while_requests_are_in_flight(pair: Pair, name: str) -> None:
    engine: Engine = getattr(pair, name)
    request = request_for(pair.chat, sampling=SAMPLING)
    engine.submit(request)
    with pytest.raises(EngineError, match="idle engine; 1 in flight"):
        engine.load_weights({}.items(), version=4)
    with pytest.raises(EngineError, match="request r is in flight already"):
        engine.submit(request)
    while engine.has_unfinished():
        engine.step()


def test_placeholders_that_do_not_fit_their_picture_are_refused_before_it_runs(
    pair: Pair,
) -> None:
    request = request_for(pair.chat, sampling=SAMPLING)
    wrong = replace(request, images=(draw_image(64, 64),))
    with pytest.raises(AlignmentError, match=r"request r: image 0 \(64x64 px\) has \d+ place"):
        pair.fast.submit(wrong)
    with pytest.raises(AlignmentError, match="request r: 1 runs of image placeholders for 2"):
        pair.fast.submit(replace(request, images=request.images * 2))
    assert not pair.fast.has_unfinished()


def test_the_engine_is_given_what_it_would_have_made_of_the_pictures_itself(pair: Pair) -> None:
    """vLLM's own renderer, given one placeholder per picture and decoded pixels."""
    sizes = [(100, 80), (64, 90), (33, 33), (700, 240)]
    pictures = tuple(draw_image(width, height) for width, height in sizes)
    chat, task = pair.chat, replace(picture_task(), images=pictures)
    tokens = chat.prompt(task, system_prompt=SYSTEM_PROMPT, tool_schemas=[])
    engine = pair.fast._engine
    prompt = {
        "prompt_token_ids": chat.collapse(tokens),
        "multi_modal_data": {"image": [chat.rgb(image) for image in task.images]},
        "multi_modal_uuids": {"image": [image.sha256 for image in task.images]},
    }
    parsed = parse_model_prompt(engine.model_config, prompt)
    renderer = engine.renderer
    (theirs,) = renderer.render_cmpl([parsed], renderer.default_cmpl_tok_params.with_kwargs())
    ours = pair.fast._inputs.build("r", tokens, task.images)
    assert ours["prompt_token_ids"] == theirs["prompt_token_ids"]
    assert ours["mm_hashes"] == theirs["mm_hashes"]
    assert ours["mm_placeholders"] == theirs["mm_placeholders"]
    for own, other in zip(ours["mm_kwargs"]["image"], theirs["mm_kwargs"]["image"], strict=True):
        assert own.keys() == other.keys()
        for key in own:
            assert torch.equal(own[key].data, other[key].data), key


def test_a_picture_is_processed_once_however_often_it_is_sent(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_for(pair.chat, sampling=SAMPLING)
    fresh = draw_image(100, 80, seed=77)
    decoded, rgb = [], pair.chat.rgb

    def counted(image: Image) -> object:
        decoded.append(image)
        return rgb(image)

    monkeypatch.setattr(pair.chat, "rgb", counted)
    for id in "abc":
        serve(pair.fast, [replace(request, id=id, images=(fresh,))])
    assert decoded == [fresh]


@pytest.mark.parametrize("name", NAMES)
def test_an_aborted_request_is_not_returned_and_the_engine_goes_on(pair: Pair, name: str) -> None:
    it.drops_an_aborted_request(getattr(pair, name), pair.chat)


def test_the_engine_knows_how_many_tokens_it_holds(pair: Pair) -> None:
    held = pair.fast.capacity_tokens()
    assert held is not None and held > 1024
    assert held % 32 == 0, "whole blocks"
    assert pair.slow.capacity_tokens() is None


def test_a_request_that_cannot_be_served_is_refused(pair: Pair) -> None:
    it.refuses_what_it_cannot_hold(pair.fast, pair.chat)


def test_incomplete_weights_are_refused_by_the_reference(pair: Pair) -> None:
    weights = changed_weights(pair.chat, seed=1)
    del weights["lm_head.weight"]
    with pytest.raises(EngineError, match=r"lm_head\.weight"):
        pair.slow.load_weights(weights.items(), version=5)


@pytest.mark.parametrize(
    "values",
    [{"temperature": -1}, {"temperature": 2.1}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}],
)
def test_sampling_outside_its_range_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"sampling.{next(iter(values))} is"):
        Sampling(**values)  # type: ignore[arg-type]


def test_only_an_uncut_distribution_is_exact() -> None:
    assert Sampling(temperature=0.7).is_exact
    for cut in (Sampling(temperature=0), Sampling(top_p=0.9), Sampling(top_k=3)):
        assert not cut.is_exact
