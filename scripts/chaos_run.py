"""`python -m tapo_train`, with every connection of this process watched and kept on the machine.

An audit hook sees each connect of Python code, whoever makes it: one that would leave the
loopback is refused and written to $CHAOS_OUT/left.RANK, and the peak of resident memory to
$CHAOS_OUT/rss.RANK. A hook cannot be taken off again.
"""

from __future__ import annotations

import ipaddress
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

OUT = Path(os.environ["CHAOS_OUT"])
RANK = os.environ.get("RANK", "0")


def is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in ("localhost", "")


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event not in ("socket.connect", "socket.sendto"):
        return
    address = arguments[1]
    if isinstance(address, tuple) and not is_here(str(address[0])):
        with (OUT / f"left.{RANK}").open("a") as file:
            file.write(f"{event} {address}\n")
        raise PermissionError(f"{address} is not on this machine")


def note_memory() -> None:
    """Keep the file whole at any moment: the process may end while this thread writes."""
    note = OUT / f"rss.{RANK}"
    while True:
        status = Path("/proc/self/status").read_text()
        peak_kib = status.split("VmHWM:")[1].split()[0]
        fresh = OUT / f"writing.{RANK}"
        fresh.write_text(peak_kib)
        fresh.replace(note)
        time.sleep(0.5)


if __name__ == "__main__":
    sys.addaudithook(watch)
    threading.Thread(target=note_memory, daemon=True).start()
    from tapo_train.__main__ import main

    sys.exit(main(sys.argv[1:]))
