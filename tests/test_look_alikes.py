"""Look-alikes: what a picture search shows, and says of it, where nothing is the same."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from PIL import Image as PilImage
from test_picture_index import photograph

from tapo_train.build.tools import build_toolbox
from tapo_train.commands import index as command
from tapo_train.errors import ConfigError, DataError
from tapo_train.evaluation.attempt import EMPTY
from tapo_train.recipe.compose import load_recipe
from tapo_train.tools import embedders
from tapo_train.tools.base import ToolContext
from tapo_train.tools.embedders import folder_digest
from tapo_train.tools.image_search import ImageIndex, ImageSearchTool
from tapo_train.tools.images import encode_png, image_from_bytes
from tapo_train.tools.look_alikes import LookAlikes, VisionTower, embed_pictures
from tapo_train.types import Observation, Task

Change = Callable[[dict[str, torch.Tensor]], None]

PICTURES = 12
EIGHT_BITS = 0.01
"""What the eight bits of a stored number may add to a cosine."""
TINY = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
EYE = {**TINY, "image_size": 32, "patch_size": 8}


def clip(folder: Path, *, seed: int) -> Path:
    """A random CLIP; its tower's own projection_dim is the default of 512, which it has not."""
    torch.manual_seed(seed)
    text = {**TINY, "vocab_size": 20, "max_position_embeddings": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=EYE, projection_dim=24)
    transformers.CLIPModel(config).save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    transformers.CLIPImageProcessor(**size).save_pretrained(folder)
    return folder


def siglip(folder: Path, *, seed: int) -> Path:
    torch.manual_seed(seed)
    text = {**TINY, "vocab_size": 20, "max_position_embeddings": 8, "projection_size": 32}
    config = transformers.SiglipConfig(text_config=text, vision_config=EYE)
    transformers.SiglipModel(config).save_pretrained(folder)
    transformers.SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


MODELS = {"clip": clip, "siglip": siglip}


@pytest.fixture(scope="module", params=sorted(MODELS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MODELS[request.param](tmp_path_factory.mktemp(request.param), seed=0)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for seed in range(PICTURES):
        photograph(seed, 120 + seed, 80).save(folder / f"view {seed:02}.png")
    return folder


@pytest.fixture
def pictures(photographs: Path, model: Path, tmp_path: Path) -> Path:
    """An index with vectors of the model."""
    folder = tmp_path / "pictures"
    command.main(["pictures", str(photographs), "--out", str(folder)])
    command.main(["look-alikes", str(folder), str(photographs), "--model", str(model)])
    return folder


def by_hand(model: Path, pictures: list[PilImage.Image]) -> np.ndarray:
    """Unit vectors by the whole model, text tower and all."""
    whole = transformers.AutoModel.from_pretrained(model).eval()
    prepared = transformers.AutoImageProcessor.from_pretrained(model)(pictures, return_tensors="pt")
    with torch.inference_mode():
        features = whole.get_image_features(**prepared).pooler_output
    return torch.nn.functional.normalize(features, dim=1).numpy()


def near(folder: Path, model: Path, asked: PilImage.Image, **options: Any) -> list[str]:
    index = ImageIndex.load(folder)
    found = LookAlikes(folder, index, VisionTower(model), threshold=options["threshold"])
    return [one.title for one in found.near(asked, top_k=options.get("top_k", 3))]


def answer(tool: ImageSearchTool, picture: PilImage.Image) -> Observation:
    image = image_from_bytes(encode_png(picture), width=picture.width, height=picture.height)
    task = Task(id="t", question="?", images=(image,), answers=("a",))
    context = ToolContext(images=(image,), task=task)
    return asyncio.run(tool.run(tool.arguments_model(), context))


def tool_of(folder: Path, *overrides: str) -> ImageSearchTool:
    """The tool as a recipe makes it."""
    named = ["tools.names=[image_search_tool]", f"tools.image_index={folder}"]
    box = build_toolbox(load_recipe("recipes/demo_cpu.yaml", [*named, *overrides]))
    tool = box.read("image_search_tool", {}).tool
    assert isinstance(tool, ImageSearchTool)
    return tool


def changed(model: Path, folder: Path, change: Change) -> Path:
    """The model with other weights."""
    shutil.copytree(model, folder)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    change(weights)
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_tower_sees_what_the_whole_model_sees(model: Path) -> None:
    asked = [photograph(seed, 90, 70) for seed in range(3)]
    seen = VisionTower(model).embed(asked)
    assert seen.dtype == np.float32
    assert np.allclose(seen, by_hand(model, asked), atol=1e-5)


def test_the_text_tower_is_not_read_and_the_vision_tower_has_to_be_whole(
    model: Path, tmp_path: Path
) -> None:
    def without(part: str) -> Change:
        def drop(weights: dict[str, torch.Tensor]) -> None:
            names = [name for name in weights if part in name]
            assert names
            for name in names:
                del weights[name]

        return drop

    asked = [photograph(1)]
    blind = VisionTower(changed(model, tmp_path / "no text", without("text_model")))
    # Its weights lie elsewhere in the file, and so in memory: products may differ by a rounding.
    assert np.allclose(blind.embed(asked), VisionTower(model).embed(asked), atol=1e-6)
    with pytest.raises(DataError, match=r"found no weights .*post_layernorm.bias, wanted a whole"):
        VisionTower(changed(model, tmp_path / "half", without("post_layernorm.bias")))


def test_a_folder_of_another_kind_or_of_none_is_named(tmp_path: Path) -> None:
    transformers.BertConfig().save_pretrained(tmp_path)
    with pytest.raises(DataError, match="found a model of type 'bert', wanted clip or siglip"):
        VisionTower(tmp_path)
    with pytest.raises(DataError, match=r"embedder .*nowhere"):
        VisionTower(tmp_path / "nowhere")


def test_damaged_weights_and_weights_of_another_size_are_named(tmp_path: Path) -> None:
    model = clip(tmp_path / "clip", seed=0)
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1000])
    with pytest.raises(DataError, match=r"embedder .*clip: "):
        VisionTower(model)
    weights.write_bytes(whole)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"projection_dim": 512}))
    with pytest.raises(DataError, match=r"embedder .*clip: "):
        VisionTower(model)


def test_weights_that_are_pickled_are_not_read(tmp_path: Path) -> None:
    model = clip(tmp_path, seed=0)
    weights = safetensors.torch.load_file(model / "model.safetensors")
    torch.save(weights, model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    with pytest.raises(DataError, match="safetensors"):
        VisionTower(model)


def test_a_picture_of_the_index_is_its_own_nearest(pictures: Path, model: Path) -> None:
    for seed in range(PICTURES):
        asked = photograph(seed, 120 + seed, 80)
        assert near(pictures, model, asked, threshold=0.9, top_k=1) == [f"view {seed:02}"]


def test_what_is_above_the_threshold_is_shown_nearest_first(pictures: Path, model: Path) -> None:
    asked = photograph(77)
    views = [photograph(seed, 120 + seed, 80) for seed in range(PICTURES)]
    cosines = by_hand(model, views) @ by_hand(model, [asked])[0]
    best = np.argsort(-cosines)
    titles = [f"view {number:02}" for number in best]
    assert near(pictures, model, asked, threshold=0.0, top_k=3)[0] == titles[0]
    assert len(near(pictures, model, asked, threshold=0.0, top_k=50)) == PICTURES
    highest, lowest = float(cosines[best[0]]), float(cosines[best[-1]])
    assert near(pictures, model, asked, threshold=highest + EIGHT_BITS) == []
    assert near(pictures, model, asked, threshold=highest - EIGHT_BITS)[0] == titles[0]
    assert titles[-1] in near(pictures, model, asked, threshold=lowest - EIGHT_BITS, top_k=50)


def test_pictures_of_a_pixel_or_a_strip_have_look_alikes_too(pictures: Path, model: Path) -> None:
    for size in ((1, 1), (3, 5), (5, 3), (400, 2)):
        asked = PilImage.new("RGB", size, (10, 200, 30))
        assert len(near(pictures, model, asked, threshold=0.0)) == 3


def test_look_alikes_are_said_to_be_none_and_matches_come_as_before(
    pictures: Path, model: Path
) -> None:
    chosen = f"tools.look_alikes={{folder: '{model}', threshold: 0.0}}"
    plain, tool = tool_of(pictures), tool_of(pictures, chosen, "tools.image_top_k=2")
    known, unknown = photograph(3, 123, 80).crop((10, 5, 110, 75)), photograph(77)
    assert answer(tool, known) == answer(plain, known)
    assert answer(tool, known).text == (
        "Reverse image search results:\nTitle 1: view 03\nThumbnails:"
    )
    seen, titles = answer(tool, unknown), near(pictures, model, unknown, threshold=0.0, top_k=2)
    assert seen.text == (
        "No matching images were found. These only look alike and may show something else:\n"
        f"Title 1: {titles[0]}\nTitle 2: {titles[1]}\nThumbnails:"
    )
    assert len(seen.images) == 2 and seen.text not in EMPTY
    assert answer(tool, unknown) == seen, "the same when it is remembered"
    strict = tool_of(pictures, chosen.replace("0.0}", "1.0}"))
    assert answer(strict, unknown) == answer(plain, unknown)
    assert answer(strict, unknown).text in EMPTY


def test_recordings_hold_for_one_model_and_one_threshold(
    pictures: Path, photographs: Path, model: Path, tmp_path: Path
) -> None:
    def version(folder: Path, threshold: float) -> str:
        return tool_of(
            pictures, f"tools.look_alikes={{folder: '{folder}', threshold: {threshold}}}"
        ).version

    plain = tool_of(pictures).version
    assert plain == f"2 index={ImageIndex.load(pictures).digest} top_k=3"
    versions = [plain, version(model, 0.5), version(model, 0.5000001)]
    assert version(model, 0.5) == versions[1]

    def retrained(weights: dict[str, torch.Tensor]) -> None:
        weights[sorted(weights)[-1]] += 0.5

    other = changed(model, tmp_path / "other", retrained)
    command.main(["look-alikes", str(pictures), str(photographs), "--model", str(other)])
    versions.append(version(other, 0.5))
    assert len(set(versions)) == 4


def test_vectors_that_are_written_anew_do_not_disturb_who_has_the_old_ones_open(
    pictures: Path, photographs: Path, model: Path, tmp_path: Path
) -> None:
    opened = LookAlikes(pictures, ImageIndex.load(pictures), VisionTower(model), threshold=0.0)
    inode = (pictures / "look_alikes.faiss").stat().st_ino
    before = opened.near(photograph(77), top_k=5)
    other = MODELS[json.loads((model / "config.json").read_text())["model_type"]]
    other(tmp_path / "other", seed=1)
    embed_pictures(pictures, photographs, VisionTower(tmp_path / "other"))
    assert (pictures / "look_alikes.faiss").stat().st_ino != inode
    assert opened.near(photograph(77), top_k=5) == before
    assert not list(pictures.glob("*.new")) and not list(pictures.glob("*.f16"))


def test_vectors_of_another_model_or_index_are_refused(
    pictures: Path, photographs: Path, model: Path, tmp_path: Path
) -> None:
    other = MODELS[json.loads((model / "config.json").read_text())["model_type"]]
    with pytest.raises(DataError, match=r"look_alikes.json: found vectors of folder:\w{16}, wan"):
        near(pictures, other(tmp_path / "other", seed=1), photograph(1), threshold=0.0)
    another = tmp_path / "another"
    shutil.copytree(photographs, tmp_path / "source")
    photograph(50).save(tmp_path / "source" / "view 03.png")
    command.main(["pictures", str(tmp_path / "source"), "--out", str(another)])
    with pytest.raises(DataError, match="wanted python -m tapo_train index look-alikes"):
        near(another, model, photograph(1), threshold=0.0)
    for name in ("look_alikes.json", "look_alikes.faiss"):
        shutil.copy(pictures / name, another / name)
    with pytest.raises(DataError, match="found vectors of other pictures"):
        near(another, model, photograph(1), threshold=0.0)


def test_a_source_of_other_pictures_is_refused_and_leaves_nothing(
    photographs: Path, tmp_path: Path
) -> None:
    model = VisionTower(clip(tmp_path / "clip", seed=0))
    folder, source = tmp_path / "pictures", tmp_path / "source"
    command.main(["pictures", str(photographs), "--out", str(folder)])
    shutil.copytree(photographs, source)
    photograph(50).save(source / "view 04.png")
    with pytest.raises(DataError, match="found 'view 04' in place 5, which it does not have there"):
        embed_pictures(folder, source, model)
    (source / "view 04.png").unlink()
    with pytest.raises(DataError, match="found 'view 05' in place 5"):
        embed_pictures(folder, source, model)
    shutil.copy(photographs / "view 04.png", source)
    (source / "view 11.png").unlink()
    with pytest.raises(DataError, match="found 11 pictures, wanted its 12"):
        embed_pictures(folder, source, model)
    shutil.copy(photographs / "view 11.png", source)
    photograph(50).save(source / "view 12.png")
    with pytest.raises(DataError, match="found 'view 12' in place 13"):
        embed_pictures(folder, source, model)
    assert not list(folder.glob("look_alikes*"))
    with pytest.raises(DataError, match="found no picture index"):
        embed_pictures(source, source, model)


def test_a_digest_of_a_whole_folder_sees_the_last_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedders, "_HASHED_BYTES", 64)
    file = tmp_path / "model.safetensors"
    digests = []
    for data in (bytes(1000), bytes(999) + b"1"):
        file.write_bytes(data)
        digests.append((folder_digest(tmp_path), folder_digest(tmp_path, is_whole=True)))
    assert digests[0][0] == digests[1][0] and digests[0][1] != digests[1][1]


def test_a_recipe_says_folder_and_threshold_beside_an_index() -> None:
    chosen = "tools.look_alikes={folder: models/clip, threshold: 0.8}"
    recipe = load_recipe("recipes/demo_cpu.yaml", [chosen])
    assert recipe.tools.look_alikes is not None and recipe.tools.look_alikes.threshold == 0.8
    for overrides, message in (
        (["tools.look_alikes={folder: f}"], "tools.look_alikes.threshold: found nothing"),
        (["tools.look_alikes={folder: f, threshold: 1.5}"], "less than or equal to 1"),
        ([chosen, "tools.image_endpoint='http://h/s'"], "tools.look_alikes: found it without"),
        ([chosen, "tools.image_index=null", "tools.names=[]"], "tools.look_alikes: found it with"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_recipe("recipes/demo_cpu.yaml", overrides)
