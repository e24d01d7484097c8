"""Work on the root whose progress is shown at once: until a line comes, or with "lines" until one was printed."""

from __future__ import annotations

import sys
import threading

from dllama_mpi import log, progress
from dllama_mpi.parallel.group import connect

progress.QUIET_SECONDS, progress._DRAW_SECONDS = 0.0, 0.01
group = connect()
if group.is_root:
    told = threading.Event()
    progress.show_progress("auto")
    with progress.Progress("loading", 1000, "tensors") as shown:
        shown.add(250)
        if sys.argv[1] == "lines":
            log.before_line.append(told.set)
            told.wait(60)
        else:
            sys.stdin.readline()
group.allgather(None)
if group.is_root:
    print("done")
