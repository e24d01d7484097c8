"""`python -m dllama_mpi`, and the command `dllama-mpi`."""

import atexit
import os
import signal
import sys
import threading

# Until `main` has a handler of its own: what Python's would raise in the middle of an import may come out as anything.
if threading.current_thread() is threading.main_thread() and (
    signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, lambda _signal, _frame: os._exit(130))
    # Last of all: the work is done, and while Python takes itself apart the signal would kill it.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
