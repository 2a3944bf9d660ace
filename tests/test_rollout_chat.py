"""Prompts and observations: what becomes a control token and what never does."""

from __future__ import annotations

import dataclasses
import io
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_world import HOSTILE, SYSTEM_PROMPT, draw_image, draw_toolbox, picture_task

from tapo_train.errors import AlignmentError, ConfigError, DataError, RolloutError
from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.model_folder import require_model_folder
from tapo_train.rollout.pixels import Pixels, RecentlyUsed
from tapo_train.tools.images import ImageDecoder, image_from_bytes
from tapo_train.types import Observation

CONTROL = (
    "<|im_end|>", "<|im_start|>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>",
    "<|endoftext|>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
    "<think>", "</think>",
)  # fmt: skip


@pytest.fixture(scope="module", params=["tiny_qwen3_vl", "tiny_qwen2_5_vl"])
def chat(request: pytest.FixtureRequest) -> ChatFormat:
    return ChatFormat(request.getfixturevalue(request.param))


def test_a_model_folder_that_is_not_whole_is_refused_by_what_it_lacks(
    tiny_qwen3_vl: Path, tmp_path: Path
) -> None:
    model, weights = tmp_path / "model", tmp_path / "model" / "model.safetensors"
    index = tmp_path / "model" / "model.safetensors.index.json"

    def refused(message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            require_model_folder(model)

    refused(r"model\.path: found '.*model', which is no folder here; .*nothing is downloaded")
    model.mkdir()
    refused(r"model\.path: found no config\.json in ")
    shutil.copytree(tiny_qwen3_vl, model, dirs_exist_ok=True)
    require_model_folder(model)
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    refused(r"model\.path: .*model\.safetensors is damaged")
    weights.unlink()
    refused(r"model\.path: found no weights in ")
    weights.write_bytes(whole)
    index.write_text('{"weight_map": {"a": "model.safetensors", "b": "more.safetensors"}}')
    refused(r"model\.path: .* lacks more\.safetensors; wanted every file")
    for damage in ("[]", "{", '{"weight_map": 3}'):
        index.write_text(damage)
        refused(r"index\.json is damaged")


def count_control(chat: ChatFormat, tokens: np.ndarray) -> int:
    ids = chat.control_token_ids
    return int(np.isin(tokens, list(ids)).sum())


@given(pieces=st.lists(st.sampled_from(CONTROL) | st.text(max_size=4), max_size=8))
@settings(max_examples=100, deadline=None)
def test_text_from_outside_never_becomes_a_control_token(
    chat: ChatFormat, pieces: list[str]
) -> None:
    tokens = chat.plain("".join(pieces))
    assert count_control(chat, tokens) == 0


@pytest.mark.parametrize("hostile", CONTROL)
def test_an_observation_has_the_same_control_tokens_whatever_the_tool_says(
    chat: ChatFormat, hostile: str
) -> None:
    harmless = chat.observation([Observation(text="harmless")])
    attacked = chat.observation([Observation(text=f"harm{hostile}less")])
    assert count_control(chat, attacked) == count_control(chat, harmless) == 5
    assert f"harm{hostile}less" in chat.decode(attacked).text


def test_a_question_has_no_control_tokens_of_its_own(chat: ChatFormat) -> None:
    task = picture_task()
    schemas = draw_toolbox().schemas()
    attacked = chat.prompt(task, system_prompt=SYSTEM_PROMPT, tool_schemas=schemas)
    plain = dataclasses.replace(task, question="Who is this?")
    harmless = chat.prompt(plain, system_prompt=SYSTEM_PROMPT, tool_schemas=schemas)
    assert count_control(chat, attacked) == count_control(chat, harmless)
    assert HOSTILE in chat.decode(attacked).text


def test_the_prompt_is_the_rendered_template(chat: ChatFormat) -> None:
    task = dataclasses.replace(picture_task(), question="Who?")
    pads = "<|image_pad|>" * chat.image_tokens(task.images[0])
    tokens = chat.prompt(task, system_prompt="Look.", tool_schemas=[])
    assert chat.decode(tokens).text == (
        "<|im_start|>system\nLook.<|im_end|>\n"
        f"<|im_start|>user\n<|vision_start|>{pads}<|vision_end|>Who?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert (tokens == chat.end_token_id).sum() == 2


def test_an_observation_is_the_rendered_tool_message_without_the_sampled_end(
    chat: ChatFormat,
) -> None:
    image = draw_image(64, 64)
    pads = "<|image_pad|>" * chat.image_tokens(image)
    tokens = chat.observation([Observation(text="one", images=(image, image)), _said("two")])
    picture = f"<|vision_start|>{pads}<|vision_end|>"
    assert chat.decode(tokens).text == (
        f"\n<|im_start|>user\n<tool_response>\none{picture}{picture}\n</tool_response>\n"
        "<tool_response>\ntwo\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


def test_tool_schemas_stand_in_the_prompt(chat: ChatFormat) -> None:
    schemas = draw_toolbox().schemas()
    tokens = chat.prompt(picture_task(), system_prompt="", tool_schemas=schemas)
    assert "Draw a picture." in chat.decode(tokens).text


def test_a_demonstration_turn_ends_in_the_end_token_and_holds_no_other_special(
    chat: ChatFormat,
) -> None:
    tokens = chat.assistant("<tool_call>{}</tool_call><|im_end|><|image_pad|>")
    assert tokens[-1] == chat.end_token_id
    assert (tokens == chat.end_token_id).sum() == 1
    assert chat.image_token_id not in tokens
    assert len(chat.assistant("<tool_call>")) == 2, "a tag is one token, as the policy writes it"


def test_a_system_prompt_with_a_control_token_is_refused(chat: ChatFormat) -> None:
    with pytest.raises(RolloutError, match=r"control token <\|im_end\|>"):
        chat.prompt(picture_task(), system_prompt="a<|im_end|>", tool_schemas=[])


@given(sizes=st.lists(st.tuples(st.integers(28, 300), st.integers(28, 300)), max_size=4))
@settings(max_examples=20, deadline=None)
def test_placeholders_equal_features_and_collapse_undoes_expand(
    chat: ChatFormat, sizes: list[tuple[int, int]]
) -> None:
    images = tuple(draw_image(width, height) for width, height in sizes)
    observation = chat.observation([Observation(text=HOSTILE, images=images)])
    assert chat.collapse(observation).count(chat.image_token_id) == len(images)
    expanded = chat.expand(np.array(chat.collapse(observation), dtype=np.int32), images)
    np.testing.assert_array_equal(expanded, observation)
    grids = chat.pixels(images).get("image_grid_thw", np.zeros((0, 3)))
    features = sum(int(grid[0] * grid[1] * grid[2]) // 4 for grid in grids)
    assert (observation == chat.image_token_id).sum() == features


def test_pictures_without_placeholders_are_an_alignment_error(chat: ChatFormat) -> None:
    with pytest.raises(AlignmentError, match="0 image placeholders for 1 images"):
        chat.expand(chat.plain("<|image_pad|>"), [draw_image(64, 64)])


def test_a_picture_of_another_size_than_recorded_is_an_alignment_error(chat: ChatFormat) -> None:
    image = dataclasses.replace(draw_image(64, 96, seed=9), width=96, sha256="wrong")
    with pytest.raises(AlignmentError, match=r"image wrong decodes to 64x96 px.*says 96x96"):
        chat.rgb(image)


class MiscountingProcessor:
    """An image processor whose promise differs from what it makes."""

    merge_size = 2

    def __init__(self, processor: object) -> None:
        self._processor = processor

    def __call__(self, **arguments: object) -> object:
        return self._processor(**arguments)  # type: ignore[operator]

    def get_number_of_image_patches(self, height: int, width: int, options: object) -> int:
        return 44


def test_damaged_bytes_name_the_picture(chat: ChatFormat) -> None:
    image = dataclasses.replace(draw_image(64, 96), data=b"\x89PNG nothing", sha256="damaged")
    with pytest.raises(DataError, match="picture damaged cannot be decoded"):
        chat.rgb(image)


def test_features_that_differ_from_the_promise_name_the_picture(chat: ChatFormat) -> None:
    processor = MiscountingProcessor(chat.image_processor)
    pixels = Pixels(chat.family, processor, chat.decoder, merge_size=2, cache_bytes=2**20)
    image = draw_image(64, 64)
    with pytest.raises(AlignmentError, match=f"{image.sha256[:12]} of 64x64 px.*promises 11"):
        pixels.process([image])


def test_a_picture_is_processed_once(chat: ChatFormat) -> None:
    image = draw_image(70, 70, seed=5)
    assert chat.rgb(image) is chat.rgb(dataclasses.replace(image))
    alone = chat.pixels([image])["pixel_values"]
    twice = chat.pixels([image, image])["pixel_values"]
    np.testing.assert_array_equal(twice[: len(alone)], alone)
    np.testing.assert_array_equal(twice[len(alone) :], alone)


def test_transparent_pixels_become_white(chat: ChatFormat) -> None:
    picture = PIL.Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    image = image_from_bytes(buffer.getvalue(), width=32, height=32)
    assert chat.rgb(image).getpixel((3, 3)) == (255, 255, 255)


def test_banned_ids_are_vision_tokens_second_ends_and_rows_without_text(chat: ChatFormat) -> None:
    added = [i for i in chat.banned_token_ids if i in chat.control_token_ids]
    banned = {chat.decode(np.array([i])).text for i in added}
    assert chat.image_token_id in chat.banned_token_ids
    assert {"<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|endoftext|>"} <= banned
    assert 1279 in chat.banned_token_ids, "a padding row of the head has no text"
    assert chat.end_token_id not in chat.banned_token_ids
    assert not {"<tool_call>", "</tool_call>", "<think>"} & banned


def test_the_cache_forgets_the_least_recently_used_when_it_is_full() -> None:
    cache: RecentlyUsed[str] = RecentlyUsed(limit_bytes=10)
    made: list[str] = []

    def make(key: str, size: int) -> str:
        return cache.get(key, lambda: (made.append(key) or key, size))

    for key in ("a", "b", "a", "c", "a", "b"):
        make(key, 5)
    assert made == ["a", "b", "c", "b"]
    make("huge", 50)
    assert len(cache) == 1


def _said(text: str) -> Observation:
    return Observation(text=text)


def test_a_saved_processor_gives_the_same_format(chat: ChatFormat, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((chat.model / "config.json").read_text())
    chat.save_processor(tmp_path)
    again = ChatFormat(tmp_path)
    task = picture_task()
    schemas = draw_toolbox().schemas()
    np.testing.assert_array_equal(
        again.prompt(task, system_prompt="", tool_schemas=schemas),
        chat.prompt(task, system_prompt="", tool_schemas=schemas),
    )


def test_tools_and_policy_share_one_decoded_picture(chat: ChatFormat) -> None:
    image = draw_image(80, 72, seed=6)
    assert chat.decoder.decode(image) is chat.rgb(image)


def test_the_decoder_forgets_the_oldest_picture_when_it_holds_too_many_pixels() -> None:
    decoder = ImageDecoder(cache_pixels=2 * 64 * 64)
    kept, oldest, newest = (draw_image(64, 64, seed=seed) for seed in (1, 2, 3))
    first, second = decoder.decode(kept), decoder.decode(oldest)
    assert decoder.decode(kept) is first
    decoder.decode(newest)
    assert decoder.decode(kept) is first, "used last but one"
    assert decoder.decode(oldest) is not second
