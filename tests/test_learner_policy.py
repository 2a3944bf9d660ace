"""The policy against Hugging Face's own forward pass, and what an update does."""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from learner_rows import make_policy, make_row, some_rows, weights_of
from transformers import AutoModelForImageTextToText
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tapo_train.algos.importance import truncate
from tapo_train.algos.losses import LossOutput, grpo
from tapo_train.algos.metrics import finalise
from tapo_train.errors import AlignmentError, LearnerError
from tapo_train.learner import attention, engine
from tapo_train.learner.batch import join, pack
from tapo_train.learner.engine import end_process_group
from tapo_train.learner.idle import counting
from tapo_train.learner.objective import policy_gradient, supervised
from tapo_train.learner.settings import LearnerSettings
from tapo_train.rollout.chat import ChatFormat

TOLERANCE = 1e-5
TEMPERATURE = 0.7
BANNED = (3, 17)


@pytest.fixture(scope="module", params=["qwen3_vl", "qwen2_5_vl"])
def folder(request):
    yield request.getfixturevalue(f"tiny_{request.param}")
    end_process_group()


@pytest.fixture(scope="module")
def chat(folder):
    return ChatFormat(folder)


@pytest.fixture
def policy(folder, chat):
    made = make_policy(folder, chat, temperature=TEMPERATURE, banned_token_ids=BANNED)
    yield made
    made.close()


@pytest.fixture
def rows(policy, chat):
    return some_rows(chat, policy.layout)


def hugging_face(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)


def reference_logprobs(model, chat, row, *, temperature, banned):
    """[T - 1] of tokens[1:], by the model's ordinary forward pass on the row alone."""
    tokens = torch.from_numpy(row.tokens.astype(np.int64))[None]
    is_image = (tokens == model.config.image_token_id).long()
    extra = chat.pixels(row.images) if row.images else {}
    logits = model(input_ids=tokens, mm_token_type_ids=is_image, **extra).logits[0, :-1]
    logits = logits / temperature
    if banned:
        logits[:, list(banned)] = -torch.inf
    return logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]


def trained(values, row):
    """The entries of [T - 1] that speak of the row's trained tokens."""
    return torch.cat([values[span.start - 1 : span.end - 1] for span in row.spans])


def test_packed_logprobs_equal_those_of_each_row_alone_and_of_hugging_face(
    folder, chat, policy, rows
):
    packed = policy.logprobs(join(rows))
    alone = torch.cat([policy.logprobs(join([row])) for row in rows])
    model = hugging_face(folder)
    with torch.no_grad():
        wanted = [
            trained(reference_logprobs(model, chat, r, temperature=TEMPERATURE, banned=BANNED), r)
            for r in rows
        ]
    torch.testing.assert_close(alone, torch.cat(wanted), atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(packed, torch.cat(wanted), atol=TOLERANCE, rtol=0)


def test_the_gradient_of_a_packed_update_equals_that_of_hugging_face(folder, chat, policy, rows):
    before = weights_of(policy)
    metrics = finalise(policy.update([join(rows)], supervised))
    model = hugging_face(folder)
    total = sum(row.num_trained for row in rows)
    loss = torch.zeros(())
    for row in rows:
        logprobs = reference_logprobs(model, chat, row, temperature=TEMPERATURE, banned=BANNED)
        loss = loss - (trained(logprobs, row) * torch.from_numpy(row.advantages)).sum() / total
    loss.backward()
    after = weights_of(policy)
    assert metrics["update/loss"] == pytest.approx(loss.item(), abs=TOLERANCE)
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert metrics["update/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    for name, parameter in model.named_parameters():
        found = before[name] - after[name]
        torch.testing.assert_close(found, parameter.grad, atol=TOLERANCE, rtol=1e-4, msg=name)


def test_the_update_does_not_depend_on_the_budget_of_a_micro_batch(folder, chat):
    results = []
    for budget in (1, 60, 10_000):
        policy = make_policy(folder, chat)
        rows = some_rows(chat, policy.layout)
        batches = policy.with_old_logprobs(pack(rows, budget_tokens=budget))
        metrics = policy.update(batches, policy_gradient(grpo), aggregation="seq-mean-token-mean")
        results.append((len(batches), finalise(metrics)["update/loss"], weights_of(policy)))
        policy.close()
    assert len({count for count, _, _ in results}) == 3
    for _, loss, weights in results[1:]:
        assert loss == pytest.approx(results[0][1], abs=1e-6)
        torch.testing.assert_close(weights, results[0][2], atol=1e-6, rtol=0)


def test_who_looks_on_sees_what_was_computed_and_changes_nothing(folder, chat):
    seen, weights = [], []
    for observe in (None, lambda *told: seen.append(told)):
        policy = make_policy(folder, chat, measure_entropy=False)
        batch = policy.with_old_logprobs([join(some_rows(chat, policy.layout))])[0]
        shifted = replace(batch, old_logprobs=batch.old_logprobs - 0.125)
        exact = policy._score(batch, with_entropy=True)[1].detach()
        metrics = policy.update([shifted], policy_gradient(grpo), observe=observe)
        assert "policy/entropy" not in metrics
        weights.append(weights_of(policy))
        policy.close()
    torch.testing.assert_close(weights[0], weights[1], atol=0, rtol=0)
    ((told, logprobs, entropy, output),) = seen
    assert told.row_ids == batch.row_ids and not logprobs.requires_grad
    torch.testing.assert_close(logprobs, batch.old_logprobs, atol=1e-6, rtol=0)
    torch.testing.assert_close(logprobs - output.old_logprobs, torch.full_like(logprobs, 0.125))
    torch.testing.assert_close(entropy, exact, atol=1e-6, rtol=0)
    assert entropy.min() > 0


def test_an_update_raises_tokens_of_positive_and_lowers_those_of_negative_advantage(folder, chat):
    policy = make_policy(folder, chat, learning_rate=0.1)
    good, bad = (make_row(chat, policy.layout, seed=s) for s in (1, 2))
    good = replace(good, advantages=np.ones(good.num_trained))
    bad = replace(bad, advantages=-np.ones(bad.num_trained))
    batches = policy.with_old_logprobs([join([good, bad])])
    policy.update(batches, policy_gradient(grpo))
    change = policy.logprobs(batches[0]) - batches[0].old_logprobs
    policy.close()
    assert change[: good.num_trained].mean() > 0 > change[good.num_trained :].mean()


def test_attempts_that_share_pictures_have_the_gradient_of_separate_passes(folder, chat):
    weights = []
    for budget in (1, 10_000):
        policy = make_policy(folder, chat)
        row = some_rows(chat, policy.layout)[2]
        rows = [replace(row, id=str(i), advantages=row.advantages + i) for i in range(3)]
        policy.update(pack(rows, budget_tokens=budget), supervised)
        weights.append(weights_of(policy))
        policy.close()
    torch.testing.assert_close(weights[1], weights[0], atol=1e-6, rtol=0)


def test_a_single_update_needs_no_old_logprobs(folder, chat):
    weights = []
    for is_only_update in (False, True):
        policy = make_policy(folder, chat)
        batches = pack(some_rows(chat, policy.layout), budget_tokens=60)
        if not is_only_update:
            batches = policy.with_old_logprobs(batches)
        objective = policy_gradient(grpo, correction=truncate, is_only_update=is_only_update)
        policy.update(batches, objective)
        weights.append(weights_of(policy))
        policy.close()
    torch.testing.assert_close(weights[1], weights[0], atol=1e-7, rtol=0)


def test_score_is_of_all_tokens_at_temperature_one_with_nothing_banned(folder, chat, policy, rows):
    row = rows[2]
    with torch.no_grad():
        wanted = reference_logprobs(hugging_face(folder), chat, row, temperature=1.0, banned=())
    found = policy.score(row.tokens, row.images)
    np.testing.assert_allclose(found, wanted.numpy(), atol=TOLERANCE)


def test_named_weights_are_hugging_faces_and_hold_the_tied_head_too(folder, policy):
    found = weights_of(policy)
    wanted = dict(hugging_face(folder).named_parameters())
    assert set(found) == set(wanted) | {"lm_head.weight"}
    embedding = wanted["model.language_model.embed_tokens.weight"]
    torch.testing.assert_close(found["lm_head.weight"], embedding, atol=0, rtol=0)


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(policy, rows):
    before = weights_of(policy)
    poisoned = replace(rows[1], advantages=np.full(rows[1].num_trained, np.nan))
    batches = [join([rows[0]]), join([poisoned])]
    with pytest.raises(LearnerError, match=r"loss of the step is nan.*nan in .* rows row-1$"):
        policy.update(batches, supervised)
    torch.testing.assert_close(weights_of(policy), before, atol=0, rtol=0)
    healthy = finalise(policy.update([join([rows[0]])], supervised))
    assert np.isfinite(healthy["update/grad_norm"])


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change(policy, rows):
    before = weights_of(policy)

    def explosive(batch, logprobs, entropy):
        return replace(supervised(batch, logprobs, entropy), per_token=(logprobs * 0).sqrt() * 0)

    with pytest.raises(LearnerError, match="norm of the step's gradient is nan"):
        policy.update([join(rows)], explosive)
    torch.testing.assert_close(weights_of(policy), before, atol=0, rtol=0)


def test_without_a_trained_token_no_step_is_taken(policy, rows):
    before = weights_of(policy)
    untrained = replace(
        rows[1], spans=(), advantages=np.zeros(0), sampler_logprobs=np.zeros(0, dtype=np.float32)
    )
    assert policy.update([join([untrained])], supervised) == {}
    assert policy.update([], supervised) == {}
    torch.testing.assert_close(weights_of(policy), before, atol=0, rtol=0)


def test_clipping_scales_the_whole_gradient_to_the_limit(folder, chat):
    changes = []
    for limit in (0.0, 0.01):
        policy = make_policy(folder, chat, max_grad_norm=limit)
        before = weights_of(policy)
        norm = finalise(policy.update([join(some_rows(chat, policy.layout))], supervised))[
            "update/grad_norm"
        ]
        after = weights_of(policy)
        moved = [before[n] - after[n] for n in before if n != "lm_head.weight"]
        changes.append((norm, torch.nn.utils.get_total_norm(moved).item()))
        policy.close()
    (norm, free), (same_norm, clipped) = changes
    assert free == pytest.approx(norm, rel=1e-4)
    assert same_norm == pytest.approx(norm, rel=1e-6)
    assert clipped == pytest.approx(0.01, rel=1e-3)


def test_gradient_checkpointing_changes_no_number(folder, chat):
    results = []
    for checkpointing in (False, True):
        policy = make_policy(folder, chat, gradient_checkpointing=checkpointing)
        policy.update([join(some_rows(chat, policy.layout))], supervised)
        results.append(weights_of(policy))
        policy.close()
    torch.testing.assert_close(results[1], results[0], atol=1e-7, rtol=0)


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_the_fused_optimizer_is_the_default_and_changes_no_number(folder, chat, zero_stage):
    # A bias of keys has no gradient but rounding, which Adam scales up to the learning rate.
    adam = {"optimizer": "adamw", "learning_rate": 3e-4, "weight_decay": 0.1}
    results = []
    for fused in (True, False):
        policy = make_policy(folder, chat, zero_stage=zero_stage, **adam)
        (group,) = policy._engine.basic_optimizer.param_groups
        assert group["fused"] is True
        group["fused"] = fused
        for _ in range(3):
            policy.update([join(some_rows(chat, policy.layout))], supervised)
        results.append(weights_of(policy))
        policy.close()
    torch.testing.assert_close(results[1], results[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("device", "offload", "fused"),
    [("cuda", True, False), ("cuda", False, True), ("cpu", True, True), ("cpu", False, True)],
)
def test_the_optimizer_is_fused_unless_its_state_is_away_from_the_device(device, offload, fused):
    settings = LearnerSettings(offload_optimizer=offload)
    made = engine._optimizer([torch.nn.Parameter(torch.ones(3))], settings, torch.device(device))
    assert made.defaults["fused"] is fused


def test_the_learning_rate_warms_up_from_its_first_update(folder, chat):
    policy = make_policy(folder, chat, learning_rate=0.3, warmup_updates=3)
    batch = join([make_row(chat, policy.layout, seed=1)])
    rates = [finalise(policy.update([batch], supervised))["update/learning_rate"] for _ in range(4)]
    policy.close()
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.3])


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_bf16_keeps_positions_in_float32_and_stays_close(folder, chat, zero_stage):
    policy = make_policy(folder, chat, precision="bf16", zero_stage=zero_stage)
    exact = make_policy(folder, chat)
    rows = some_rows(chat, policy.layout)
    found, wanted = policy.logprobs(join(rows)), exact.logprobs(join(rows))
    kinds = {
        name: buffer.dtype for name, buffer in policy.model.named_buffers() if "inv_freq" in name
    }
    norm = finalise(policy.update([join(rows)], supervised))["update/grad_norm"]
    policy.close()
    exact.close()
    assert kinds and set(kinds.values()) == {torch.float32}
    torch.testing.assert_close(found, wanted, atol=3e-2, rtol=0)
    assert norm > 0


def test_a_reference_policy_is_asked_for_only_with_a_kl_penalty(policy, rows):
    batches = policy.with_old_logprobs([join(rows)])
    penalised = partial(policy_gradient, grpo, kl_coefficient=0.1)
    with pytest.raises(LearnerError, match="no reference_logprobs"):
        policy.update(batches, penalised())
    anchored = replace(batches[0], reference_logprobs=batches[0].old_logprobs)
    assert finalise(policy.update([anchored], penalised()))["policy/ref_kl"] == pytest.approx(0.0)


def test_an_entropy_bonus_spreads_the_policy_and_wants_entropies_measured(folder, chat):
    policy = make_policy(folder, chat)
    batches = policy.with_old_logprobs([join(some_rows(chat, policy.layout))])
    bonus = policy_gradient(no_surrogate, entropy_coefficient=1.0)
    entropies = [finalise(policy.update(batches, bonus))["policy/entropy"] for _ in range(2)]
    policy.close()
    assert entropies[1] > entropies[0] > 6
    blind = make_policy(folder, chat, measure_entropy=False)
    with pytest.raises(LearnerError, match="does not measure"):
        blind.update(batches, bonus)
    assert "policy/entropy" not in blind.update(batches, policy_gradient(grpo))
    blind.close()


def no_surrogate(batch):
    """A loss of 0, so that only penalties and bonuses are left."""
    return LossOutput(per_token=batch.logprobs * 0, metrics={})


def test_the_pictures_of_the_next_micro_batch_are_made_while_one_is_computed(policy, chat):
    made, threads = [], set()
    second_asked = threading.Event()

    def watched(images):
        made.append([image.sha256 for image in images])
        threads.add(threading.current_thread().name)
        if len(made) == 2:
            second_asked.set()
        return chat.pixels(images)

    batches = [join([row]) for row in some_rows(chat, policy.layout) if row.images]
    wanted = policy.logprobs_of_all(batches)
    scorer = replace(policy._score, pixels=watched)
    found = []
    for number, (batch, inputs) in enumerate(scorer.ahead(batches)):
        # Nothing was asked for beyond the next, and that is asked before this one is computed.
        assert second_asked.wait(timeout=60)
        assert len(made) <= number + 2
        found.append(scorer(batch, inputs)[0].detach())
    assert made == [[image.sha256 for image in batch.images[0]] for batch in batches]
    assert threading.current_thread().name not in threads
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours, theirs)
    assert list(scorer.ahead([])) == []


def test_a_picture_that_cannot_be_made_ends_the_update_with_its_own_error(policy, chat):
    def broken(images):
        raise AlignmentError("image 3")

    batches = [join([row]) for row in some_rows(chat, policy.layout) if row.images]
    with pytest.raises(AlignmentError, match="image 3"):
        list(replace(policy._score, pixels=broken).ahead(batches))


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_an_update_without_its_idle_rows_is_the_update_with_them(
    folder, chat, policy, rows, aggregation
):
    """Rows without an advantage divide every mean and have no gradient; also where all are so."""
    idle = [replace(row, advantages=np.zeros(row.num_trained)) for row in rows[:2]]
    objective = policy_gradient(grpo, is_only_update=True)
    tokens, changes = [], []
    for skip in (False, True):
        before = weights_of(policy)
        batches = pack([*([] if skip else idle), *rows[2:]], budget_tokens=60)
        batches = counting(batches, idle if skip else [])
        tokens.append(sum(batch.num_tokens for batch in batches))
        metrics = policy.update(batches, objective, aggregation=aggregation)
        after = weights_of(policy)
        changes.append({name: after[name] - before[name] for name in after})
        with torch.no_grad():
            for name, parameter in policy.model.named_parameters():
                parameter.copy_(before[name])
        loss = float(finalise(metrics)["update/loss"])
        changes[-1]["loss"] = torch.tensor(loss)
    assert tokens[0] - tokens[1] == sum(len(row.tokens) for row in idle)
    for name, wanted in changes[0].items():
        torch.testing.assert_close(changes[1][name], wanted, atol=1e-6, rtol=1e-4, msg=name)
    updates = policy.updates
    policy.update(counting([], idle), objective)
    assert policy.updates == updates + 1, "a momentum moves the weights also without gradients"


def test_the_boundaries_are_made_once_for_all_layers(folder, chat, policy, rows, monkeypatch):
    seen = []
    real = attention.packed_attention

    def spy(*args, boundaries, **kwargs):
        seen.append(boundaries)
        return real(*args, boundaries=boundaries, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, attention.PACKED, spy)
    policy.logprobs(join(rows))
    assert len(seen) == policy.model.config.text_config.num_hidden_layers > 1
    assert {id(boundaries) for boundaries in seen} == {id(seen[0])}
    assert seen[0].on_device.tolist() == list(seen[0].ends)
    lengths = [len(row.tokens) for row in rows]
    assert list(seen[0].ends) == np.cumsum([0, *lengths]).tolist()
    assert seen[0].longest == max(lengths)
