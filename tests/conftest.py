"""Shared fixtures: tiny random policies and a small world, built once per session."""

from __future__ import annotations

import os
from pathlib import Path

# To compile the few small functions that vLLM has compiled takes a new machine longer than all
# that they compute here. torch reads it when it is imported, in the processes of tests as well.
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")

# pytest's hypothesis plugin imports it at the end of a session if no test did; in a
# process that ran torch that late import can fail in CPython 3.11's parser.
import hypothesis  # noqa: F401
import pytest


@pytest.fixture(scope="session")
def tiny_qwen3_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random tiny Qwen3-VL policy."""
    from tapo_train.demo.tiny.model import build_tiny_policy

    return build_tiny_policy(tmp_path_factory.mktemp("qwen3_vl"), family="qwen3_vl")


@pytest.fixture(scope="session")
def tiny_qwen2_5_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random tiny Qwen2.5-VL policy."""
    from tapo_train.demo.tiny.model import build_tiny_policy

    return build_tiny_policy(tmp_path_factory.mktemp("qwen2_5_vl"), family="qwen2_5_vl")


@pytest.fixture(scope="session")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small world of seed 3."""
    from tapo_train.demo.world.build import WorldSize, write_world

    out = tmp_path_factory.mktemp("world")
    size = WorldSize(
        train_houses=30,
        validation_houses=10,
        test_houses=10,
        train_questions=40,
        validation_questions=10,
        test_questions=10,
    )
    write_world(out, 3, size)
    return out
