"""Find the documents for which a call fails, by halving until each is alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from afn_ray.errors import AfnError
from afn_ray.text import printable

REASON_CHARS = 200
"""Longest message of a third-party error in a document's status, in characters."""


def is_of_input(error: BaseException) -> bool:
    """True if the input may have caused ``error``.

    Memory, a disk, a signal and an ``AfnError`` are other causes. A panic of a Rust library is a
    ``BaseException`` that no handler for ordinary errors catches; here it counts as an ordinary
    error.
    """
    if type(error).__name__ == "PanicException":
        return True
    return isinstance(error, Exception) and not isinstance(error, AfnError | MemoryError | OSError)


def find_culprits(
    attempt: Callable[[list[int]], object],
    suspects: Sequence[int],
    may_blame: Callable[[BaseException], bool],
) -> dict[int, BaseException]:
    """Those of ``suspects`` for which ``attempt`` raises when they are alone, with their errors.

    The result depends on ``suspects`` alone. n suspects with k culprits take about 2 k log2(n)
    calls, and each level of halving passes every suspect at most once. Errors for which
    ``may_blame`` is false are raised.
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
    """Type of ``error`` and beginning of its message, as a document's status has them."""
    lines = str(error).strip().splitlines()
    text = " ".join(lines[0].split()) if lines else ""
    name = type(error).__name__
    return printable(f"{name}: {text[:REASON_CHARS]}" if text else name)
