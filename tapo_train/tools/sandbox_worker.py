"""The process that opens what strangers sent: pictures, pages, queries, videos.

Killed when it takes too long.

It gets bytes over its standard input, which is a socket, and answers with bytes: no
pickles, no names; of files it reads the database or video that our side names, and
writes none.
`sandbox.py` starts it; it ends when the other side does. An exception that is not foreseen ends it
too, which the other side sees and records.
"""

from __future__ import annotations

import io
import resource
import socket
import struct
import sys

from PIL import Image as Pillow

from tapo_train.data.images import FORMATS, ImageLimits, read_image
from tapo_train.errors import DataError
from tapo_train.tools.images import REDUCING_GAP, encode_png, on_white
from tapo_train.tools.page_text import html_to_text
from tapo_train.tools.sqlite_query import answer_query
from tapo_train.tools.video_frames import answer_frames

REQUEST = struct.Struct(">BII")
"""Kind, limit (longest side of the answer [px], or characters; of a query, bytes), length of what
follows."""
REPLY = struct.Struct(">BIII")
"""Status, width, height, length of what follows."""
READY = b"!"
"""Said once, before the first request is read."""
PICTURE, PAGE, QUERY, FRAMES = 0, 1, 2, 3
DONE, REFUSED = 0, 1
MAX_ASPECT = 100
"""Longest over shortest side; vision processors refuse thinner strips."""


def receive(channel: socket.socket, length: int) -> bytes | None:
    """Exactly `length` bytes, or None if the other side is gone."""
    held = bytearray()
    while len(held) < length:
        piece = channel.recv(min(length - len(held), 1 << 20))
        if not piece:
            return None
        held += piece
    return bytes(held)


def reencoded(data: bytes, *, longest_px: int, limits: ImageLimits, max_side: int) -> Pillow.Image:
    """RGB pixels of a checked picture, reduced to `longest_px`; nothing else survives.

    Raises:
        DataError: too large, too thin, of another format, or damaged.
    """
    image = read_image(data, where="a picture from outside", limits=limits)
    width, height = image.width, image.height
    if max(width, height) > min(max_side, MAX_ASPECT * min(width, height)):
        raise DataError(f"a picture of {width} x {height} pixels is too long or too thin")
    with Pillow.open(io.BytesIO(data), formats=FORMATS) as encoded:
        if encoded.format == "JPEG":
            encoded.draft("RGB", (longest_px, longest_px))
        picture: Pillow.Image = encoded
        if encoded.mode not in ("RGB", "RGBA", "L"):
            # Palettes cannot be averaged; 16-bit and CMYK pixels become what tools show.
            picture = encoded.convert("RGBA" if encoded.has_transparency_data else "RGB")
        size = (longest_px, longest_px)
        picture.thumbnail(size, Pillow.Resampling.LANCZOS, reducing_gap=REDUCING_GAP)
        return on_white(picture)


def answer(kind: int, limit: int, data: bytes, limits: ImageLimits, max_side: int) -> bytes:
    """The whole reply to one request."""
    try:
        if kind == PAGE:
            text = html_to_text(data.decode("utf-8", "replace"), max_chars=limit)
            return _reply(DONE, 0, 0, text.encode())
        if kind == QUERY:
            return _reply(DONE, 0, 0, answer_query(data))
        if kind == FRAMES:
            return _reply(DONE, 0, 0, answer_frames(data, longest_px=limit))
        pixels = reencoded(data, longest_px=limit, limits=limits, max_side=max_side)
        return _reply(DONE, pixels.width, pixels.height, encode_png(pixels))
    except DataError as error:
        return _reply(REFUSED, 0, 0, str(error).encode("utf-8", "replace"))
    except MemoryError:
        return _reply(REFUSED, 0, 0, b"it needs more memory than it may have")


def _reply(status: int, width: int, height: int, data: bytes) -> bytes:
    return REPLY.pack(status, width, height, len(data)) + data


def main(memory: int, max_bytes: int, max_pixels: int, max_side: int) -> None:
    """Answer requests until the other side is gone."""
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    limits = ImageLimits(max_bytes=max_bytes, max_pixels=max_pixels)
    with socket.socket(fileno=0) as channel:
        channel.sendall(READY)
        while (head := receive(channel, REQUEST.size)) is not None:
            kind, limit, length = REQUEST.unpack(head)
            data = receive(channel, length)
            if data is None:
                return
            channel.sendall(answer(kind, limit, data, limits, max_side))


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
