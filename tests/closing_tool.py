"""A tool that notes when it is closed, once per process that had it open."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import BaseModel

from tapo_train.tools.base import ToolContext
from tapo_train.types import Observation

NOTES = "CLOSING_NOTES"
"""Environment variable: the folder of the notes."""
FAULTY = "CLOSING_FAILS"
"""Environment variable: with it, closing fails after the note."""
IDLE_TOOL = "tools.extra=[tests.closing_tool:ClosingTool]"


class Nothing(BaseModel):
    """No arguments."""


class ClosingTool:
    """Answers nothing of interest."""

    name = "idle"
    description = "Do nothing."
    version = "1"
    arguments_model: type[BaseModel] = Nothing

    async def run(self, arguments: Nothing, context: ToolContext) -> Observation:
        return Observation(text="nothing")

    def close(self) -> None:
        with (Path(os.environ[NOTES]) / str(os.getpid())).open("a") as notes:
            notes.write("closed\n")
        if FAULTY in os.environ:
            raise OSError("it is stuck")


def notes(folder: Path) -> list[str]:
    """What each process noted."""
    return [file.read_text() for file in folder.iterdir()]
