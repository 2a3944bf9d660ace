"""Pictures that look alike without being the same, by the vision tower of a CLIP or SigLIP folder.

    look_alikes.faiss   a vector a picture, in the order of the picture index
    look_alikes.json    which model made them, and of which index

A picture index answers with what shows the same for certain. Another photograph of the same thing
is another picture to it; the nearest of these vectors may be one, and may be something else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from PIL import Image as PilImage

from tapo_train.errors import DataError
from tapo_train.tools.embedders import folder_digest, read_part, unit
from tapo_train.tools.picture_files import titled_pictures
from tapo_train.tools.picture_index import MANIFEST, ImageIndex, IndexedPicture
from tapo_train.tools.vector_index import Floats, load_beside, writing_beside

__all__ = ["LookAlikes", "VisionTower", "embed_pictures"]

NAME = "look_alikes"
_TOGETHER = 8
"""Pictures of one pass through the model."""


class VisionTower:
    """What a CLIP or SigLIP folder sees in pictures, on the CPU, in float32.

    The text tower is not read, and no code of the folder runs.

    Raises:
        DataError: the folder is another model's, or lacks weights of the tower.
    """

    def __init__(self, folder: Path) -> None:
        import torch
        import transformers

        config = read_part(transformers.AutoConfig, folder)
        if config.model_type == "clip":
            kind, self._output = transformers.CLIPVisionModelWithProjection, "image_embeds"
            # The tower's own may be a default that nothing of the folder has.
            config.vision_config.projection_dim = config.projection_dim
        elif config.model_type == "siglip":
            kind, self._output = transformers.SiglipVisionModel, "pooler_output"
        else:
            raise DataError(
                f"embedder {folder}: found a model of type {config.model_type!r}, wanted clip or "
                "siglip"
            )
        self._processor = read_part(transformers.AutoImageProcessor, folder)
        # Else transformers lists on every start what of the folder is not the tower's.
        unread = {"_keys_to_ignore_on_load_unexpected": [r"^text_", r"^logit_"]}
        self._model, report = read_part(
            type(kind.__name__, (kind,), unread),
            folder,
            config=config.vision_config,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
        if missing := sorted(report["missing_keys"]):
            raise DataError(f"embedder {folder}: found no weights {missing[0]}, wanted a whole one")
        self._model.eval()
        # Whole: fine-tuned models have the same size, and begin with the text tower's weights.
        self.version = f"folder:{folder_digest(folder, is_whole=True)}"

    def embed(self, pictures: Sequence[PilImage.Image]) -> Floats:
        """[N, D] unit vectors of RGB pictures. Blocks."""
        import torch

        prepared = self._processor(images=list(pictures), return_tensors="pt")
        with torch.inference_mode():
            seen = getattr(self._model(pixel_values=prepared["pixel_values"]), self._output)
        return unit(seen.numpy())


class LookAlikes:
    """The pictures of an index that look most like another one.

    Args:
        folder: of the index, with the vectors beside it.
        threshold: [-1..1] cosine of the least alike that are shown.

    Raises:
        DataError: it has no vectors, or they are another model's or another index's.
    """

    def __init__(
        self, folder: Path, index: ImageIndex, tower: VisionTower, *, threshold: float
    ) -> None:
        self._index = index
        self._tower = tower
        self._threshold = threshold
        self._vectors = load_beside(
            folder,
            NAME,
            made_by=tower.version,
            of=index.digest,
            entries=(len(index), "pictures"),
            wanted=f"python -m tapo_train index look-alikes {folder} PICTURES",
        )
        self.version = f"{tower.version} threshold={threshold}"

    def near(self, picture: PilImage.Image, *, top_k: int) -> list[IndexedPicture]:
        """Those above the threshold, the most alike first. Blocks."""
        scores, rows = self._vectors.search(self._tower.embed([picture]), top_k)
        alike = rows[0][(rows[0] >= 0) & (scores[0] >= self._threshold)]
        return [self._index.entry(number) for number in alike.tolist()]


def embed_pictures(folder: Path, source: Path, tower: VisionTower) -> int:
    """Write the vectors of a picture index; its source is read again. How many there are.

    Raises:
        DataError: there is no index, or the source is not what it was made of.
    """
    if not (folder / MANIFEST).exists():
        raise DataError(f"{folder}: found no picture index, wanted one of `index pictures`")
    index = ImageIndex.load(folder)
    pictures = _checked(titled_pictures(source), index, folder)
    with writing_beside(folder, NAME, made_by=tower.version, of=index.digest) as add:
        while batch := list(islice(pictures, _TOGETHER)):
            add(tower.embed(batch))
    return len(index)


def _checked(
    pictures: Iterable[tuple[str, PilImage.Image]], index: ImageIndex, folder: Path
) -> Iterator[PilImage.Image]:
    """The pictures, if they are those of the index."""
    count = 0
    for count, (title, picture) in enumerate(pictures, start=1):
        if not index.holds(count - 1, title, picture):
            raise DataError(
                f"picture index {folder}: found {title!r} in place {count}, which it does not have "
                "there; wanted the pictures it was made of"
            )
        yield picture
    if count != len(index):
        raise DataError(f"picture index {folder}: found {count} pictures, wanted its {len(index)}")
