"""What two sides must have in common before they exchange tokens."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

from tapo_train.rollout.chat import ChatFormat

END_BYTES = 2**20
"""Of a weights file's beginning and end, which the fingerprint covers beside its size."""


def chat_identity(chat: ChatFormat) -> str:
    """Digest of everything that turns text and pictures into tokens, and of the banned ids."""
    pieces = chat.template.pieces
    parts = {
        "banned": chat.banned_token_ids,
        "control": chat.control_token_ids,
        "end": chat.end_token_id,
        "image": chat.image_token_id,
        "template": [pieces.end, pieces.before, pieces.between, pieces.after, pieces.picture],
        "pixels": chat.image_processor.to_dict(),
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
