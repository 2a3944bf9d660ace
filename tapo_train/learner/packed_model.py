"""The model as the learner runs it: packed attention, head on the trained tokens only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AutoModelForImageTextToText

from tapo_train.errors import LearnerError
from tapo_train.learner import adapter, engine
from tapo_train.learner.attention import PACKED, Boundaries
from tapo_train.learner.head import LogprobHead
from tapo_train.learner.inputs import ModelInputs
from tapo_train.learner.sequence import ALONE, SequenceGroup
from tapo_train.learner.settings import LearnerSettings


class PackedModel(nn.Module):
    """Body on all tokens, head on the trained ones: the module DeepSpeed wraps.

    Args:
        sequence: the ranks that share each micro-batch.
    """

    def __init__(self, model: Any, sequence: SequenceGroup = ALONE) -> None:
        super().__init__()
        self.model = model
        self.sequence = sequence

    def forward(
        self, inputs: ModelInputs, trained_index: Tensor, targets: Tensor, **head: Any
    ) -> Tensor:
        """Log-probabilities and entropies [2, K]; see `LogprobHead` for the keywords."""
        body, part = self.model.model, self.sequence.part(inputs.input_ids.shape[1])
        hidden = body(
            input_ids=inputs.input_ids[:, part],
            position_ids=inputs.positions[:, :, part],
            mm_token_type_ids=inputs.token_types[:, part],
            mm_encoder_outputs={"image": self._seen(inputs, part)},
            use_cache=False,
            boundaries=Boundaries.of(inputs.boundaries, inputs.input_ids.device),
            sequence=self.sequence,
        )[0]
        own = self.sequence.entries(trained_index, part)
        answer = self.model.lm_head(
            hidden[0, trained_index[own] - part.start], targets[own], **head
        )
        return self.sequence.all_entries(answer, own, len(targets))

    def _seen(self, inputs: ModelInputs, part: slice) -> Any:
        """The tower's output at the placeholders in `part`."""
        seen = self.model.model.get_image_features(
            inputs.pixel_values, inputs.grids, return_dict=True
        )

        def placed(features: Sequence[Tensor]) -> list[Tensor]:
            shown = [features[i] for i in inputs.pictures]
            return self.sequence.features(shown, inputs.token_types[0], part)

        seen.pooler_output = placed(seen.pooler_output)
        if hasattr(seen, "deepstack_features"):
            seen.deepstack_features = [placed(layer) for layer in seen.deepstack_features]
        return seen


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
    with engine.sharded_loading(settings=settings, device=device):
        model = AutoModelForImageTextToText.from_pretrained(
            folder,
            dtype=torch.bfloat16 if settings.precision == "bf16" else torch.float32,
            attn_implementation={"text_config": PACKED, "vision_config": "sdpa"},
        )
    if model.lm_head.bias is not None:
        raise LearnerError(f"{folder}: the LM head has a bias; wanted none")
    model.lm_head = LogprobHead.around(model.lm_head)
    projection = model.model.visual.patch_embed.proj
    if projection.kernel_size == projection.stride:
        projection.__class__ = PatchProjection
    if settings.adapter is not None:
        adapter.add(model, settings=settings.adapter, in_vision=not settings.freeze_vision)
    elif settings.freeze_vision:
        model.model.visual.requires_grad_(False)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model
