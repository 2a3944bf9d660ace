"""`index`: the corpus of the text search, or the pictures of the picture search, as a folder."""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tapo_train.tools.embedders import Embedder

DESCRIPTION = """\
Write a text index (BM25) from corpora, or add to one. Name its folder in tools.corpus.

CORPUS is a .jsonl or .parquet with id, title, text or with id, contents (Search-R1), or a folder
of .txt and .md. Files are streamed: memory does not grow with them.

`index upload` writes passages to a server of Milvus or OpenSearch instead, for tools.text_store,
with vectors beside them where --model names an embedder.

`index pictures` makes a folder for tools.image_index from a .jsonl of {"title", "image"} or from a
folder of PNG, JPEG and WebP, which are found by their names. `index look-alikes` adds vectors of a
CLIP or SigLIP folder to it, for tools.look_alikes.
"""


def main(argv: Sequence[str]) -> None:
    """Build or add."""
    arguments = _parser().parse_args(argv)
    started = time.monotonic()
    if arguments.action == "upload":
        print(f"{_uploaded(arguments)} ({time.monotonic() - started:.1f} s)")
        return
    makers = {"pictures": _pictures, "embed": _vectors, "look-alikes": _look_alikes}
    what = makers.get(arguments.action, _passages)(arguments)
    size = sum(file.stat().st_size for file in arguments.folder.iterdir())
    print(
        f"{what} -> {arguments.folder} "
        f"({size / 1e6:.1f} MB in all, {time.monotonic() - started:.1f} s)"
    )


def _passages(arguments: argparse.Namespace) -> str:
    from tapo_train.tools.corpus_index import add_to_index, build_index

    change = build_index if arguments.action == "build" else add_to_index
    part = change(arguments.folder, arguments.corpus)
    return f"{part.passages} passages of {part.source}"


def _pictures(arguments: argparse.Namespace) -> str:
    from tapo_train.tools.picture_index import build_picture_index

    count = build_picture_index(
        arguments.folder, arguments.source, thumbnail_side_px=arguments.thumbnail_side
    )
    return f"{count} pictures of {arguments.source.name}"


def _look_alikes(arguments: argparse.Namespace) -> str:
    from tapo_train.tools.look_alikes import VisionTower, embed_pictures

    count = embed_pictures(arguments.folder, arguments.source, VisionTower(arguments.model))
    return f"{count} vectors of pictures"


def _vectors(arguments: argparse.Namespace) -> str:
    from tapo_train.tools.dense_index import embed_index

    async def embed() -> int:
        embedder = _embedder(arguments)
        try:
            return await embed_index(arguments.folder, arguments.corpus, embedder)
        finally:
            await embedder.close()

    return f"{asyncio.run(embed())} vectors"


def _uploaded(arguments: argparse.Namespace) -> str:
    from tapo_train.build.services import build_store
    from tapo_train.recipe.services import StoreSettings
    from tapo_train.tools.corpus import read_passages
    from tapo_train.tools.text_store import upload

    settings = StoreSettings(
        engine=arguments.engine,
        url=arguments.url,
        collection=arguments.collection,
        key_variable=arguments.store_key_variable,
    )

    async def send() -> tuple[int, str]:
        store = build_store(settings, timeout_s=arguments.timeout)
        embedder = _embedder(arguments) if arguments.model else None
        try:
            return await upload(store, read_passages(arguments.corpus), embedder=embedder)
        finally:
            store.close()
            if embedder is not None:
                await embedder.close()

    count, digest = asyncio.run(send())
    return f"{count} passages -> {arguments.engine}:{arguments.collection}, digest {digest}"


def _embedder(arguments: argparse.Namespace) -> Embedder:
    from tapo_train.build.services import build_embedder
    from tapo_train.recipe.services import DenseSettings

    return build_embedder(
        DenseSettings(
            folder=None if arguments.endpoint else arguments.model,
            endpoint=arguments.endpoint,
            model=arguments.model,
            key_variable=arguments.key_variable,
            query_prefix=arguments.query_prefix,
            passage_prefix=arguments.passage_prefix,
        )
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tapo_train index",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", required=True)
    build = actions.add_parser("build", help="a new index")
    build.add_argument("corpus", nargs="+", type=Path, metavar="CORPUS")
    build.add_argument("--out", dest="folder", type=Path, required=True, metavar="DIR")
    add = actions.add_parser("add", help="more passages for an index, in place")
    add.add_argument("folder", type=Path, metavar="DIR")
    add.add_argument("corpus", nargs="+", type=Path, metavar="CORPUS")
    embed = actions.add_parser("embed", help="vectors of an index's passages, for tools.dense")
    embed.add_argument("folder", type=Path, metavar="DIR")
    embed.add_argument(
        "corpus",
        nargs="+",
        type=Path,
        metavar="CORPUS",
        help="its sources, in order",
    )
    _add_embedder(embed, is_required=True)
    upload = actions.add_parser("upload", help="a corpus to a server, for tools.text_store")
    upload.add_argument("corpus", nargs="+", type=Path, metavar="CORPUS")
    upload.add_argument("--engine", required=True, choices=("milvus", "opensearch"))
    upload.add_argument("--url", required=True, help="http(s) address of the server")
    upload.add_argument("--collection", required=True, help="a name that is new there")
    upload.add_argument("--store-key-variable", help="environment variable with its key")
    upload.add_argument("--timeout", type=float, default=120.0, help="[s] of a request (120)")
    _add_embedder(upload, is_required=False)
    _add_picture_actions(actions)
    return parser


def _add_picture_actions(actions: Any) -> None:
    pictures = actions.add_parser("pictures", help="a new index of pictures")
    pictures.add_argument("source", type=Path, metavar="PICTURES")
    pictures.add_argument("--out", dest="folder", type=Path, required=True, metavar="DIR")
    pictures.add_argument(
        "--thumbnail-side", type=int, default=256, help="longest side of what is shown [px] (256)"
    )
    near = actions.add_parser(
        "look-alikes", help="vectors of an index's pictures, for tools.look_alikes"
    )
    near.add_argument("folder", type=Path, metavar="DIR")
    near.add_argument("source", type=Path, metavar="PICTURES", help="what it was made of")
    near.add_argument("--model", type=Path, required=True, help="a CLIP or SigLIP folder")


def _add_embedder(parser: argparse.ArgumentParser, *, is_required: bool) -> None:
    parser.add_argument(
        "--model",
        required=is_required,
        help="a sentence-transformers folder, or its name at the endpoint",
    )
    parser.add_argument("--endpoint", help="OpenAI-compatible, ends before /embeddings")
    parser.add_argument("--key-variable", help="environment variable with the endpoint's key")
    parser.add_argument("--query-prefix", default="", help="in front of queries")
    parser.add_argument("--passage-prefix", default="", help="in front of passages")
