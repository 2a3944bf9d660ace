"""The size of a model as a few integers, and the arithmetic it takes.

Formulas over the numbers of `config.json`: no model is built, nothing is downloaded. They
serve the balance over ranks, the memory model and the benchmarks' floors.

FLOP are those of matrix products (2 m n k), the only ones that count at scale.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tapo_train.errors import ConfigError
from tapo_train.families import family_of
from tapo_train.families.vision_shape import VisionShape

BACKWARD = 2
"""A backward pass computes two products for each of the forward pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A language model, and its vision tower if there is one."""

    layers: int
    hidden: int
    intermediate: int
    """Width that a token goes through: of its experts together, in a mixture of them."""
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    is_tied: bool
    """Whether head and embedding are one matrix."""
    vision: VisionShape
    all_experts: int | None = None
    """Width of all experts together; None without."""

    @classmethod
    def of(cls, config: Any) -> ModelShape:
        """Read a Hugging Face configuration.

        Raises:
            ConfigError: the model is of no known family.
        """
        text = config.get_text_config()
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        experts = getattr(text, "num_experts", None)
        return cls(
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            intermediate=(
                text.num_experts_per_tok * text.moe_intermediate_size
                if experts
                else text.intermediate_size
            ),
            all_experts=experts * text.moe_intermediate_size if experts else None,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            head_dim=head_dim,
            vocabulary=text.vocab_size,
            is_tied=bool(config.tie_word_embeddings),
            vision=family_of(config.model_type).vision_shape(config),
        )

    @classmethod
    def read(cls, folder: Path) -> ModelShape:
        """The shape of the model in a folder, from its `config.json` alone: no library is loaded.

        Raises:
            ConfigError: the file is not there, or does not say every number.
        """
        path = folder / "config.json"
        try:
            return cls.of(_Section(json.loads(path.read_bytes())))
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise ConfigError(
                f"{path}: {type(error).__name__}: {error}; wanted all numbers of a model"
            ) from error

    @property
    def layer_weights(self) -> int:
        """Elements of one layer's matrices."""
        return self._attention_weights + 3 * self.hidden * (self.all_experts or self.intermediate)

    @property
    def _attention_weights(self) -> int:
        return 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)

    @property
    def head_weights(self) -> int:
        """Elements of the LM head, and of the embedding."""
        return self.vocabulary * self.hidden

    @property
    def text_weights(self) -> int:
        """Elements of the language model's matrices; a tied head counts once."""
        tables = 1 if self.is_tied else 2
        return self.layers * self.layer_weights + tables * self.head_weights

    @property
    def weights(self) -> int:
        """Elements of all matrices; norms and biases, below 1 % even of a tiny model, left out."""
        return self.text_weights + self.vision.weights

    def forward_flop(self, *, tokens: int, trained: int, patches: Sequence[int] = ()) -> float:
        """FLOP of a forward pass over one trajectory.

        Args:
            tokens: its length, image tokens included; attention is causal within it.
            trained: tokens whose log-probability is computed.
            patches: of each of its pictures.
        """
        used = self._attention_weights + 3 * self.hidden * self.intermediate
        dense = 2.0 * tokens * self.layers * used
        attention = 2.0 * self.layers * self.heads * self.head_dim * tokens * (tokens + 1)
        head = 2.0 * trained * self.head_weights
        return dense + attention + head + sum(self.vision.forward_flop(n) for n in patches)

    def update_flop(self, *, tokens: int, trained: int, patches: Sequence[int] = ()) -> float:
        """FLOP of forward and backward pass, nothing computed twice."""
        forward = self.forward_flop(tokens=tokens, trained=trained, patches=patches)
        return (1 + BACKWARD) * forward


class _Section:
    """A JSON object read as a Hugging Face configuration."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def __getattr__(self, name: str) -> Any:
        if name not in self._values:
            raise AttributeError(name)
        value = self._values[name]
        return _Section(value) if isinstance(value, dict) else value

    def get_text_config(self) -> _Section:
        """Where the language model's numbers are; Qwen2.5-VL once wrote them outside."""
        return _Section(self._values.get("text_config") or self._values)


QWEN3_VL_4B = ModelShape(
    layers=36,
    hidden=2560,
    intermediate=9728,
    heads=32,
    kv_heads=8,
    head_dim=128,
    vocabulary=151_936,
    is_tied=True,
    vision=VisionShape(
        layers=24,
        hidden=1024,
        intermediate=4096,
        mlp_matrices=2,
        patch_width=1536,
        merge_size=2,
        out=2560,
        mergers=4,
        window=None,
        full_layers=24,
        positions=2304,
    ),
)
"""Qwen3-VL-4B-Instruct."""

QWEN3_VL_8B = ModelShape(
    layers=36,
    hidden=4096,
    intermediate=12_288,
    heads=32,
    kv_heads=8,
    head_dim=128,
    vocabulary=151_936,
    is_tied=False,
    vision=VisionShape(
        layers=27,
        hidden=1152,
        intermediate=4304,
        mlp_matrices=2,
        patch_width=1536,
        merge_size=2,
        out=4096,
        mergers=4,
        window=None,
        full_layers=27,
        positions=2304,
    ),
)
"""Qwen3-VL-8B-Instruct."""

PUBLISHED = {"Qwen3-VL-4B-Instruct": QWEN3_VL_4B, "Qwen3-VL-8B-Instruct": QWEN3_VL_8B}
"""By the name of the folder that the model is published in."""
