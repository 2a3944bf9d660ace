"""A run folder, or a file of rows, to the folder of its pages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from tapo_train.credit.options import TapoOptions
from tapo_train.data.rows import parse_json
from tapo_train.errors import ConfigError, DataError
from tapo_train.inspector.pieces import Pieces, find_tokenizer
from tapo_train.inspector.records import dumped_steps, read_step, rows_as_step
from tapo_train.inspector.site import Site
from tapo_train.recipe import TapoCredit
from tapo_train.report.files import write_atomically
from tapo_train.report.run_folder import RunFolder

__all__ = ["write_pages"]

_TAPO: TypeAdapter[TapoCredit] = TypeAdapter(TapoCredit)
_DONE = "pages.json"
"""In the folder of pages: the line of each step that is written, and what it was written from."""


def write_pages(source: Path, out: Path, *, first: int = 1, last: int | None = None) -> int:
    """Write the pages of the steps from `first` to `last`; those that are there stay.

    Returns:
        The number of steps that have pages.

    Raises:
        ConfigError: there is nothing to show.
        DataError: a dump is damaged; it names file and line.
    """
    if source.is_dir():
        return _write_run(source, out, first, last)
    site = Site(out)
    site.write_assets()
    line = site.write_step(rows_as_step(source, TapoOptions()))
    about = f"Rows of {source.name}, judged with the default options of TAPO"
    site.write_run({"name": source.name, "about": about, "notes": [], "recipe": None}, [line])
    return 1


def _write_run(run: Path, out: Path, first: int, last: int | None) -> int:
    dumped = {
        number: paths
        for number, paths in dumped_steps(run).items()
        if first <= number <= (last or number)
    }
    if not dumped:
        raise ConfigError(
            f"inspect: {run}/tokens has no dump of the steps asked for; wanted the folder of a run "
            "that dumps its trajectories"
        )
    options, notes, recipe, text = _recipe(run)
    tokenizer = find_tokenizer([run / "export", *_model_of(recipe)])
    if tokenizer is None:
        notes.append("No tokenizer.json in export/ or the model's folder: turns are shown whole.")
    pieces = Pieces(tokenizer) if tokenizer else None
    site = Site(out, run / "images", pieces)
    site.write_assets()
    done = _done(out)
    lines: dict[str, dict[str, Any]] = {}
    for number, paths in dumped.items():
        stamp = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
        known = done.get(str(number))
        if known is None or known["stamp"] != stamp:
            known = {"stamp": stamp, "line": site.write_step(read_step(number, paths, options))}
        lines[str(number)] = known
    write_atomically(out / _DONE, json.dumps(lines))
    name = run.resolve().name
    about = f"{len(lines)} dumped steps of the run {name}"
    shown = {"name": name, "about": about, "notes": notes, "recipe": text}
    site.write_run(shown, [held["line"] for held in lines.values()])
    return len(lines)


def _recipe(run: Path) -> tuple[TapoOptions | None, list[str], dict[str, Any], str | None]:
    """Options of the credit stage, what a reader has to know, the recipe as values and as text.

    Only `credit` is checked: a run of another version has other fields elsewhere, perhaps.
    """
    path = RunFolder(run).recipe
    if not path.is_file():
        return None, ["There is no recipe.yaml, so reasons are not known."], {}, None
    text = path.read_text(errors="replace")
    try:
        values = yaml.safe_load(text)
        credit = values["credit"]
        name = credit["name"]
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise DataError(f"{path}: {error!r}; wanted the resolved recipe of a run") from error
    if name != "tapo":
        note = f"credit={name}: advantages are shown; reasons are those of TAPO and left out."
        return None, [note], values, text
    try:
        options = _TAPO.validate_json(json.dumps(credit))
    except ValidationError as error:
        raise DataError(f"{path}: credit: {error}; wanted the options of TAPO") from error
    if options.scope == "batch":
        note = "credit.scope=batch: calls of other questions decide, too; reasons are left out."
        return None, [note], values, text
    return options, [], values, text


def _model_of(recipe: dict[str, Any]) -> list[Path]:
    model = recipe.get("model")
    return [Path(str(model["path"]))] if isinstance(model, dict) and "path" in model else []


def _done(out: Path) -> dict[str, Any]:
    path = out / _DONE
    if not path.is_file():
        return {}
    held = parse_json(path.read_bytes(), where=str(path))
    if not isinstance(held, dict):
        raise DataError(f"{path}: found {type(held).__name__}, wanted an object; delete the folder")
    return held
