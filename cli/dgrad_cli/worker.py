"""`python -m dgrad_cli.worker ...`: `dgrad ...` in a process that ends with the process that started it.

The starter holds the other end of the standard input, and writes nothing. When that input ends, the starter is gone,
and this process ends as at SIGTERM, with its state saved. It imports nothing heavy before it listens.
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
