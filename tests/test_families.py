"""Every family: rows are packed as if alone, and what is loaded and learned is exported."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from learner_rows import make_policy, make_row, picture
from process_environment import environment
from safetensors.torch import load_file
from tiny_families import BUILDERS, build, text_model, tokenizer
from transformers import AutoProcessor

from tapo_train import families
from tapo_train.errors import ConfigError
from tapo_train.families import Family
from tapo_train.learner.batch import join
from tapo_train.learner.engine import end_process_group
from tapo_train.learner.objective import supervised
from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.hf_engine import HfEngine
from tapo_train.types import Task

WORKER = Path(__file__).with_name("family_engine_worker.py")
IN_ENGINE = ("qwen3", "qwen3_vl_moe", "internvl")
"""Text alone, stacked experts and grids of patches, tiles. What was measured of the others is in
docs/models.md: each costs a start of vLLM."""
PACKED = 1e-5
"""[nat] packed and alone, in float32."""
REFERENCE = 1e-4
"""[nat] the learner and transformers' own model."""


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    yield
    end_process_group()


@pytest.mark.parametrize("kind", list(BUILDERS))
def test_rows_are_scored_packed_as_alone_and_as_by_the_model_itself(
    kind: str, tmp_path: Path
) -> None:
    chat = ChatFormat(build(kind, tmp_path))
    policy = make_policy(chat.model, chat, learning_rate=0.1)
    stored = load_file(tmp_path / "model.safetensors")
    torch.testing.assert_close(dict(policy.model_files().tensors), stored, atol=0, rtol=0)
    sizes: list[list[tuple[int, int]]] = [[], [], []]
    if chat.family.sees:
        sizes = [[(64, 96)], [], [(64, 64), (96, 64)]]
    rows = [make_row(chat, policy.layout, seed=i, sizes=size) for i, size in enumerate(sizes)]
    reference = HfEngine(chat)
    for _ in range(2):
        alone = [policy.logprobs(join([row])).numpy() for row in rows]
        if chat.family.packs:
            packed = policy.logprobs(join(rows)).numpy()
            np.testing.assert_allclose(packed, np.concatenate(alone), atol=PACKED, rtol=0)
        for row in rows:
            ours = policy.score(row.tokens, row.images)
            theirs = reference.score(row.tokens, row.images)
            np.testing.assert_allclose(ours, theirs, atol=REFERENCE, rtol=0)
        policy.update([join([row]) for row in rows], supervised)
        moved = np.abs(policy.logprobs(join([rows[0]])).numpy() - alone[0]).max()
        assert moved > 100 * REFERENCE
        reference.load_weights(policy.named_weights(), version=1)
    policy.close()


@pytest.mark.parametrize("kind", ["qwen3_vl_moe", "glm4v", "internvl"])
def test_pictures_become_the_tokens_that_the_models_own_processor_writes(
    kind: str, tmp_path: Path
) -> None:
    folder = build(kind, tmp_path)
    chat, processor = ChatFormat(folder), AutoProcessor.from_pretrained(folder)
    images = tuple(picture(i, width=w, height=h) for i, (w, h) in enumerate([(64, 96), (160, 64)]))
    task = Task(id="t", question="Which is red?", images=images, answers=("a",))
    content = [*[{"type": "image"}] * 2, {"type": "text", "text": task.question}]
    messages = [{"role": "system", "content": "Look."}, {"role": "user", "content": content}]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    theirs = processor(text=[text], images=[[chat.rgb(image) for image in images]])
    ours = chat.prompt(task, system_prompt="Look.", tool_schemas=[])
    assert ours.tolist() == theirs["input_ids"][0]
    pixels = np.concatenate([np.asarray(part) for part in theirs["pixel_values"]])
    np.testing.assert_array_equal(
        chat.pixels(images)["pixel_values"].numpy().reshape(-1), pixels.reshape(-1)
    )


def test_a_family_of_ones_own_is_an_object_and_its_place_in_the_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = Family(name="Mistral", model_types=("mistral",))
    monkeypatch.setitem(BUILDERS, "mistral", (partial(text_model, "Mistral"), tokenizer))
    folder = build("mistral", tmp_path)
    with pytest.raises(ConfigError, match=r"type 'mistral' .*; wanted one of qwen2_5_vl"):
        ChatFormat(folder)
    monkeypatch.setattr(families, "FAMILIES", [*families.FAMILIES, mine])
    chat = ChatFormat(folder)
    policy = make_policy(folder, chat)
    rows = [make_row(chat, policy.layout, seed=seed) for seed in range(2)]
    packed = policy.logprobs(join(rows)).numpy()
    alone = [policy.logprobs(join([row])).numpy() for row in rows]
    np.testing.assert_allclose(packed, np.concatenate(alone), atol=PACKED, rtol=0)
    policy.close()


@pytest.mark.parametrize(
    ("kind", "key"), [("glm4v", "attention_bias"), ("qwen3_vl_moe", "norm_topk_prob")]
)
def test_a_model_that_the_engine_would_read_otherwise_is_refused(
    kind: str, key: str, tmp_path: Path
) -> None:
    file = build(kind, tmp_path) / "config.json"
    config = json.loads(file.read_text())
    del config["text_config"][key]
    file.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=rf"text_config\.{key} .*; wanted true"):
        ChatFormat(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_engine_agrees_before_and_after_three_syncs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(WORKER), str(tmp_path), *IN_ENGINE],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=380,
    )
    assert done.returncode == 0 and "agreed" in done.stdout, done.stdout + done.stderr[-4000:]
