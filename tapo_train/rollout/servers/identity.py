"""What two sides must have in common before they exchange tokens."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from tapo_train.rollout.chat import ChatFormat

END_BYTES = 2**20
"""Of a weights file's beginning and end, which the fingerprint covers beside its size."""

BASE = "default"
"""vLLM's own name of the weights that it was started with."""
TORN = "torn"
"""Name of weights that are being replaced: nobody may sample from them."""

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What a server says of itself."""

    identity: Digest
    """Of the chat format: two sides that differ in it would not speak of the same tokens."""
    base: Digest
    """Of the model folder's weights."""
    max_tokens: Annotated[int, Field(ge=1)]
    """[tokens] longest sequence."""
    replicas: Annotated[int, Field(ge=1)] = 1
    """Engines behind the port (data parallelism); each has caches of its own."""
    devices: Annotated[int, Field(ge=1)] = 1
    """Of all engines together."""


def chat_identity(chat: ChatFormat) -> str:
    """Digest of everything that turns text and pictures into tokens, and of the banned ids."""
    pieces = chat.template.pieces
    parts = {
        "banned": chat.banned_token_ids,
        "control": chat.control_token_ids,
        "end": chat.end_token_id,
        "image": chat.image_token_id,
        "template": [pieces.end, pieces.before, pieces.between, pieces.after, pieces.picture],
        "pixels": chat.image_processor.to_dict() if chat.family.sees else None,
    }
    return sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def weights_fingerprint(folder: Path) -> str:
    """Digest of name, size, beginning and end of each weights file: enough to tell models
    apart, without reading all of a large one."""
    total = sha256()
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        with file.open("rb") as stream:
            head = stream.read(END_BYTES)
            stream.seek(max(0, size - END_BYTES))
            tail = stream.read(END_BYTES)
        total.update(f"{file.name}\0{size}\0{sha256(head + tail).hexdigest()}\n".encode())
    return total.hexdigest()


class WeightNames:
    """How a run names its weights on servers; no two runs share a name.

    Args:
        run: the same on all ranks, and new at each start.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self.present = BASE
        """Of the weights that requests are meant for."""
        self.number = 0
        """Version of those."""

    def name(self, version: int) -> str:
        """Of the weights of a version of this run."""
        return f"{self._run}.{version}"

    def advance(self, version: int) -> None:
        """These weights are meant from now on."""
        self.present, self.number = self.name(version), version

    def version(self, name: str) -> int | None:
        """The version that a name stands for; None: these weights are not this run's."""
        if name == BASE and self.present == BASE:
            return 0
        run, _, number = name.rpartition(".")
        return int(number) if run == self._run and number.isdecimal() else None

    def are_others(self, name: str | None) -> bool:
        """Whether somebody else gave a server these weights, or is at it."""
        return name is not None and name != BASE and self.version(name) is None
