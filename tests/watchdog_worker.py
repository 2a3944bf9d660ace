"""A rank that hangs, for the test of the watchdog.

torchrun --nproc-per-node N watchdog_worker.py FOLDER sleep|hold|work|load STALL_S

sleep: the last rank sleeps and the others wait for it in a collective; hold: it sleeps
without letting any other thread run; work: it sleeps too, but not for long at a time;
load: it reaches its first stage after twice STALL_S, where it hangs after all.
"""

from __future__ import annotations

import ctypes
import sys
import time
from pathlib import Path

from tapo_train.learner import distributed
from tapo_train.training.watchdog import Watchdog


def hang_here(kind: str, watchdog: Watchdog, stall_s: float) -> None:
    if kind == "sleep":
        time.sleep(100)
    elif kind == "hold":
        ctypes.PyDLL(None).sleep(100)
    for _ in range(6):
        time.sleep(stall_s / 3)
        watchdog.beat()


def main(folder: Path, kind: str, stall_s: float) -> None:
    distributed.init()
    watchdog = Watchdog(folder, stall_s=stall_s)
    watchdog.calls = lambda: {"text_search": 3, "image_search": 0}
    distributed.barrier()
    if distributed.rank() == distributed.world_size() - 1:
        if kind == "load":
            time.sleep(2 * stall_s)
            print("loaded", flush=True)
        watchdog.enter("rollout")
        hang_here("sleep" if kind == "load" else kind, watchdog, stall_s)
    watchdog.enter("advantage")
    distributed.barrier()
    watchdog.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
