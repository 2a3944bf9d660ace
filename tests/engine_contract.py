"""What every engine over a model has to keep, whatever it is made of; `slow` is the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from rollout_world import (
    SYSTEM_PROMPT,
    draw_toolbox,
    picture_task,
    requests_of,
    written_trajectory,
)
from transformers import AutoModelForImageTextToText

from tapo_train.errors import EngineError
from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.collect import collect
from tapo_train.rollout.engine import Completion, Engine, GenerationRequest, Sampling
from tapo_train.rollout.hf_engine import HfEngine
from tapo_train.rollout.limits import Limits
from tapo_train.types import Trajectory

AGREEMENT = 1e-4
"""Largest difference of log-probabilities in float32 between two engines."""
CACHE_BLOCK = 128
"""[tokens] largest unit in which keys and values are reused."""
LIMITS = Limits(max_turns=4, max_turn_tokens=48, max_tokens=1000)
SAMPLING = Sampling(temperature=0.8)


def play(engine: Engine, chat: ChatFormat, *, rollouts: int = 12) -> list[Trajectory]:
    (group,) = collect(
        [picture_task()],
        engine=engine,
        chat=chat,
        toolbox=draw_toolbox(),
        system_prompt=SYSTEM_PROMPT,
        rollouts_per_task=rollouts,
        limits=LIMITS,
        sampling=SAMPLING,
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


def recomputed(slow: HfEngine, request: GenerationRequest, completion: Completion) -> np.ndarray:
    """[L] log-probabilities of what was sampled, one pass over everything.

    Greedy tokens have to be the most probable ones, as far as rounding can tell: of two that are
    equally probable, engines may take either, and go on differently.
    """
    tokens = np.concatenate([request.tokens, completion.tokens])
    scores = slow.processed(slow.logits(tokens, request.images), request.sampling)
    at = np.arange(len(request.tokens), len(tokens))
    found: np.ndarray = scores[at - 1, tokens[at]].numpy()
    if request.sampling.is_greedy:
        best = scores[at - 1].max(dim=-1).values.numpy()
        np.testing.assert_allclose(found, best, atol=AGREEMENT, rtol=0)
    return found


def changed_weights(chat: ChatFormat, *, seed: int) -> dict[str, torch.Tensor]:
    """The model's weights with noise, the tied head under its own name as well."""
    model = AutoModelForImageTextToText.from_pretrained(chat.model, dtype=torch.float32)
    noise = torch.Generator().manual_seed(seed)
    changed = {
        name: tensor * (1 + 0.05 * torch.randn(tensor.shape, generator=noise))
        for name, tensor in model.state_dict().items()
    }
    return {**changed, "lm_head.weight": changed["model.language_model.embed_tokens.weight"]}


def samples_what_the_reference_scores(engine: Engine, slow: HfEngine, chat: ChatFormat) -> None:
    """Also behind two drawn pictures and three turns, whatever a policy plays on this machine."""
    for trajectory in play(engine, chat):
        scores = slow.processed(slow.logits(trajectory.tokens, trajectory.images), SAMPLING)
        at = np.concatenate([np.arange(t.span.start, t.span.end) for t in trajectory.turns])
        expected = scores[at - 1, trajectory.tokens[at]].numpy()
        np.testing.assert_allclose(trajectory.logprobs, expected, atol=AGREEMENT, rtol=0)
    written = written_trajectory(chat)
    for request in requests_of(written, sampling=SAMPLING):
        (completion,) = serve(engine, [request])
        expected = recomputed(slow, request, completion)
        np.testing.assert_allclose(completion.logprobs, expected, atol=AGREEMENT, rtol=0)
    np.testing.assert_allclose(
        engine.score(written.tokens, written.images),
        slow.score(written.tokens, written.images),
        atol=AGREEMENT,
        rtol=0,
    )


def agrees_before_and_after_weight_syncs(
    engine: Engine, slow: HfEngine, chat: ChatFormat, *, versions: Sequence[int]
) -> None:
    samples_what_the_reference_scores(engine, slow, chat)
    probe = request_for(chat, sampling=SAMPLING)
    for version in versions:
        before = engine.score(probe.tokens, probe.images)
        weights = changed_weights(chat, seed=version)
        for each in (engine, slow):
            each.load_weights(weights.items(), version=version)
            assert each.version == version  # type: ignore[attr-defined]
        after = engine.score(probe.tokens, probe.images)
        assert np.abs(after - before).max() > 100 * AGREEMENT, "the weights did not change"
        samples_what_the_reference_scores(engine, slow, chat)


def says_the_logprobs_of_the_sampled_distribution(
    engine: Engine, slow: HfEngine, chat: ChatFormat
) -> None:
    for sampling in (
        Sampling(temperature=1.3, top_k=5),
        Sampling(temperature=1.0, top_p=0.7),
        Sampling(temperature=0),
    ):
        request = request_for(chat, sampling=sampling)
        (completion,) = serve(engine, [request])
        expected = recomputed(slow, request, completion)
        np.testing.assert_allclose(completion.logprobs, expected, atol=AGREEMENT, rtol=0)


def is_greedy_like_the_reference(engine: Engine, slow: HfEngine, chat: ChatFormat) -> None:
    request = request_for(chat, sampling=Sampling(temperature=0))
    for each in (engine, slow):
        (found,) = serve(each, [request])
        expected = recomputed(slow, request, found)
        np.testing.assert_allclose(found.logprobs, expected, atol=AGREEMENT, rtol=0)
        ended = found.tokens[-1] == chat.end_token_id
        assert found.finished == ("stop" if ended else "length")
        assert ended or len(found.tokens) == request.max_tokens


def never_samples_banned_tokens(engine: Engine, chat: ChatFormat) -> None:
    hot = Sampling(temperature=2.0, seed=1)
    requests = [request_for(chat, id=f"hot{k}", sampling=hot) for k in range(12)]
    tokens = np.concatenate([completion.tokens for completion in serve(engine, requests)])
    assert len(tokens) > 200
    assert not np.isin(tokens, chat.banned_token_ids).any()


def seeds_a_request_in_any_company(engine: Engine, chat: ChatFormat) -> None:
    seeded = Sampling(temperature=1.0, seed=5)
    requests = [request_for(chat, id=f"r{k}", sampling=seeded) for k in range(3)]
    together = serve(engine, requests)
    (alone,) = serve(engine, requests[2:])
    np.testing.assert_array_equal(alone.tokens, together[2].tokens)
    assert not np.array_equal(together[0].tokens, together[1].tokens)
    other = replace(requests[2], sampling=replace(seeded, seed=6))
    assert not np.array_equal(serve(engine, [other])[0].tokens, alone.tokens)


def reuses_keys_until_the_weights_change(engine: Engine, chat: ChatFormat, *, version: int) -> None:
    tokens = chat.prompt(picture_task(), system_prompt="Look. " * 100, tool_schemas=[])
    request = replace(request_for(chat, sampling=SAMPLING), tokens=tokens)
    (first,) = serve(engine, [request])
    longer = replace(request, tokens=np.concatenate([tokens, first.tokens]))
    (second,) = serve(engine, [longer])
    assert second.cached_tokens > len(tokens) - 2 * CACHE_BLOCK
    engine.load_weights(changed_weights(chat, seed=version).items(), version=version)
    (third,) = serve(engine, [longer])
    assert third.cached_tokens == 0, "keys of old weights were reused"


def gives_a_text_its_own_positions_after_a_picture(
    engine: Engine, slow: HfEngine, chat: ChatFormat
) -> None:
    text = chat.prompt(
        replace(picture_task(), images=()), system_prompt=SYSTEM_PROMPT, tool_schemas=[]
    )
    greedy = Sampling(temperature=0)
    requests = [
        request_for(chat, id="picture", sampling=greedy),
        GenerationRequest(id="text", tokens=text, images=(), max_tokens=16, sampling=greedy),
    ]
    for each in (engine, slow):
        found = serve(each, requests)[1]
        expected = recomputed(slow, requests[1], found)
        np.testing.assert_allclose(found.logprobs, expected, atol=AGREEMENT, rtol=0)


def drops_an_aborted_request(engine: Engine, chat: ChatFormat) -> None:
    for id in ("kept", "dropped"):
        engine.submit(request_for(chat, id=id, sampling=SAMPLING))
    done = list(engine.step())
    engine.abort(["dropped", "never there"])
    while engine.has_unfinished():
        done += engine.step()
    assert [completion.id for completion in done if completion.id != "dropped"] == ["kept"]
    engine.submit(request_for(chat, id="dropped", sampling=SAMPLING))
    engine.abort(["dropped"])
    assert not engine.has_unfinished()


def refuses_what_it_cannot_hold(engine: Engine, chat: ChatFormat) -> None:
    request = request_for(chat, sampling=SAMPLING)
    with pytest.raises(EngineError, match="exceed max_model_len = 1024"):
        engine.submit(replace(request, max_tokens=1000))
    engine.submit(request)
    with pytest.raises(EngineError, match="request r is in flight already"):
        engine.submit(request)
    while engine.has_unfinished():
        engine.step()
