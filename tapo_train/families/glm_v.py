"""GLM-4.1V and its heirs."""

from __future__ import annotations

from tapo_train.families.grid_pictures import GridPictures

GLM_4V = GridPictures(
    name="GLM-4.1V",
    model_types=("glm4v",),
    placeholder="<|image|>",
    opening="image_start_token_id",
    closing="image_end_token_id",
)
