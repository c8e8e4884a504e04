"""Every error that dgrad raises for its user, and its warnings.

A message is one line that says what was given, what was expected, and what to do about it.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable

LONGEST_VALUE = 60
"""How many characters of a value a message shows."""


class DgradError(Exception):
    """The base of all errors of dgrad. `exit_code` is what the command line ends with."""

    exit_code = 1


class InputError(DgradError, ValueError):
    """The user asked for what cannot be: an unknown name, a value out of range, a file of another kind."""

    exit_code = 2


class RunError(DgradError, RuntimeError):
    """Something failed on the way: a loss that is not finite, a full disk, a network that does not answer."""


class DgradWarning(UserWarning):
    """The base of all warnings of dgrad: something goes on in a lesser way. The command line shows one line."""


class PluginWarning(DgradWarning):
    """A plugin is left out, and everything else goes on."""


class CostWarning(DgradWarning):
    """A call goes on that costs far more than it has to."""


class CompilerWarning(DgradWarning):
    """A fast kernel could not be compiled; torch does its work, more slowly."""


def unknown_name(kind: str, got: str, known: Iterable[str], remedy: str = "") -> InputError:
    """The error for a name that is not registered: it lists the known ones and the closest match.

    >>> print(unknown_name("estimator", "dirct", ["direct", "exact"]))
    unknown estimator 'dirct'; did you mean 'direct'? Known: direct, exact
    """
    names = sorted(known)
    close = difflib.get_close_matches(got, names, n=1)
    question = f"; did you mean {close[0]!r}?" if close else ";"
    message = f"unknown {kind} {got!r}{question} {'Known' if close else 'known'}: {', '.join(names) or 'none'}"
    return InputError(f"{message}. {remedy}" if remedy else message)


def shown(value: object) -> str:
    """A value of any kind for a message: its `repr` in one line, cut where it is long.

    >>> shown("two"), shown(["a\\nlist"] * 99)
    ("'two'", "['a\\\\nlist', 'a\\\\nlist', 'a\\\\nlist', 'a\\\\nlist', ...")
    """
    text = " ".join(repr(value).split())
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def approx_int(number: int) -> str:
    """A whole number of any size, to three digits, for messages.

    >>> approx_int(64), approx_int(10**20), approx_int(2**5000)
    ('64', '1e+20', '1e+1505')
    """
    return f"{number:.3g}" if number < 10**300 else f"1e+{int(math.log10(number))}"
