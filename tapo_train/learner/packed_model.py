"""The model as the learner runs it: packed attention, head on the trained tokens only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import linear

from tapo_train.errors import LearnerError
from tapo_train.families import family_of
from tapo_train.learner import adapter, engine
from tapo_train.learner.attention import PACKED, Boundaries
from tapo_train.learner.head import LogprobHead
from tapo_train.learner.inputs import ModelInputs
from tapo_train.learner.sequence import ALONE, SequenceGroup
from tapo_train.learner.settings import LearnerSettings
from tapo_train.rollout.model_folder import family_in


class PackedModel(nn.Module):
    """Body on all tokens, head on the trained ones: the module DeepSpeed wraps.

    Args:
        sequence: the ranks that share each micro-batch.
    """

    def __init__(self, model: Any, sequence: SequenceGroup = ALONE) -> None:
        super().__init__()
        self.model = model
        self.family = family_of(model.config.model_type)
        self.sequence = sequence

    def forward(
        self, inputs: ModelInputs, trained_index: Tensor, targets: Tensor, **head: Any
    ) -> Tensor:
        """Log-probabilities and entropies [2, K]; see `LogprobHead` for the keywords."""
        body, part = self.model.model, self.sequence.part(inputs.input_ids.shape[1])

        def placed(features: Sequence[Tensor]) -> list[Tensor]:
            shown = [features[i] for i in inputs.pictures]
            return self.sequence.features(shown, inputs.token_types[0], part)

        hidden = body(
            input_ids=inputs.input_ids[:, part],
            position_ids=inputs.positions[..., part],
            **self.family.body_inputs(body, inputs, part, placed),
            use_cache=False,
            boundaries=Boundaries.of(inputs.boundaries, inputs.input_ids.device),
            sequence=self.sequence,
        )[0]
        own = self.sequence.entries(trained_index, part)
        answer = self.model.lm_head(
            hidden[0, trained_index[own] - part.start], targets[own], **head
        )
        return self.sequence.all_entries(answer, own, len(targets))


class PatchProjection(nn.Conv3d):
    """A convolution whose kernel covers its input: one matrix product.

    Same parameters, same numbers; the general convolution is several times slower on CPU
    and in bf16 on GPUs.
    """

    def forward(self, patches: Tensor) -> Tensor:
        """[P, channels, t, h, w] patches of the kernel's size to [P, width, 1, 1, 1]."""
        flat = linear(patches.flatten(1), self.weight.flatten(1), self.bias)
        return flat[:, :, None, None, None]


def load(folder: Path, *, settings: LearnerSettings, device: torch.device) -> Any:
    """The Hugging Face model of `folder`, prepared for `PackedModel`; sharded under ZeRO-3.

    Raises:
        LearnerError: its head has a bias.
    """
    family = family_in(folder)
    with engine.sharded_loading(settings=settings, device=device):
        model = getattr(transformers, family.auto_class).from_pretrained(
            folder,
            dtype=torch.bfloat16 if settings.precision == "bf16" else torch.float32,
            attn_implementation=family.attention(PACKED),
        )
    if model.lm_head.bias is not None:
        raise LearnerError(f"{folder}: the LM head has a bias; wanted none")
    model.lm_head = LogprobHead.around(model.lm_head)
    if family.patch_projection is not None:
        projection = model.model.get_submodule(family.patch_projection)
        if projection.kernel_size == projection.stride:
            projection.__class__ = PatchProjection
    if settings.adapter is not None:
        places = family.language if settings.freeze_vision else ""
        adapter.add(model, settings=settings.adapter, places=f"model.{places}")
    elif settings.freeze_vision:
        for tower in family.tower:
            model.model.get_submodule(tower).requires_grad_(False)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model
