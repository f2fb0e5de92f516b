"""What every spawned process of this room does first."""

from __future__ import annotations

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """Ends this process when its parent has ended, also when that was killed.

    Otherwise the worker of a killed run would wait for ever on a queue that nobody reads.
    """
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
