"""Which of many documents a call fails for: halved until each is alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from afn_ray.errors import AfnError
from afn_ray.text import printable

REASON_CHARS = 200
"""Longest message of a third-party error in a document's status, in characters."""


def is_of_input(error: BaseException) -> bool:
    """Whether ``error`` may be the fault of what was given: not of memory, a disk, a signal, and
    none of ours.

    A panic of a Rust library is a ``BaseException``, so that nobody takes it for an ordinary error;
    here it is one.
    """
    if type(error).__name__ == "PanicException":
        return True
    return isinstance(error, Exception) and not isinstance(error, AfnError | MemoryError | OSError)


def find_culprits(
    attempt: Callable[[list[int]], object],
    suspects: Sequence[int],
    may_blame: Callable[[BaseException], bool],
) -> dict[int, BaseException]:
    """Those of ``suspects`` for which ``attempt`` raises when they are alone, with what it raises.

    The result depends on ``suspects`` alone. n suspects with k culprits take about 2 k log2(n)
    calls, and each halving looks at every suspect once at most. Errors that ``may_blame`` denies
    are raised.
    """
    culprits: dict[int, BaseException] = {}
    groups = [list(suspects)]
    while groups:
        group = groups.pop()
        try:
            attempt(group)
        except BaseException as error:
            if not may_blame(error):
                raise
            if len(group) == 1:
                culprits[group[0]] = error
            else:
                middle = len(group) // 2
                groups += [group[middle:], group[:middle]]
    return culprits


def first_line(error: BaseException) -> str:
    """The type and the beginning of the message of ``error``, as a document's status has them."""
    text = " ".join((str(error).strip().splitlines() or [""])[0].split())
    name = type(error).__name__
    return printable(f"{name}: {text[:REASON_CHARS]}" if text else name)
