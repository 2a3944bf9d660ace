"""`dashboard`: a workspace of Weights & Biases from the metric catalogue."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from tapo_train.errors import ConfigError
from tapo_train.report.catalogue import METRICS, SECTIONS, panels_of, unit_of

DESCRIPTION = """\
Make a workspace in Weights & Biases with a panel for every metric a run may log, in sections, with
units and meanings. Needs a login (`wandb login`) and the extra `dashboard`; runs need neither.
Offline runs join the project when `wandb sync RUN/wandb/offline-run-*` sends them.
"""


def main(argv: Sequence[str]) -> None:
    """Send the workspace, or print what it would hold."""
    arguments = _parser().parse_args(argv)
    if arguments.dry_run:
        print(outline())
        return
    from tapo_train.report.wandb_sink import REFUSED, default_entity

    entity = arguments.entity or default_entity()
    try:
        from tapo_train.report.wandb_workspace import make_workspace
    except ImportError as error:
        raise ConfigError(
            f"dashboard: {error}; wanted the extra: pip install 'tapo_train[dashboard]'"
        ) from error
    workspace = make_workspace(entity=entity, project=arguments.project, name=arguments.name)
    try:
        workspace.save()
    except REFUSED as error:
        raise ConfigError(f"dashboard: {entity}/{arguments.project}: {error}") from error
    print(workspace.url)


def outline() -> str:
    """Sections, metrics, units and meanings as text."""
    lines = []
    for section in SECTIONS:
        lines.append(section)
        for name in panels_of(section):
            unit = unit_of(name)
            meaning = METRICS[name].removeprefix(f"[{unit}] ")
            lines.append(f"  {name:<44} {unit:<6} {meaning}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tapo_train dashboard",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--entity", help="default: that of the login")
    parser.add_argument("--project", default="tapo_train", help="default: tapo_train")
    parser.add_argument("--name", default="tapo_train", help="of the view (default: tapo_train)")
    parser.add_argument("--dry-run", action="store_true", help="print the panels, send nothing")
    return parser
