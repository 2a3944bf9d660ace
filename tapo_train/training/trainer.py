"""The training step on one screen, and the loop around it.

    rollout with rewards → process → advantage → credit → batch → update → sync

Variation is in the parts (`build/` chooses them), never in an `if` here: no credit
stage is `NoTransfer`, no importance correction is `uncorrected`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from tapo_train.algos.metrics import Metrics, merge
from tapo_train.credit.result import CreditResult
from tapo_train.data.sampler import shard
from tapo_train.errors import CheckpointError, OutageError, ToolBudgetError
from tapo_train.learner import distributed, random_state
from tapo_train.learner.batch import MicroBatch, join
from tapo_train.learner.idle import apart, counting
from tapo_train.report.sinks import Sink, write_all
from tapo_train.training.ages import credit_by_age
from tapo_train.training.interruption import Ending, StepGivenUp
from tapo_train.training.parts import Parts, Schedule, Stateful
from tapo_train.training.probe import Agreement
from tapo_train.training.step_batch import Batch, compared, credit_rows, rows_of_updates
from tapo_train.training.step_metrics import Stopwatch, step_metrics
from tapo_train.training.validation import Validation, validated
from tapo_train.types import Group


class Trainer:
    """Runs the loop on every rank of a process group."""

    def __init__(self, parts: Parts, schedule: Schedule) -> None:
        self._parts = parts
        self._schedule = schedule
        self._saved_steps = 0

    def fit(self, open_sinks: Callable[[int], Sequence[Sink]]) -> bool:
        """Resume if there is something to resume, train, validate, save.

        Args:
            open_sinks: makes the sinks, told the first step that will be done.

        Returns:
            Whether all steps are done; if not, the run was asked to stop and has saved itself.
        """
        parts, first = self._parts, self._resume()
        # Opening the sinks checks that the folder holds this very run, so before deleting.
        sinks = open_sinks(first)
        distributed.barrier()
        parts.dump.discard_from(first)
        self._sync(first)
        try:
            with parts.interruption.listening():
                done = self._run(first, sinks)
        finally:
            parts.rounds.close()
            for sink in sinks:
                sink.close()
        distributed.barrier()
        return done

    def _run(self, first: int, sinks: Sequence[Sink]) -> bool:
        """Steps until one ends the run; whether all are done. Every checkpoint is written then."""
        steps = range(first, self._schedule.steps)
        ending = next((found for step in steps if (found := self._one(step, sinks))), None)
        self._finish_writing()
        if ending is not None and ending.error is not None:
            raise ending.error
        return ending is None

    def _one(self, step: int, sinks: Sequence[Sink]) -> Ending | None:
        """A step, validation, warnings, log and checkpoint; None if the run goes on."""
        schedule, before, draws = self._schedule, self._state(step - 1), random_state.collect()
        try:
            metrics = self.step(step)
        except (StepGivenUp, ToolBudgetError, OutageError) as reason:
            random_state.restore(*draws)
            self._take_back(before)
            return Ending(error=None if isinstance(reason, StepGivenUp) else reason)
        # An error from here on ends the run, but the step is done, and was paid for.
        validation = self._validation_of(step)
        metrics |= validation.metrics
        metrics |= self._parts.watch.observe(metrics)
        write_all(sinks, step, metrics)
        stop = self._agreed_to_stop()
        if stop or validation.error or _is_due(step, schedule.save_every, schedule.steps):
            self._save(self._state(step), validation.score)
        if error := validation.error or self._parts.watch.collapse():
            return Ending(error=error)
        return Ending() if stop and step + 1 < schedule.steps else None

    def _take_back(self, before: Mapping[str, Any]) -> None:
        """A step was given up: the run goes on from the state before it, but its calls are paid."""
        self._parts.rounds.close()
        self._parts.audit.keep()
        if before["step"] + 1 > self._saved_steps:
            self._save(before)

    def _validation_of(self, step: int) -> Validation:
        """What the validation after a step showed, if one is due."""
        schedule = self._schedule
        if not schedule.eval_every or not _is_due(step, schedule.eval_every, schedule.steps):
            return Validation()
        self._parts.watchdog.enter("validation")
        return self.validate(step + 1)

    def step(self, step: int) -> dict[str, float]:
        """One batch of questions from rollout to synced weights; its metrics."""
        watch = Stopwatch(on_stage=self._parts.watchdog.enter)
        with watch("rollout"):
            rolled = self._parts.rounds(step)
        groups, played = rolled.groups, [*rolled.groups, *rolled.replaced]
        with watch("audit"):
            audited = self._parts.audit(played)
        with watch("process"):
            groups, processed = self._parts.process(groups)
        with watch("advantage"):
            batch = self._advantages(groups, rolled.questions)
        with watch("credit"):
            credit = self._credit(batch)
        self._parts.sharing.learning()
        with watch("batch"):
            updates, balance = self._cut(step, batch, credit)
        with watch("update"):
            learned = merge(self._update(step, updates), balance)
        with watch("sync"):
            agreement = self._sync(step + 1)
        with watch("dump"):
            self._dump(step, batch, credit)
        return (
            audited
            | dict(rolled.metrics)
            | dict(processed)
            | step_metrics(
                played,
                advantages=batch.advantages.rows,
                credit_sums={**credit.sums, **credit_by_age(batch, credit, step)},
                learned=learned,
                probe=agreement.metrics(),
                seconds=watch.seconds,
                memory=watch.memory,
            )
        )

    def validate(self, policy_version: int) -> Validation:
        """Greedy accuracy on the validation questions, shared among the ranks."""
        parts = self._parts
        if not parts.validation:
            return Validation()
        mine = shard(parts.validation, distributed.rank(), distributed.world_size())
        groups = parts.play(mine, rollouts=1, greedy=True, policy_version=policy_version)
        return validated([t for group in groups for t in group.trajectories], parts.audit)

    def _resume(self) -> int:
        """The first step to do."""
        state = self._parts.checkpoints.load_latest()
        if state is None:
            return 0
        parts = self._stateful()
        for name in parts.keys() & state["parts"].keys():
            parts[name].load_state_dict(state["parts"][name])
        self._saved_steps = int(state["step"]) + 1
        return self._saved_steps

    def _agreed_to_stop(self) -> bool:
        """Whether any rank was asked to stop.

        Raises:
            CheckpointError, OSError: on all ranks, if one could not write its checkpoint.
        """
        parts = self._parts
        worst = 2 if parts.checkpoints.has_failed else int(parts.interruption.is_requested)
        worst = distributed.all_reduce_max(worst)
        if worst == 2:
            if parts.checkpoints.has_failed:
                parts.checkpoints.wait()
            raise CheckpointError("another rank could not write the last checkpoint; it says why")
        return worst == 1

    def _save(self, state: Mapping[str, Any], score: float | None = None) -> None:
        self._parts.watchdog.enter("checkpoint")
        self._parts.checkpoints.save(state["step"], state, score)
        self._saved_steps = state["step"] + 1

    def _finish_writing(self) -> None:
        """Until the last checkpoint is whole, on all ranks together.

        A rank that ended before would have its launcher kill the one that still writes.
        """
        self._parts.watchdog.enter("checkpoint")
        self._parts.checkpoints.wait()
        distributed.barrier()

    def _state(self, step: int) -> dict[str, Any]:
        """What `_resume` wants back."""
        states = {name: part.state_dict() for name, part in self._stateful().items()}
        return {"step": step, "parts": states}

    def _stateful(self) -> dict[str, Stateful]:
        """What a resumed run needs besides the policy, by name."""
        parts = self._parts
        return {"order": parts.order, "rounds": parts.rounds, **parts.stateful}

    def _advantages(self, groups: Sequence[Group], questions: Sequence[int]) -> Batch:
        """Advantages over the rows of all ranks; ranks wait for the slowest rollout here."""
        return compared(
            groups,
            questions,
            self._parts.advantage,
            drop_uniform_groups=self._schedule.drop_uniform_groups,
        )

    def _credit(self, batch: Batch) -> CreditResult:
        """Per-turn advantages of this rank's rows, whole groups; all ranks call it."""
        return self._parts.credit(credit_rows(batch))

    def _cut(
        self, step: int, batch: Batch, credit: CreditResult
    ) -> tuple[list[list[MicroBatch]], Metrics]:
        """Micro-batches of each update: contiguous questions, the same for any number of ranks.

        And how even the ranks' work is.
        """
        schedule = self._schedule
        cuts = rows_of_updates(
            batch,
            credit,
            version=step,
            updates=schedule.updates_per_batch,
            questions=schedule.questions_per_step,
        )
        balance: Metrics = {}
        packed = []
        for rows in cuts:
            active, idle = apart(rows) if schedule.skip_idle_rows else (rows, [])
            mine, evenness = self._parts.exchange(active)
            balance = merge(balance, evenness)
            packed.append(counting([join(together) for together in mine], idle))
        if schedule.recompute_old_logprobs:
            packed = [self._parts.policy.with_old_logprobs(batches) for batches in packed]
        anchored = [self._parts.reference(batches) for batches in packed]
        return anchored * schedule.epochs, balance

    def _update(self, step: int, updates: Sequence[Sequence[MicroBatch]]) -> Metrics:
        metrics: Metrics = {}
        for number, micro_batches in enumerate(updates):
            update = partial(
                self._parts.policy.update,
                micro_batches,
                self._parts.objective,
                aggregation=self._schedule.aggregation,
                norm_length=self._schedule.norm_length,
                observe=self._parts.dump.observer(step),
            )
            name = f"step_{step:06d}.update_{number}"
            metrics = merge(metrics, self._parts.nonfinite(update, micro_batches, name=name))
        return metrics

    def _sync(self, version: int) -> Agreement:
        """Hand the weights to the engine, and see that it has become the learner's policy."""
        parts = self._parts
        parts.sharing.sampling()
        parts.engine.load_weights(parts.policy.named_weights(), version=version)
        return parts.probe(parts.policy, parts.engine, version=version)

    def _dump(self, step: int, batch: Batch, credit: CreditResult) -> None:
        found = batch.advantages
        turns = None if found.turns is None else [own.tolist() for own in found.turns]
        self._parts.dump.write(step, batch.trajectories, found.rows.tolist(), credit, turns)


def _is_due(step: int, every: int, steps: int) -> bool:
    """At every `every`-th step, and at the last."""
    return (every > 0 and (step + 1) % every == 0) or step + 1 == steps
