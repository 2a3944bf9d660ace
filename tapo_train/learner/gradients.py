"""The gradient of a step: scaling over ranks, finiteness, norm and clipping.

DeepSpeed averages gradients over ranks; the shares of a step's loss are to be summed,
so each is multiplied by the number of ranks. In a sequence group all ranks have the same
shares and each a part of their gradient, so the same factor holds. Nothing that is not
finite reaches the weights: the loss is checked on all ranks before the step, the gradient
inside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tapo_train.errors import LearnerError, NonFiniteError
from tapo_train.learner import distributed, engine
from tapo_train.learner.batch import MicroBatch
from tapo_train.learner.settings import LearnerSettings


class GradientGuard:
    """Backward passes and the step of one engine."""

    def __init__(self, stepped: Any, *, settings: LearnerSettings) -> None:
        self._engine = stepped
        self._settings = settings
        self._norm = 0.0
        if settings.plain_optimizer:
            # Between the reduction of the gradients and the optimizer's step.
            stepped.optimizer.register_step_pre_hook(self._clip)

    def backward(self, share: Tensor) -> None:
        """Add the gradient of this micro-batch's share of the loss."""
        self._engine.backward(share * distributed.world_size(), scale_wrt_gas=False)

    def finite_loss(self, shares: Sequence[Tensor], batches: Sequence[MicroBatch]) -> float:
        """The step's loss over all ranks.

        Raises:
            NonFiniteError: on every rank, if it is not finite on any.
        """
        values = torch.stack(list(shares)).double().tolist()
        (loss,) = distributed.all_reduce_sum([sum(values)])
        loss /= self._settings.sequence_parallel
        if loss == loss and abs(loss) != float("inf"):
            return loss
        wrong = [
            f"{value} in the micro-batch of rows {', '.join(batch.row_ids)}"
            for value, batch in zip(values, batches, strict=True)
            if not abs(value) < float("inf")
        ]
        raise NonFiniteError(
            f"the loss of the step is {loss}; wanted a finite number. "
            f"On rank {distributed.rank()}: {'; '.join(wrong) or 'finite everywhere'}"
        )

    def discard(self, share: Tensor) -> None:
        """Forget the gradients of a step that is not taken; `share` hangs on every weight.

        Sharded gradients are in buffers that only a step empties, so they are made not finite
        for certain and a step is tried: the engine skips it and clears up.

        Raises:
            LearnerError: the step was taken.
        """
        self.backward(share * float("nan"))
        try:
            self.step()
        except NonFiniteError:
            return
        raise LearnerError("a step with gradients that are not numbers was not skipped")

    def step(self) -> float:
        """Step the optimizer and the schedule; the gradient's 2-norm before clipping.

        Raises:
            NonFiniteError: the gradient is not finite; no weight has changed.
        """
        try:
            self._engine.step()
        except NonFiniteError:
            engine.abandon_step(self._engine)
            raise
        if not self._settings.plain_optimizer:
            self._norm = float(self._engine.get_global_grad_norm())
        if not self._engine.was_step_applied():
            engine.forget_sums(self._engine)
            raise NonFiniteError(_not_finite(self._norm))
        return self._norm

    def _clip(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        grads = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        # In float64 as DeepSpeed's own: a float32 sum over an embedding is off by 1e-5.
        norms = torch._foreach_norm(grads, dtype=torch.float64)
        self._norm = float(torch.linalg.vector_norm(torch.stack(norms)))
        if not self._norm < float("inf"):
            raise NonFiniteError(_not_finite(self._norm))
        limit = self._settings.max_grad_norm
        if limit and self._norm > limit:
            torch._foreach_mul_(grads, limit / self._norm)


def _not_finite(norm: float) -> str:
    return f"the norm of the step's gradient is {norm}; wanted a finite number"
