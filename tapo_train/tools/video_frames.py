"""Frames of a video at given times; decoded in the sandbox's worker.

    {"video": path, "times_s": [t]}, longest side of a frame
      →  {"duration_s": s, "frames": [{"time_s": t, "width": w, "height": h, "bytes": n}]}, PNGs

A frame is the first at or after its time, or the last of the video. The answer is the length of the
JSON in four bytes, the JSON, the PNGs.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Iterator, Sequence
from typing import Any

from tapo_train.errors import DataError
from tapo_train.tools.images import encode_png

__all__ = ["HEAD", "MOST_FRAMES", "answer_frames"]

HEAD = struct.Struct(">I")
MOST_FRAMES = 64
MOST_SIDE = 8192
"""[px] of a frame as it is in the file."""


def answer_frames(request: bytes, *, longest_px: int) -> bytes:
    """The answer to a request, both as the module says.

    Raises:
        DataError: it is no video that can be read, or without a length.
    """
    import av
    from av.error import FFmpegError

    asked = json.loads(request)
    if not 1 <= len(asked["times_s"]) <= MOST_FRAMES:
        raise DataError(f"{len(asked['times_s'])} frames; wanted 1 to {MOST_FRAMES}")
    try:
        with av.open(asked["video"], metadata_errors="replace") as container:
            if not container.streams.video:
                raise DataError("it has no video stream")
            stream = container.streams.video[0]
            stream.thread_count = 1
            duration = (container.duration or 0) / 1_000_000  # ffmpeg's unit is the microsecond
            if duration <= 0 or max(stream.width, stream.height) > MOST_SIDE:
                raise DataError(f"{duration} s of {stream.width} x {stream.height} pixels")
            found = list(_frames(container, stream, asked["times_s"], longest_px))
    except (FFmpegError, OSError, ValueError) as error:
        raise DataError(f"it cannot be read: {error}") from error
    shown = [{**about, "bytes": len(data)} for about, data in found]
    head = json.dumps({"duration_s": duration, "frames": shown}).encode()
    return HEAD.pack(len(head)) + head + b"".join(data for _, data in found)


def _frames(
    container: Any, stream: Any, times: Sequence[float], longest_px: int
) -> Iterator[tuple[dict[str, float], bytes]]:
    """(time and size, PNG) of each frame asked for."""
    for time_s in times:
        container.seek(int(time_s / stream.time_base), stream=stream, backward=True)
        frame = last = None
        for frame in container.decode(stream):
            last = frame
            if frame.time is not None and frame.time >= time_s - 1e-6:
                break
        if last is None:
            raise DataError(f"no frame at {time_s} s")
        picture = last.to_image()
        picture.thumbnail((longest_px, longest_px))
        about = {"time_s": last.time or 0.0, "width": picture.width, "height": picture.height}
        yield about, encode_png(picture)


def pieces(answer: bytes) -> tuple[float, list[tuple[float, int, int, bytes]]]:
    """Duration [s], and (time [s], width, height, PNG) of each frame of an answer.

    Raises:
        DataError: it is none: the worker may have been taken over by what it opened.
    """
    try:
        (length,) = HEAD.unpack_from(answer)
        head = json.loads(answer[HEAD.size : HEAD.size + length])
        rest = io.BytesIO(answer[HEAD.size + length :])
        frames = [
            (float(f["time_s"]), int(f["width"]), int(f["height"]), rest.read(int(f["bytes"])))
            for f in head["frames"]
        ]
        return float(head["duration_s"]), frames
    except (struct.error, ValueError, TypeError, LookupError) as error:
        raise DataError(f"the worker's answer is no frames: {error}") from error
