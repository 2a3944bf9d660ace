"""What trainer and engine process say to each other, one dataclass per frame.

The header of a frame is one of these as JSON, with `op` naming which; numbers travel in
the body. A request names pictures by the sha256 of their bytes; a picture itself is sent
once to a server.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from tapo_train.errors import EngineLostError
from tapo_train.rollout.remote.wire import Frame

STRICT = ConfigDict(extra="forbid")

Name = Annotated[str, Field(max_length=1024)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Side = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[float, Field(ge=0)]


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class PolicyId:
    """Which weights: of which run, after how many syncs. ("", 0) are the model folder's own."""

    run: Name = ""
    version: int = 0

    def __str__(self) -> str:
        return f"version {self.version} of run {self.run}" if self.run else "the model folder's"


BASE = PolicyId()
UNKNOWN = PolicyId(run="unknown", version=-1)
"""Of a server whose weights were half replaced when their sender went away."""
WEIGHTS = "weights"
"""Stands for the request's id where a server could not take weights."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Challenge:
    """The server's first word."""

    protocol: int
    nonce: Digest
    op: Literal["challenge"] = "challenge"


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Hello:
    """The client's proof, and its own challenge."""

    nonce: Digest
    mac: Digest
    op: Literal["hello"] = "hello"


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Welcome:
    """The server's proof, and what it serves."""

    mac: Digest
    identity: Digest
    """Of the chat format: two sides that differ in it would not speak of the same tokens."""
    base: Digest
    """Of the model folder's weights."""
    max_tokens: int
    """[tokens] longest sequence."""
    op: Literal["welcome"] = "welcome"


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Refused:
    """The server's last word."""

    message: str
    op: Literal["refused"] = "refused"


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class PutImage:
    """A picture; the body is its encoded bytes."""

    sha256: Digest
    width: Side
    height: Side
    op: Literal["image"] = "image"


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Submit:
    """A `GenerationRequest`; the body is its tokens, int32."""

    id: Name
    policy: PolicyId
    images: tuple[Digest, ...]
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    op: Literal["submit"] = "submit"


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Score:
    """Ask for `Engine.score`; the body is the tokens, int32."""

    id: Name
    policy: PolicyId
    images: tuple[Digest, ...]
    op: Literal["score"] = "score"


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Abort:
    """Forget requests; those that are not there are no error."""

    ids: tuple[Name, ...]
    op: Literal["abort"] = "abort"


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class BeginWeights:
    """Tensors of `policy` follow."""

    policy: PolicyId
    op: Literal["begin_weights"] = "begin_weights"


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Tensor:
    """A tensor, or its next slice: the body, raw bytes in C order."""

    name: Name
    dtype: Literal["float32", "bfloat16", "float16"]
    shape: tuple[Annotated[int, Field(ge=0)], ...]
    offset: Annotated[int, Field(ge=0)]
    """[bytes] of this slice in the tensor."""
    op: Literal["tensor"] = "tensor"


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class EndWeights:
    """All tensors were sent."""

    op: Literal["end_weights"] = "end_weights"


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Reload:
    """Read `policy` from a folder of safetensors below the server's weights root."""

    policy: PolicyId
    folder: Name
    op: Literal["reload"] = "reload"


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Completed:
    """A `Completion`; the body is its tokens, int32, and log-probabilities, float32."""

    id: Name
    finished: Literal["stop", "length"]
    cached_tokens: Annotated[int, Field(ge=0)]
    op: Literal["completed"] = "completed"


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Scored:
    """What `Engine.score` returned: the body, float32."""

    id: Name
    op: Literal["scored"] = "scored"


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Failed:
    """A request was not served."""

    id: Name
    reason: Literal["alignment", "engine", "policy", "images"]
    """"policy": the server holds other weights; "images": it does not have the pictures."""
    message: str
    op: Literal["failed"] = "failed"


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Loaded:
    """The server holds `policy`; said to a new client, and to every client after a sync."""

    policy: PolicyId
    op: Literal["loaded"] = "loaded"


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Alive:
    """Said every few seconds."""

    idle_s: Seconds
    """Since the engine last came round; a large number means that it hangs."""
    op: Literal["alive"] = "alive"


ClientMessage = (
    Hello | PutImage | Submit | Score | Abort | BeginWeights | Tensor | EndWeights | Reload
)
ServerMessage = Challenge | Welcome | Refused | Completed | Scored | Failed | Loaded | Alive

_CLIENT: TypeAdapter[Any] = TypeAdapter(Annotated[ClientMessage, Field(discriminator="op")])
_SERVER: TypeAdapter[Any] = TypeAdapter(Annotated[ServerMessage, Field(discriminator="op")])


def header(message: ClientMessage | ServerMessage) -> bytes:
    """`message` as the header of a frame."""
    adapter = _CLIENT if isinstance(message, ClientMessage) else _SERVER
    written: bytes = adapter.dump_json(message)
    return written


def read_client(frame: Frame, *, peer: str) -> ClientMessage:
    """What a client said; EngineLostError if it is nothing a client says."""
    message: ClientMessage = _read(_CLIENT, frame, peer)
    return message


def read_server(frame: Frame, *, peer: str) -> ServerMessage:
    """What a server said; EngineLostError if it is nothing a server says."""
    message: ServerMessage = _read(_SERVER, frame, peer)
    return message


def _read(adapter: TypeAdapter[Any], frame: Frame, peer: str) -> Any:
    try:
        return adapter.validate_json(frame.header)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        raise EngineLostError(
            f"{peer}: sent a frame nobody knows: {problem['msg']} "
            f"(at {'.'.join(map(str, problem['loc'])) or 'its start'}); another protocol?"
        ) from error
