"""A large batch in parts, which the caller and helping threads take one after the other. May import nothing heavy.

A thread pool inside onnxruntime splits each operator and waits for all of its threads, so that one that is asleep holds up the
others: on a machine with nothing else to do it made 256 images slower. Here who is awake goes on, and who wakes up late finds less to do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import pairwise
from queue import SimpleQueue

PART = 64
"""Examples that a part has at least: with more, an example takes no less time. One alone would be rounded in another way."""


class Helpers:
    """Threads that take parts of batches; they end with the process.

    Args:
        count: how many; with 0 the caller does everything.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._batches: SimpleQueue[_Batch] = SimpleQueue()
        for _ in range(count):
            threading.Thread(target=self._help, name="helper", daemon=True).start()

    def run(self, work: Callable[[slice], None], examples: int) -> None:
        """Have `work` called for every part of a batch, in this thread and in others; return when all of it is done.

        Raises what `work` raises, the first of it; parts that were not begun by then are left out.
        """
        if not self.helps(examples):
            work(slice(0, examples))
            return
        batch = _Batch(work, examples)
        for _ in range(min(self.count, batch.parts - 1)):
            self._batches.put(batch)
        batch.take_parts()
        batch.wait()

    def helps(self, examples: int) -> bool:
        """Whether a batch of so many is split."""
        return self.count > 0 and examples >= 2 * PART

    def _help(self) -> None:
        while True:
            self._batches.get().take_parts()


class _Batch:
    """Parts that nobody has taken yet, and how many are done."""

    def __init__(self, work: Callable[[slice], None], examples: int) -> None:
        self._work = work
        self.parts = self._running = examples // PART
        ends = [index * examples // self.parts for index in range(self.parts + 1)]
        self._left = [slice(*pair) for pair in pairwise(ends)]
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def take_parts(self) -> None:
        """Take part after part until none is left."""
        while (part := self._next()) is not None:
            error = None
            try:
                self._work(part)
            except BaseException as raised:
                error = raised
            self._finish(error)

    def wait(self) -> None:
        """Until those that others have taken are done too."""
        with self._changed:
            self._changed.wait_for(lambda: self._running == 0)
        if self._error is not None:
            raise self._error

    def _next(self) -> slice | None:
        with self._changed:
            return self._left.pop() if self._left else None

    def _finish(self, error: BaseException | None) -> None:
        with self._changed:
            self._running -= 1
            if error is not None:
                self._error = self._error or error
                self._running -= len(self._left)
                self._left.clear()
            self._changed.notify()
