"""What must be known of a family of models; everything else is shared.

A family without pictures is `Family` itself. One with pictures says, beside names, how a picture
becomes tokens, what the model's body takes, and where the positions come from. Nothing here
imports torch: the shape of a model is read where no heavy library is loaded.

Every picture has a grid (t, h, w) of patches and `prod / merge_size^2` placeholders, in every
family: where a model cuts a picture into tiles, t counts the tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from tapo_train.errors import AlignmentError
from tapo_train.families.vision_shape import NO_VISION, VisionShape

if TYPE_CHECKING:
    import PIL.Image
    from torch import Tensor

NO_ID = -1
"""Stands for the placeholder of a model without pictures: no token is equal to it."""

Place = Callable[[Sequence["Tensor"]], "list[Tensor]"]
"""Features of the distinct pictures -> those at the places where they are shown, in order."""


class PackedInputs(Protocol):
    """What `Family.body_inputs` reads of a micro-batch; see `learner.inputs.ModelInputs`."""

    @property
    def pixel_values(self) -> Tensor:
        """Of the distinct pictures."""

    @property
    def grids(self) -> Tensor:
        """[distinct, 3]"""

    @property
    def token_types(self) -> Tensor:
        """[1, S] 1 at placeholders."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureIds:
    """Token ids around pictures, and the smallest picture there is."""

    image: int
    """Placeholder; one per feature."""
    video: int | None
    """Never trained on; a token list that holds it is refused."""
    opening: tuple[int, ...]
    closing: tuple[int, ...]
    """What stands before and after the placeholders."""
    merge_size: int
    """Patches per side that become one token."""
    smallest: tuple[tuple[int, ...], tuple[int, int, int]]
    """Shape of its pixels, and its grid."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A causal language model without pictures, and what families with pictures say otherwise."""

    name: str
    """As its makers write it."""
    model_types: tuple[str, ...]
    """`model_type` of a folder's configuration."""
    auto_class: Literal["AutoModelForCausalLM", "AutoModelForImageTextToText"] = (
        "AutoModelForCausalLM"
    )
    """Of transformers."""
    packs: bool = True
    """Whether tokens of a row meet in attention alone, so that rows can be packed. False: a layer
    carries a state over the boundaries of rows, and each row goes alone."""
    end: str | None = None
    """Text of the token that closes a turn; None: what the chat template puts there."""
    banned: tuple[str, ...] | None = None
    """Control tokens that are never sampled. A sampled placeholder would promise an image that is
    not there; a message that is opened is not the policy's to open. None: all special ones but
    the end."""
    experts_transposed: bool = False
    """Whether folders, and so vLLM, have stacks of expert weights [experts, in, out], where
    transformers has [experts, out, in]."""
    placeholder: str | None = None
    """Text of the picture placeholder, as the chat template writes it; None: takes no pictures."""
    around: tuple[str, str] = ("", "")
    """Texts before and after a placeholder that the processor writes and the template does not."""
    language: str = ""
    """Where the language model's layers are in the body, with a final dot."""
    tower: tuple[str, ...] = ()
    """Modules of the body that only pictures go through."""
    patch_projection: str | None = None
    """Module of the body that projects patches; None: there is none that could be faster."""

    @property
    def sees(self) -> bool:
        """Whether it takes pictures."""
        return self.placeholder is not None

    def attention(self, packed: str) -> str | dict[str, str]:
        """Attention of the learner's model, where the language model's is `packed`."""
        return {"text_config": packed, "vision_config": "sdpa"} if self.sees else packed

    def check(self, config: Any) -> None:
        """Refuse a Hugging Face configuration of which engine and learner make different models.

        Raises:
            ConfigError: it is such a one.
        """

    def picture_ids(self, config: Any) -> PictureIds | None:
        """From a Hugging Face configuration; None without pictures."""
        return None

    def vision_shape(self, config: Any) -> VisionShape:
        """The tower as integers, from a configuration or the JSON of one."""
        return NO_VISION

    def num_tokens(self, processor: Any, *, height: int, width: int) -> int:
        """Placeholders of a picture of so many pixels, from its size alone.

        Raises:
            AlignmentError: the model takes no picture of this shape, or none at all.
        """
        raise AlignmentError(f"{self.name} takes no pictures")

    def process(self, processor: Any, rgb: PIL.Image.Image, **options: Any) -> tuple[Any, Tensor]:
        """What vLLM takes of one picture, by its names, and the picture's grid [1, 3].

        `pixel_values` [rows, ...] is what the body takes.

        Args:
            options: vLLM's, of the processor.
        """
        raise AlignmentError(f"{self.name} takes no pictures")

    def positions(self, body: Any, tokens: Tensor, types: Tensor, grids: Tensor) -> Tensor:
        """[T] or [3, T] positions of one trajectory, from 0.

        Args:
            body: the model without its head.
            tokens, types: [T] ids, and 1 at placeholders.
            grids: [pictures, 3]
        """
        return tokens.new_ones(len(tokens)).cumsum(0) - 1

    def body_inputs(
        self, body: Any, inputs: PackedInputs, part: slice, place: Place
    ) -> dict[str, Any]:
        """What the body takes beside ids and positions, in a packed forward pass.

        Args:
            part: the tokens of this rank.
            place: puts features where they are shown.
        """
        return {}

    def prompt_inputs(
        self, body: Any, tokens: Tensor, types: Tensor, pixels: dict[str, Tensor]
    ) -> dict[str, Any]:
        """What the body takes beside ids, to read one prompt [1, T] with its pictures."""
        return {}
