"""The exceptions of this package, as one tree.

    TapoError
    ├── ConfigError            a recipe or override is wrong (names the dotted path)
    ├── DataError              a task, rollout or world file is wrong (names file and line)
    ├── RolloutError           the sampler cannot go on
    │   ├── AlignmentError     image tokens and image features disagree
    │   ├── EngineError        the engine refused or lost a request
    │   │   └── EngineLostError    an engine process is gone, silent or not one of ours
    │   ├── OutageError        more trajectories failed outside the policy than may
    │   ├── ReplayMissError    a replayed run asked for a call that was never recorded
    │   └── ToolBudgetError    the next call would cost more than tools.budget has left
    ├── ToolError              a tool call failed; carries the outcome it is recorded as
    │   ├── ToolArgumentError  the policy's arguments are wrong (outcome model_error)
    │   ├── ToolRefusedError   a guard refused the call (outcome refused)
    │   ├── ToolStatusError    a server answered "no" (HTTP 4xx)
    │   └── ToolDownError      its back end is out of order (outcome infra_error)
    ├── CreditError            advantages or steps handed to the credit stage are impossible
    ├── LearnerError           the update cannot go on (non-finite loss, empty batch, ...)
    │   ├── NonFiniteError     a loss or gradient is not finite; the weights are untouched
    │   └── CheckpointError    a checkpoint is damaged or does not fit (names the file)
    ├── ProbeError             engine and learner disagree after a weight sync
    └── CollapseError          a sign of collapse has held for as long as watch.stop_after allows

Each message says what is wrong, where, what was found and what would be right.
"""

from __future__ import annotations

__all__ = [
    "AlignmentError",
    "CheckpointError",
    "CollapseError",
    "ConfigError",
    "CreditError",
    "DataError",
    "EngineError",
    "EngineLostError",
    "LearnerError",
    "NonFiniteError",
    "OutageError",
    "ProbeError",
    "ReplayMissError",
    "RolloutError",
    "TapoError",
    "ToolArgumentError",
    "ToolBudgetError",
    "ToolDownError",
    "ToolError",
    "ToolRefusedError",
    "ToolStatusError",
]


class TapoError(Exception):
    """Root of every error this package raises on purpose."""


class ConfigError(TapoError, ValueError):
    """A recipe or an override is wrong."""


class DataError(TapoError, ValueError):
    """An input file is malformed; the message names the file and the line.

    Args:
        kind: what is wrong, for whoever counts.
    """

    def __init__(self, message: str, *, kind: str = "other") -> None:
        super().__init__(message)
        self.kind = kind


class RolloutError(TapoError, RuntimeError):
    """The sampler cannot go on."""


class AlignmentError(RolloutError):
    """The number of image tokens differs from the number of image features."""


class EngineError(RolloutError):
    """The inference engine refused or lost a request."""


class OutageError(RolloutError):
    """More trajectories failed outside the policy than `rollout.max_failed_fraction` bears."""


class ReplayMissError(RolloutError):
    """A strict replay has no answer to a call; the run is no longer the recorded one and ends."""


class ToolBudgetError(RolloutError):
    """The next tool call would cost more than the run may still spend."""


class EngineLostError(EngineError):
    """The connection to an engine process, or to its client, cannot be used any more."""


class ToolError(TapoError, RuntimeError):
    """A tool call failed for a reason outside the policy."""


class ToolArgumentError(ToolError, ValueError):
    """The policy's arguments are wrong; the message is shown to the policy."""


class ToolStatusError(ToolError):
    """A server answered "no" (HTTP 4xx)."""

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


class ToolRefusedError(ToolError):
    """A guard refused the call; the message is shown to the policy."""


class ToolDownError(ToolError):
    """A tool's back end cannot be reached, broke, or answers nonsense: nobody's judgement."""

    def __init__(self, message: str, *, retryable: bool = True, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retryable = retryable
        """Whether the same call may succeed a moment later."""
        self.retry_after_s = retry_after_s
        """[s] for which the server asks to be left alone; 0 if it does not say."""


class CreditError(TapoError, ValueError):
    """The credit stage was given impossible input (NaN advantage, applied twice, ...)."""


class LearnerError(TapoError, RuntimeError):
    """The update cannot go on."""


class NonFiniteError(LearnerError):
    """The loss or the gradient of an update is not finite; the weights are untouched."""


class CheckpointError(LearnerError):
    """A checkpoint is damaged or does not fit this run; the message names the file."""


class ProbeError(TapoError, RuntimeError):
    """Engine and learner log-probabilities of the probe differ by more than the tolerance."""


class CollapseError(TapoError, RuntimeError):
    """Training goes wrong in a way that the recipe asked to be stopped at."""
