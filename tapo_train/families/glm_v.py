"""GLM-4.1V and its heirs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tapo_train.errors import ConfigError
from tapo_train.families.grid_pictures import GridPictures


@dataclass(frozen=True, slots=True, kw_only=True)
class GlmPictures(GridPictures):
    """See `Family`."""

    def check(self, config: Any) -> None:
        """See `Family.check`."""
        # transformers always has biases of queries, keys and values. vLLM builds them only if the
        # configuration says so, and drops what it is sent of them without a word.
        if not getattr(config.get_text_config(), "attention_bias", False):
            raise ConfigError(
                "text_config.attention_bias in config.json: found none or false; wanted true, as "
                f"{self.name} has biases of queries, keys and values, and vLLM would leave them out"
            )


GLM_4V = GlmPictures(
    name="GLM-4.1V",
    model_types=("glm4v",),
    placeholder="<|image|>",
    opening="image_start_token_id",
    closing="image_end_token_id",
)
