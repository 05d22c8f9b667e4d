"""What a loader process runs instead of the program that started it (data/loader.py).

`multiprocessing` would import that program again, with JAX and all that it needs: seconds
and hundreds of megabytes for each process, and again after each recovery. Grain imports
JAX where it finds it, so that it is hidden.
"""

import logging
import os
import signal
import sys
import threading
import time

if __name__ == "__mp_main__":
    sys.modules["jax"] = None  # type: ignore[assignment]
    logging.disable(logging.WARNING)  # Grain warns that it has no JAX to profile
    import grain  # noqa: F401

    logging.disable(logging.NOTSET)

    # Signals of a terminal or a cluster reach all processes: the trainer decides, and it
    # needs its batches until it has saved.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def leave_with(parent: int) -> None:
        """A killed trainer cannot end its processes."""
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=leave_with, args=(os.getppid(),), daemon=True).start()
