"""Families of models: one object each, found from `model_type`; docs/models.md says what holds.

A family of your own is a file and its line in `FAMILIES`.
"""

from __future__ import annotations

from tapo_train.errors import ConfigError
from tapo_train.families.family import Family, PackedInputs, PictureIds
from tapo_train.families.glm_v import GLM_4V
from tapo_train.families.intern_vl import INTERN_VL
from tapo_train.families.qwen_vl import QWEN2_5_VL, QWEN3_5, QWEN3_VL
from tapo_train.families.text import LLAMA, QWEN2, QWEN3

__all__ = ["FAMILIES", "Family", "PackedInputs", "PictureIds", "family_of"]

FAMILIES: list[Family] = [QWEN2_5_VL, QWEN3_VL, QWEN3_5, GLM_4V, INTERN_VL, LLAMA, QWEN2, QWEN3]
"""Families whose packing, positions, pictures and chat are known and tested."""


def family_of(model_type: str, *, where: str = "") -> Family:
    """The family of a configuration's `model_type`.

    Args:
        where: what the configuration belongs to, for the message.

    Raises:
        ConfigError: it is of none.
    """
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = "; ".join(f"{', '.join(family.model_types)} ({family.name})" for family in FAMILIES)
    raise ConfigError(
        f"model.path: found a model of type {model_type!r}{where}; wanted one of {known}, "
        "or a family of your own (docs/models.md)"
    )
