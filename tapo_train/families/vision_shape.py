"""The size of a vision tower as a few integers, and the arithmetic it takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionShape:
    """The vision tower."""

    layers: int
    hidden: int
    intermediate: int
    mlp_matrices: int
    """3 with a gate (Qwen2.5-VL), 2 without (Qwen3-VL)."""
    patch_width: int
    """Numbers per patch."""
    merge_size: int
    """Patches per side that become one token."""
    out: int
    """Width of the language model."""
    mergers: int
    """1, and one for each layer whose features go to the language model as well."""
    window: int | None
    """[patches] a windowed layer attends to; None if every layer sees the whole picture."""
    full_layers: int
    """Layers that see the whole picture."""
    positions: int
    """Rows of the table of learned positions; 0 without one."""

    @property
    def layer_weights(self) -> int:
        """Elements of one layer's matrices."""
        return 4 * self.hidden**2 + self.mlp_matrices * self.hidden * self.intermediate

    @property
    def merger_weights(self) -> int:
        """Elements of one merger's matrices."""
        wide = self.hidden * self.merge_size**2
        return wide * wide + wide * self.out

    @property
    def weights(self) -> int:
        """Elements of all matrices and tables."""
        return (
            self.layers * self.layer_weights
            + self.mergers * self.merger_weights
            + (self.patch_width + self.positions) * self.hidden
        )

    def forward_flop(self, patches: int) -> float:
        """FLOP of a forward pass over one picture."""
        dense = self.layers * self.layer_weights + self.patch_width * self.hidden
        merged = self.mergers * self.merger_weights / self.merge_size**2
        seen = self.full_layers * patches
        if self.window is not None:
            seen += (self.layers - self.full_layers) * min(self.window, patches)
        return patches * (2.0 * (dense + merged) + 4.0 * self.hidden * seen)


NO_VISION = VisionShape(
    layers=0,
    hidden=0,
    intermediate=0,
    mlp_matrices=0,
    patch_width=0,
    merge_size=1,
    out=0,
    mergers=0,
    window=None,
    full_layers=0,
    positions=0,
)
"""A model without a tower."""
