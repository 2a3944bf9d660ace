"""From a recipe to the parts of a run: the only package that knows both fields and classes."""

from __future__ import annotations

from tapo_train.build.algo import (
    build_advantage,
    build_correction,
    build_credit,
    build_objective,
    is_recomputed_in_passing,
)
from tapo_train.build.custom import require_custom_parts
from tapo_train.build.device import DEVICE
from tapo_train.build.engine import build_engine, engine_server
from tapo_train.build.learner import (
    build_exchange,
    build_policy,
    build_reference,
    build_sharing,
    learner_settings,
)
from tapo_train.build.limits import packed_tokens
from tapo_train.build.memory import require_memory
from tapo_train.build.outside import Endpoint, build_outside_play
from tapo_train.build.probe import build_probe
from tapo_train.build.questions import (
    build_order,
    chosen_tasks,
    playable_splits,
    playable_tasks,
    read_tasks,
    require_enough,
    validation_tasks,
)
from tapo_train.build.reward import build_scoring
from tapo_train.build.rollout import (
    build_chat,
    build_interruption,
    build_play,
    build_process,
)
from tapo_train.build.schedule import build_dump, build_schedule, build_watch
from tapo_train.build.stream import build_player, build_rounds
from tapo_train.build.tools import build_audit, build_toolbox

__all__ = [
    "DEVICE",
    "Endpoint",
    "build_advantage",
    "build_audit",
    "build_chat",
    "build_correction",
    "build_credit",
    "build_dump",
    "build_engine",
    "build_exchange",
    "build_interruption",
    "build_objective",
    "build_order",
    "build_outside_play",
    "build_play",
    "build_player",
    "build_policy",
    "build_probe",
    "build_process",
    "build_reference",
    "build_rounds",
    "build_schedule",
    "build_scoring",
    "build_toolbox",
    "build_sharing",
    "build_watch",
    "chosen_tasks",
    "engine_server",
    "is_recomputed_in_passing",
    "learner_settings",
    "packed_tokens",
    "require_custom_parts",
    "require_memory",
    "playable_splits",
    "playable_tasks",
    "read_tasks",
    "require_enough",
    "validation_tasks",
]
