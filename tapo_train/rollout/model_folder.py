"""Is a model folder whole? Asked before anything heavy starts."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from tapo_train.errors import ConfigError
from tapo_train.families import Family, family_of

_CONFIG = "config.json"
_INDEX = "model.safetensors.index.json"


def require_model_folder(folder: Path) -> None:
    """Refuse what is no Hugging Face folder with weights; nothing is downloaded.

    A name that is no folder would otherwise be looked up on the network for minutes, and the
    libraries that read a folder in pieces each have their own traceback for it. Only the heads
    of the weight files are read.

    Raises:
        ConfigError: the folder, its configuration or a weight file is missing or damaged.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"model.path: found {str(folder)!r}, which is no folder here; wanted a Hugging Face "
            "folder (nothing is downloaded)"
        )
    if not (folder / _CONFIG).is_file():
        raise ConfigError(f"model.path: found no {_CONFIG} in {folder}; wanted a whole folder")
    present = sorted(folder.glob("*.safetensors"))
    if not present:
        raise ConfigError(f"model.path: found no weights in {folder}; wanted *.safetensors")
    missing = _indexed(folder) - {file.name for file in present}
    if missing:
        raise ConfigError(
            f"model.path: {folder} lacks {', '.join(sorted(missing))}; wanted every file of its "
            f"{_INDEX}"
        )
    for file in present:
        try:
            with safe_open(file, framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            raise ConfigError(
                f"model.path: {file} is damaged ({error}); wanted a whole safetensors file"
            ) from error


def family_in(folder: Path) -> Family:
    """The family of the model in a folder.

    A model of another family would be trained on rows that leak into each other, or on pictures
    that are read otherwise.

    Raises:
        ConfigError: its configuration names no known model type, or cannot be read.
    """
    path = folder / _CONFIG
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"model.path: {path} names no model type ({error!r})") from error
    return family_of(found, where=f" in {folder}")


def _indexed(folder: Path) -> set[str]:
    """Weight files that the index of a sharded model names; none without an index."""
    index = folder / _INDEX
    if not index.is_file():
        return set()
    try:
        return {
            str(name)
            for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"model.path: {index} is damaged ({error})") from error
