"""How new weights reach the servers: over the connection, or through a shared folder.

The third way, NCCL broadcast through vLLM's weight-transfer API, would be another
`WeightCarrier`: `send` announces the tensors in frames and broadcasts them in a group of
its own. It needs a GPU on each side, and is not here because it could not be tried.
"""

from __future__ import annotations

import shutil
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from uuid import uuid4

from tapo_train.errors import EngineLostError
from tapo_train.rollout.remote.link import ServerLink
from tapo_train.rollout.remote.messages import (
    BeginWeights,
    ClientMessage,
    EndWeights,
    PolicyId,
    Reload,
    header,
)
from tapo_train.rollout.remote.weight_stream import folder_name, slices, write_weights

if TYPE_CHECKING:
    import torch

Lose = Callable[[ServerLink], None]
Weights = Iterable[tuple[str, "torch.Tensor"]]


class WeightCarrier(Protocol):
    """Carries the learner's weights to servers; these answer `Loaded` when they have them."""

    def send(
        self, links: Sequence[ServerLink], weights: Weights, policy: PolicyId, lose: Lose
    ) -> None:
        """Send to every server; `weights` are read to the end whatever happens."""
        ...

    def revive(self, link: ServerLink, policy: PolicyId, lose: Lose) -> None:
        """Give a server that came back the weights of the last `send`, if that is possible."""
        ...

    def close(self) -> None:
        """Leave nothing behind."""
        ...


class StreamedWeights:
    """Parameter by parameter over the connection; one parameter in memory at a time."""

    def send(
        self, links: Sequence[ServerLink], weights: Weights, policy: PolicyId, lose: Lose
    ) -> None:
        """See `WeightCarrier.send`. A parameter goes to all servers before the next one."""
        _tell(links, BeginWeights(policy=policy), lose)
        for name, tensor in weights:
            for slice_, data in slices(name, tensor):
                _tell(links, slice_, lose, data)
        _tell(links, EndWeights(), lose)

    def revive(self, link: ServerLink, policy: PolicyId, lose: Lose) -> None:
        """The weights are gone; the server has to wait for the next sync."""

    def close(self) -> None:
        """See `WeightCarrier.close`: there is nothing."""


class FolderWeights:
    """As safetensors in a folder that trainer and servers share; the newest is kept until the end.

    Below `root` each carrier has a folder of its own, as ranks with servers of their own share
    `root`. It goes with `close`, at the latest when the process ends without being killed.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._own = f"weights-{uuid4().hex}"
        self._newest: tuple[PolicyId, str] | None = None
        self._finish = weakref.finalize(self, _remove, root / self._own)

    def send(
        self, links: Sequence[ServerLink], weights: Weights, policy: PolicyId, lose: Lose
    ) -> None:
        """See `WeightCarrier.send`. The folder before goes when the new one is written."""
        before, self._newest = self._newest, (policy, f"{self._own}/{folder_name(policy)}")
        name = self._newest[1]
        write_weights(iter(weights), self._root / name)
        _tell(links, Reload(policy=policy, folder=name), lose)
        if before is not None and before[1] != name:
            _remove(self._root / before[1])

    def revive(self, link: ServerLink, policy: PolicyId, lose: Lose) -> None:
        """See `WeightCarrier.revive`."""
        if self._newest is not None and self._newest[0] == policy:
            _tell([link], Reload(policy=policy, folder=self._newest[1]), lose)

    def close(self) -> None:
        """See `WeightCarrier.close`."""
        self._finish()


def _remove(folder: Path) -> None:
    """Take a folder away; that it cannot be is no reason to end a run."""
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return  # nothing was sent
    except OSError as error:
        print(f"weights in {folder} are left behind: {error}", file=sys.stderr, flush=True)


def _tell(
    links: Sequence[ServerLink], message: ClientMessage, lose: Lose, data: memoryview | bytes = b""
) -> None:
    """Send a frame to each server that is still there."""
    written = header(message)
    for link in links:
        if link.channel is not None:
            try:
                link.channel.send(written, data)
            except EngineLostError:
                lose(link)
