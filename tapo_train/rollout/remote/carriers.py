"""How new weights reach the servers: over the connection, or through a shared folder.

The third way, NCCL broadcast through vLLM's weight-transfer API, would be another
`WeightCarrier`: `send` announces the tensors in frames and broadcasts them in a group of
its own. It needs a GPU on each side, and is not here because it could not be tried.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

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


class FolderWeights:
    """As safetensors in a folder that trainer and servers share; the newest is kept."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._newest: Path | None = None

    def send(
        self, links: Sequence[ServerLink], weights: Weights, policy: PolicyId, lose: Lose
    ) -> None:
        """See `WeightCarrier.send`. The folder before goes when the new one is written."""
        folder = self._root / folder_name(policy)
        write_weights(iter(weights), folder)
        _tell(links, _reload(policy), lose)
        if self._newest is not None and self._newest != folder:
            shutil.rmtree(self._newest)
        self._newest = folder

    def revive(self, link: ServerLink, policy: PolicyId, lose: Lose) -> None:
        """See `WeightCarrier.revive`."""
        if self._newest == self._root / folder_name(policy):
            _tell([link], _reload(policy), lose)


def _reload(policy: PolicyId) -> Reload:
    return Reload(policy=policy, folder=folder_name(policy))


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
