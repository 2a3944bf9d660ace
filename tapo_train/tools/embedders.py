"""Texts to unit vectors: a sentence-transformers folder, or an OpenAI-compatible endpoint.

folder      modules.json, 1_Pooling/config.json (mean or first token), weights in safetensors
endpoint    POST …/embeddings {"model", "input": ["…"]} → {"data": [{"index", "embedding"}]}
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tapo_train.errors import DataError, ToolDownError, ToolError
from tapo_train.tools.addresses import shown
from tapo_train.tools.endpoints import Request, another_form, asked, json_of, value_at
from tapo_train.tools.net import HttpClient
from tapo_train.tools.vector_index import Floats

__all__ = [
    "Embedder",
    "EndpointEmbedder",
    "FolderEmbedder",
    "folder_digest",
    "read_part",
    "unit",
]

_TOGETHER = 32
"""Texts of one pass through a model."""
_HASHED_BYTES = 1 << 20


class Embedder(Protocol):
    """What makes vectors of texts."""

    @property
    def version(self) -> str:
        """Differs where the vectors may."""

    async def embed(self, texts: Sequence[str], *, is_query: bool) -> Floats:
        """[N, D] unit vectors."""

    async def close(self) -> None:
        """Give back what it holds."""


class EndpointEmbedder:
    """An OpenAI-compatible endpoint.

    Args:
        endpoint: ends before /embeddings.
        query_prefix, passage_prefix: what the model wants in front of either.
    """

    def __init__(
        self,
        client: HttpClient,
        *,
        endpoint: str,
        model: str,
        query_prefix: str = "",
        passage_prefix: str = "",
    ) -> None:
        self._client = client
        self._url = endpoint.rstrip("/") + "/embeddings"
        self._model = model
        self._prefixes = (passage_prefix, query_prefix)
        # Not the address: the same model may move.
        self.version = f"endpoint:{model}:{passage_prefix}:{query_prefix}"

    async def embed(self, texts: Sequence[str], *, is_query: bool) -> Floats:
        """[N, D] unit vectors.

        Raises:
            ToolDownError: it is down, refuses, or answers in another form.
        """
        wanted = [self._prefixes[is_query] + text for text in texts]
        request = Request.posting(self._url, {"model": self._model, "input": wanted})
        try:
            data = await asked(self._client, request)
        except ToolDownError:
            raise
        except ToolError as error:
            raise ToolDownError(f"{shown(self._url)}: {error}", retryable=False) from error
        return _vectors(data, len(texts))

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()


def _vectors(data: bytes, count: int) -> Floats:
    rows = value_at(json_of(data), "data")
    try:
        ordered = sorted(rows, key=lambda row: int(row["index"]))
        vectors = np.array([row["embedding"] for row in ordered], dtype=np.float32)
        places = [int(row["index"]) for row in ordered]
    except (TypeError, KeyError, ValueError) as error:
        raise another_form(data, f"wanted a list data of index and embedding ({error})") from error
    if places != list(range(count)) or vectors.ndim != 2 or not np.isfinite(vectors).all():
        raise another_form(data, f"wanted {count} vectors of equal length, all numbers finite")
    return unit(vectors)


def unit(vectors: Floats) -> Floats:
    """[N, D] of length 1."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    shortened: Floats = (vectors / np.maximum(norms, 1e-12)).astype(np.float32)
    return shortened


class FolderEmbedder:
    """A model from a local folder, on the CPU. It runs no code of the folder.

    Raises:
        DataError: the folder is none, or pools in another way.
    """

    def __init__(self, folder: Path, *, query_prefix: str = "", passage_prefix: str = "") -> None:
        import transformers

        self._prefixes = (passage_prefix, query_prefix)
        self._takes_first, self._longest = _pooling(folder)
        self._tokenizer = read_part(transformers.AutoTokenizer, folder)
        self._model = read_part(transformers.AutoModel, folder, use_safetensors=True).eval()
        self.version = f"folder:2:{folder_digest(folder)}:{passage_prefix}:{query_prefix}"

    async def embed(self, texts: Sequence[str], *, is_query: bool) -> Floats:
        """[N, D] unit vectors."""
        wanted = [self._prefixes[is_query] + text for text in texts]
        return await asyncio.to_thread(self._embedded, wanted)

    async def close(self) -> None:
        """Nothing is held."""

    def _embedded(self, texts: list[str]) -> Floats:
        """A text of more tokens than the model reads at a time is read in pieces."""
        pieces = self._tokenizer(
            texts,
            truncation=True,
            max_length=self._longest,
            return_overflowing_tokens=self._tokenizer.is_fast,
        )
        owners = pieces.pop("overflow_to_sample_mapping", range(len(texts)))
        pooled = []
        for start in range(0, len(owners), _TOGETHER):
            part = {name: rows[start : start + _TOGETHER] for name, rows in pieces.items()}
            pooled.append(self._pooled(self._tokenizer.pad(part, return_tensors="pt")))
        firsts = np.searchsorted(owners, range(len(texts)))
        return unit(np.add.reduceat(np.concatenate(pooled), firsts))

    def _pooled(self, tokens: Any) -> Floats:
        """[N, D] of pieces: sums over their tokens, so that long ones weigh more, or the first."""
        import torch

        with torch.inference_mode():
            hidden = self._model(**tokens).last_hidden_state  # [N, T, D]
        mask = tokens["attention_mask"][:, :, None]
        pooled = hidden[:, 0] if self._takes_first else (hidden * mask).sum(1)
        vectors: Floats = pooled.float().numpy()
        return vectors


def _pooling(folder: Path) -> tuple[bool, int]:
    """Whether the first token stands for the text, and how many tokens are read."""
    try:
        pooling: dict[str, Any] = json.loads((folder / "1_Pooling" / "config.json").read_bytes())
        limits = folder / "sentence_bert_config.json"
        limit = json.loads(limits.read_bytes()) if limits.exists() else {}
        modes = {
            name for name, chosen in pooling.items() if "pooling_mode" in name and chosen is True
        }
        modes |= (
            {pooling["pooling_mode"]} if isinstance(pooling.get("pooling_mode"), str) else set()
        )
        longest = int(limit.get("max_seq_length") or 512)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(
            f"embedder {folder}: {type(error).__name__}: {error}; wanted a sentence-transformers "
            "folder with 1_Pooling/config.json"
        ) from error
    if modes in ({"pooling_mode_mean_tokens"}, {"mean"}):
        return False, longest
    if modes in ({"pooling_mode_cls_token"}, {"cls"}):
        return True, longest
    raise DataError(f"embedder {folder}: found pooling {sorted(modes)}, wanted mean or first token")


def read_part(kind: Any, folder: Path, **options: Any) -> Any:
    """What `kind` (a class of transformers) makes of a local folder, without running its code.

    Raises:
        DataError: it is none, is damaged, or wants code of its own.
    """
    from safetensors import SafetensorError

    try:
        return kind.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **options
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise DataError(f"embedder {folder}: {str(error)[:300]}") from error


def folder_digest(folder: Path, *, is_whole: bool = False) -> str:
    """Of the configuration and the weights, or of their beginning, which is read faster."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]):
        with path.open("rb") as file:
            digest.update(f"{path.name}:{path.stat().st_size}:".encode())
            digest.update(file.read(_HASHED_BYTES))
            while is_whole and (part := file.read(_HASHED_BYTES)):
                digest.update(part)
    return digest.hexdigest()[:16]
