"""The model as the learner runs it: packed attention, head on the trained tokens only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AutoModelForImageTextToText

from tapo_train.errors import LearnerError
from tapo_train.learner import adapter, engine
from tapo_train.learner.attention import PACKED
from tapo_train.learner.head import LogprobHead
from tapo_train.learner.inputs import ModelInputs
from tapo_train.learner.settings import LearnerSettings


class PackedModel(nn.Module):
    """Body on all tokens, head on the trained ones: the module DeepSpeed wraps."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, inputs: ModelInputs, trained_index: Tensor, targets: Tensor, **head: Any
    ) -> Tensor:
        """Log-probabilities and entropies [2, K]; see `LogprobHead` for the keywords."""
        body = self.model.model
        seen = body.get_image_features(inputs.pixel_values, inputs.grids, return_dict=True)
        seen.pooler_output = [seen.pooler_output[i] for i in inputs.pictures]
        if hasattr(seen, "deepstack_features"):
            seen.deepstack_features = [
                [layer[i] for i in inputs.pictures] for layer in seen.deepstack_features
            ]
        hidden = body(
            input_ids=inputs.input_ids,
            position_ids=inputs.positions,
            mm_token_type_ids=inputs.token_types,
            mm_encoder_outputs={"image": seen},
            use_cache=False,
            boundaries=inputs.boundaries,
        )[0]
        answer: Tensor = self.model.lm_head(hidden[0, trained_index], targets, **head)
        return answer


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
