"""What a loader process runs instead of the program that started it (data/loader.py).

`multiprocessing` would import that program again, with JAX and all that it needs: seconds
and hundreds of megabytes for each process, and again after each recovery.
"""

import logging
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

if __name__ == "__mp_main__":
    sys.modules["jax"] = None  # type: ignore[assignment]  # Grain takes it where it is
    logging.disable(logging.WARNING)  # and warns that it has none to profile
    import grain  # noqa: F401

    logging.disable(logging.NOTSET)

    # Signals of a terminal or a cluster reach all processes: the trainer decides, and it
    # needs its batches until it has saved.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def introduce(folder: str, index: int, count: int) -> None:
    """Leave this process's id in a folder, to be ended by; and end with the trainer."""
    (Path(folder) / str(os.getpid())).touch()
    args = (os.getppid(), folder)
    threading.Thread(target=_leave_with, args=args, daemon=True).start()


def _leave_with(parent: int, folder: str) -> None:
    """A killed trainer cannot end its processes."""
    while os.getppid() == parent:
        time.sleep(1)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)
