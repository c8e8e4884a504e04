"""`python -m dgrad_cli.worker ...`: `dgrad ...` for a process that another one started and holds the other end of its standard input.

Nothing is written into that. When it ends, the other process is gone, however it went, and this one ends too, as at SIGTERM: with its
state saved. Imports nothing heavy before it listens.
"""

import os
import signal
import threading

from dgrad_cli.main import main


def _end_with_the_starter() -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_end_with_the_starter, daemon=True).start()
    main()
