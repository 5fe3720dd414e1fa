"""How a process of xlpk ends, and when its garbage collector rests. Both are a matter of MLflow's size.

MLflow and what it brings are 2,000 modules and half a million objects. Walking them costs 0.3 s in the passes of the
collector while they are imported, and 0.4 s once more when the interpreter takes its modules apart.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import sys
import threading
from collections.abc import Iterator
from typing import NoReturn

HEAVY = ("mlflow", "torch")  # what makes the interpreter's end slow


def leave(code: int) -> NoReturn:
    """Ends the process as `sys.exit(code)` would, but leaves the memory of heavy libraries to the kernel.

    Exit handlers run and the standard streams are flushed; a thread that must be waited for gets the ordinary end.
    """
    waited_for = [thread for thread in threading.enumerate() if not thread.daemon]
    if waited_for != [threading.current_thread()] or not any(name in sys.modules for name in HEAVY):
        sys.exit(code)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            sys.exit(code)  # the interpreter's end says what it says of a stream that cannot be written
    os._exit(code)


@contextlib.contextmanager
def collector_at_rest() -> Iterator[None]:
    """No collection within the block; if it imported modules, what is there now is never looked at again.

    What an import makes lives as long as the process. Later collections, which may fall into a measurement, skip it.
    """
    was_on = gc.isenabled()
    n_modules = len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > n_modules:
            gc.freeze()
        if was_on:
            gc.enable()
