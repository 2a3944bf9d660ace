"""The fast engine and the slow reference give the same numbers, before and after weight syncs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from engine_servers import serving, trainer_of
from rollout_world import SYSTEM_PROMPT, draw_image, draw_toolbox, picture_task, teach_calls
from transformers import AutoModelForImageTextToText
from vllm.renderers.inputs.preprocess import parse_model_prompt

from tapo_train.errors import AlignmentError, ConfigError, EngineError
from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.collect import collect
from tapo_train.rollout.engine import Completion, Engine, GenerationRequest, Sampling
from tapo_train.rollout.hf_engine import HfEngine
from tapo_train.rollout.limits import Limits
from tapo_train.rollout.remote.engine import RemoteEngine
from tapo_train.rollout.vllm_engine import VllmEngine, VllmOptions
from tapo_train.types import Trajectory

pytestmark = pytest.mark.slow

AGREEMENT = 1e-4
"""Largest difference of log-probabilities in float32 between the two engines."""
CACHE_BLOCK = 128
"""[tokens] largest unit in which vLLM reuses keys and values."""
LIMITS = Limits(max_turns=4, max_turn_tokens=48, max_tokens=1000)
SAMPLING = Sampling(temperature=0.8)
NAMES = ("fast", "slow", "served")


@dataclass
class Pair:
    """Engines over one folder of weights."""

    chat: ChatFormat
    fast: VllmEngine
    slow: HfEngine
    served: RemoteEngine
    """A second reference, behind a socket."""


@pytest.fixture(scope="module", params=["tiny_qwen3_vl", "tiny_qwen2_5_vl"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp(request.param)
    chat = ChatFormat(teach_calls(request.getfixturevalue(request.param), folder))
    options = VllmOptions(dtype="float32", max_model_len=1024, max_num_seqs=32, seeded=True)
    fast = VllmEngine(chat, options)
    with (
        serving(HfEngine(chat), chat, max_tokens=1024) as server,
        trainer_of([server], chat, run="r") as served,
    ):
        yield Pair(chat=chat, fast=fast, slow=HfEngine(chat), served=served)
    fast.close()


def play(
    engine: Engine, chat: ChatFormat, *, sampling: Sampling = SAMPLING, rollouts: int = 12
) -> list[Trajectory]:
    (group,) = collect(
        [picture_task()],
        engine=engine,
        chat=chat,
        toolbox=draw_toolbox(),
        system_prompt=SYSTEM_PROMPT,
        rollouts_per_task=rollouts,
        limits=LIMITS,
        sampling=sampling,
    )
    return list(group.trajectories)


def request_for(chat: ChatFormat, *, id: str = "r", sampling: Sampling) -> GenerationRequest:
    task = picture_task()
    tokens = chat.prompt(task, system_prompt=SYSTEM_PROMPT, tool_schemas=[])
    return GenerationRequest(
        id=id, tokens=tokens, images=task.images, max_tokens=24, sampling=sampling
    )


def serve(engine: Engine, requests: Sequence[GenerationRequest]) -> list[Completion]:
    for request in requests:
        engine.submit(request)
    done: list[Completion] = []
    while engine.has_unfinished():
        done += engine.step()
    order = [request.id for request in requests]
    return sorted(done, key=lambda completion: order.index(completion.id))


def sampled_logprobs(slow: HfEngine, trajectory: Trajectory, sampling: Sampling) -> np.ndarray:
    """The slow engine's log-probabilities of the sampled tokens, one pass over everything."""
    logits = slow.logits(trajectory.tokens, trajectory.images)
    scores = slow.processed(logits, sampling)
    spans = [np.arange(turn.span.start, turn.span.end) for turn in trajectory.turns]
    at = np.concatenate(spans)
    return scores[at - 1, trajectory.tokens[at]].numpy()


def require_agreement(pair: Pair) -> None:
    trajectories = play(pair.fast, pair.chat)
    rich = [t for t in trajectories if len(t.images) >= 2 and len(t.turns) >= 3]
    assert len(rich) >= 3, "too few trajectories with two pictures and three turns to compare"
    for trajectory in rich:
        expected = sampled_logprobs(pair.slow, trajectory, SAMPLING)
        np.testing.assert_allclose(trajectory.logprobs, expected, atol=AGREEMENT, rtol=0)
    probe = rich[0]
    np.testing.assert_allclose(
        pair.fast.score(probe.tokens, probe.images),
        pair.slow.score(probe.tokens, probe.images),
        atol=AGREEMENT,
        rtol=0,
    )
    np.testing.assert_array_equal(
        pair.served.score(probe.tokens, probe.images), pair.slow.score(probe.tokens, probe.images)
    )


def changed_weights(chat: ChatFormat, *, seed: int) -> dict[str, torch.Tensor]:
    """The model's weights with noise, the tied head under its own name as well."""
    model = AutoModelForImageTextToText.from_pretrained(chat.model, dtype=torch.float32)
    noise = torch.Generator().manual_seed(seed)
    changed = {
        name: tensor * (1 + 0.05 * torch.randn(tensor.shape, generator=noise))
        for name, tensor in model.state_dict().items()
    }
    return {**changed, "lm_head.weight": changed["model.language_model.embed_tokens.weight"]}


def test_engines_agree_on_sampled_trajectories_before_and_after_three_weight_syncs(
    pair: Pair,
) -> None:
    require_agreement(pair)
    probe = play(pair.fast, pair.chat, rollouts=1)[0]
    for version in (1, 2, 3):
        before = pair.fast.score(probe.tokens, probe.images)
        weights = changed_weights(pair.chat, seed=version)
        for engine in (pair.fast, pair.slow, pair.served):
            engine.load_weights(weights.items(), version=version)
            assert engine.version == version
        after = pair.fast.score(probe.tokens, probe.images)
        assert np.abs(after - before).max() > 100 * AGREEMENT, "the weights did not change"
        require_agreement(pair)


def test_logprobs_are_those_of_the_sampled_distribution_also_when_it_is_cut(pair: Pair) -> None:
    for sampling in (
        Sampling(temperature=1.3, top_k=5),
        Sampling(temperature=1.0, top_p=0.7),
        Sampling(temperature=0),
    ):
        request = request_for(pair.chat, sampling=sampling)
        (completion,) = serve(pair.fast, [request])
        tokens = np.concatenate([request.tokens, completion.tokens])
        scores = pair.slow.processed(pair.slow.logits(tokens, request.images), sampling)
        at = np.arange(len(request.tokens), len(tokens))
        expected = scores[at - 1, tokens[at]].numpy()
        np.testing.assert_allclose(completion.logprobs, expected, atol=AGREEMENT, rtol=0)


def test_greedy_turns_are_the_same_on_both_engines(pair: Pair) -> None:
    requests = [request_for(pair.chat, sampling=Sampling(temperature=0))]
    (slow,) = serve(pair.slow, requests)
    for engine in (pair.fast, pair.served):
        (found,) = serve(engine, requests)
        np.testing.assert_array_equal(found.tokens, slow.tokens)
        assert found.finished == slow.finished
        np.testing.assert_allclose(found.logprobs, slow.logprobs, atol=AGREEMENT, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_banned_tokens_are_never_sampled(pair: Pair, name: str) -> None:
    engine: Engine = getattr(pair, name)
    hot = Sampling(temperature=2.0, seed=1)
    requests = [request_for(pair.chat, id=f"hot{k}", sampling=hot) for k in range(12)]
    tokens = np.concatenate([completion.tokens for completion in serve(engine, requests)])
    assert len(tokens) > 200
    assert not np.isin(tokens, pair.chat.banned_token_ids).any()


@pytest.mark.parametrize("name", NAMES)
def test_a_seeded_request_is_the_same_in_any_company(pair: Pair, name: str) -> None:
    engine: Engine = getattr(pair, name)
    seeded = Sampling(temperature=1.0, seed=5)
    requests = [request_for(pair.chat, id=f"r{k}", sampling=seeded) for k in range(3)]
    together = serve(engine, requests)
    (alone,) = serve(engine, requests[2:])
    np.testing.assert_array_equal(alone.tokens, together[2].tokens)
    assert not np.array_equal(together[0].tokens, together[1].tokens)
    other = replace(requests[2], sampling=replace(seeded, seed=6))
    assert not np.array_equal(serve(engine, [other])[0].tokens, alone.tokens)


def test_the_next_turn_reuses_the_keys_and_values_of_the_turns_before(pair: Pair) -> None:
    task = picture_task()
    tokens = pair.chat.prompt(task, system_prompt="Look. " * 100, tool_schemas=[])
    request = replace(request_for(pair.chat, sampling=SAMPLING), tokens=tokens)
    (first,) = serve(pair.fast, [request])
    longer = replace(request, tokens=np.concatenate([tokens, first.tokens]))
    (second,) = serve(pair.fast, [longer])
    assert second.cached_tokens > len(tokens) - 2 * CACHE_BLOCK
    for engine in (pair.fast, pair.slow, pair.served):
        engine.load_weights(changed_weights(pair.chat, seed=9).items(), version=9)
    (third,) = serve(pair.fast, [longer])
    assert third.cached_tokens == 0, "keys of old weights were reused"


def test_a_text_request_after_one_with_a_picture_has_its_own_positions(pair: Pair) -> None:
    text = pair.chat.prompt(
        replace(picture_task(), images=()), system_prompt=SYSTEM_PROMPT, tool_schemas=[]
    )
    greedy = Sampling(temperature=0)
    requests = [
        request_for(pair.chat, id="picture", sampling=greedy),
        GenerationRequest(id="text", tokens=text, images=(), max_tokens=16, sampling=greedy),
    ]
    fast, slow = serve(pair.fast, requests), serve(pair.slow, requests)
    np.testing.assert_allclose(fast[1].logprobs, slow[1].logprobs, atol=AGREEMENT, rtol=0)


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
    info, asked = pair.fast._inputs._processor.info, []
    find = info.get_image_processor

    def counted() -> object:
        asked.append(True)
        return find()

    monkeypatch.setattr(info, "get_image_processor", counted)
    for id in "abc":
        serve(pair.fast, [replace(request, id=id, images=(fresh,))])
    assert len(asked) == 1


def test_an_aborted_request_is_not_returned_and_the_engine_goes_on(pair: Pair) -> None:
    for id in ("kept", "dropped"):
        pair.fast.submit(request_for(pair.chat, id=id, sampling=SAMPLING))
    pair.fast.step()
    pair.fast.abort(["dropped", "never there"])
    done: list[Completion] = []
    while pair.fast.has_unfinished():
        done += pair.fast.step()
    assert [completion.id for completion in done] == ["kept"]
    pair.fast.submit(request_for(pair.chat, id="dropped", sampling=SAMPLING))
    pair.fast.abort(["dropped"])
    assert not pair.fast.has_unfinished()
    pair.slow.submit(request_for(pair.chat, id="dropped", sampling=SAMPLING))
    pair.slow.abort(["dropped"])
    assert not pair.slow.has_unfinished()


def test_the_engine_knows_how_many_tokens_it_holds(pair: Pair) -> None:
    held = pair.fast.capacity_tokens()
    assert held is not None and held > 1024
    assert held % 32 == 0, "whole blocks"
    assert pair.slow.capacity_tokens() is None


def test_a_request_longer_than_the_engine_allows_is_refused(pair: Pair) -> None:
    request = replace(request_for(pair.chat, sampling=SAMPLING), max_tokens=1000)
    for engine in (pair.fast, pair.served):
        with pytest.raises(EngineError, match="exceed max_model_len = 1024"):
            engine.submit(request)


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
