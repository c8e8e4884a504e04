"""The entry point: runs the application, and says in one line what went wrong.

It imports nothing that takes time by itself, so that Ctrl-C is heard from the first moment. Some libraries turn a
Ctrl-C during their import into an error of their own.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command and exit.

    The exit code is 0, 1 for a failure on the way, 2 for a wrong request, or 128 + the number of a signal.
    """
    received: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        received.append(number)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = _run(list(sys.argv[1:] if arguments is None else arguments), received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    sys.exit(code)


def _run(arguments: list[str], received: list[int]) -> int:
    debug = "--debug" in arguments or os.environ.get("DGRAD_DEBUG", "") not in ("", "0")
    message = ""
    try:
        with _warnings_in_one_line():
            from dgrad_cli.app import app

            rest = [argument for argument in arguments if argument != "--debug"]
            code = int(app(args=rest, standalone_mode=False) or 0)
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            import traceback

            traceback.print_exc()
        message, code = explain(error)
    if received:
        message, code = "interrupted", 128 + received[0]
    if message and (rank := _rank_after_the_first()):
        message = _unless_the_first_says_it(f"process {rank}: {message}", code)
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read has gone, which is nobody's fault
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123
    if message:
        print(f"error: {message}", file=sys.stderr)
    return code


SECONDS_FOR_THE_FIRST = 10.0
"""How long the first process may take to reach the error that another has met."""


def _rank_after_the_first() -> int:
    """The rank of a process that torchrun started, where it is not the first on its machine; else 0."""
    from dgrad.training.processes import ProcessGroup

    group = ProcessGroup.from_environment()
    return group.rank if group.local_rank else 0


def _unless_the_first_says_it(message: str, code: int) -> str:
    """The message, unless the machine's first process ends with the same error or with a signal, and says so itself.

    When the first ends with an error, torchrun ends the others by a signal. Without a signal, the error is this
    process's alone.
    """
    if code > 128:
        return ""
    try:
        time.sleep(SECONDS_FOR_THE_FIRST)
    except KeyboardInterrupt:
        return ""
    return message


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """A warning of dgrad costs its user one line, whatever Python is told to do with warnings."""
    import warnings

    from dgrad.errors import DgradWarning

    with warnings.catch_warnings():
        others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, DgradWarning):
                if not _rank_after_the_first():
                    print(f"warning: {one_line(str(message))}", file=sys.stderr)
            else:
                others(message, category, *place, **more)

        warnings.showwarning = show
        warnings.simplefilter("always", DgradWarning)
        yield


def explain(error: BaseException) -> tuple[str, int]:
    """One line for the user, and the exit code."""
    from dgrad.errors import DgradError

    text = one_line(str(error))
    if isinstance(error, DgradError):
        return text, error.exit_code
    if hasattr(error, "format_message"):  # typer's usage errors, whose classes are private to its vendored click
        return f"{one_line(error.format_message())} (see --help)", int(getattr(error, "exit_code", 2))
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, BrokenPipeError):
        return "", 1
    if isinstance(error, OSError):
        where = f" {error.filename}" if error.filename else ""
        return f"cannot use{where}: {error.strerror or error}; check the path, its permissions and the free space", 1
    if isinstance(error, MemoryError) or any(sign in text for sign in OUT_OF_MEMORY):
        return (
            f"not enough memory ({text[:120]}); take a smaller latent, --hidden, --batch-size or number of samples",
            1,
        )
    return f"unexpected {type(error).__name__}: {text}; run again with --debug to see where", 1


OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "Storage size calculation overflowed")
"""How torch says that something does not fit."""


def one_line(text: str) -> str:
    """The text with all white space made single spaces."""
    return " ".join(text.split())
