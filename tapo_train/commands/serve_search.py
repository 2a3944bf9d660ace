"""`serve-search`: a text index for other programs."""

from __future__ import annotations

import argparse
import signal
import threading
from collections.abc import Sequence
from pathlib import Path

from tapo_train.errors import ConfigError

DESCRIPTION = """\
Serve a text index in the form of Search-R1's retriever:
POST /retrieve {"queries": [...], "topk": 3, "return_scores": true}.

Nobody is asked who they are: listen on another address than 127.0.0.1 only where everybody may
read the corpus.
"""


def main(argv: Sequence[str]) -> None:
    """Serve until SIGTERM or SIGINT."""
    arguments = _parser().parse_args(argv)
    from tapo_train.tools.corpus_index import CorpusIndex
    from tapo_train.tools.search_server import SearchServer

    index = CorpusIndex.load(arguments.index)
    try:
        server = SearchServer(
            index, host=arguments.host, port=arguments.port, top_k=arguments.top_k
        )
    except (OSError, OverflowError) as error:
        where = f"{arguments.host}:{arguments.port}"
        raise ConfigError(f"serve-search: cannot listen on {where} ({error})") from error
    for number in (signal.SIGTERM, signal.SIGINT):
        # In a thread: shutdown waits for the loop that this handler interrupts.
        signal.signal(number, lambda *_: threading.Thread(target=server.shutdown).start())
    host, port = server.server_address[:2]
    print(f"serving {len(index)} passages on http://{host!s}:{port}/retrieve", flush=True)
    with server:
        server.serve_forever(poll_interval=0.1)
    print("stopped", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tapo_train serve-search",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "index", type=Path, metavar="DIR", help="folder of an index, or a corpus file"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, required=True, help="0 takes a free one and prints it")
    parser.add_argument("--top-k", type=_count, default=3, help="where a request says none (3)")
    return parser


def _count(text: str) -> int:
    if not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError(f"found {text}, wanted 1 to 100")
    return int(text)
