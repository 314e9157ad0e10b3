"""Tasks: pure functions run in this process or in others, and sums of many in a tree of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

Item = TypeVar("Item")

FAN_IN = 64
"""Largest number of sums that one call merges, and of shards that one call reads."""


class Tasks(Protocol):
    """Runs pure functions in this process or in others, perhaps again if a process died."""

    def submit(
        self, function: Callable[..., Sequence[Any]], *args: Any, num_results: int = 1
    ) -> list[Any]:
        """Start ``function(*args)``; return one handle for each of its ``num_results`` values.

        The function receives the values of handles among ``args``.
        """

    def result(self, handle: Any) -> Any:
        """Wait for the value of ``handle``.

        Raises the error of its function, or of a function that it depends on.
        """


class Inline:
    """Runs each function at once in this process; a handle is the value itself."""

    def submit(
        self, function: Callable[..., Sequence[Any]], *args: Any, num_results: int = 1
    ) -> list[Any]:
        values = list(function(*args))
        assert len(values) == num_results
        return values

    def result(self, handle: Any) -> Any:
        return handle


def call(function: Callable[..., Sequence[Any]], num_results: int, *args: Any) -> Any:
    """Run ``function`` for a ``Tasks`` in other processes; return a single result unwrapped."""
    values = function(*args)
    return values if num_results > 1 else values[0]


def batches(items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    """``items`` in order, ``FAN_IN`` at a time."""
    for begin in range(0, len(items), FAN_IN):
        yield items[begin : begin + FAN_IN]


def in_groups(
    items: Iterable[Item], num_bytes: Callable[[Item], int], most_bytes: int
) -> Iterator[tuple[Item, ...]]:
    """``items`` in order, in groups of at most ``FAN_IN`` and about ``most_bytes``.

    Yields one empty group if there are no items.
    """
    group: list[Item] = []
    group_bytes = 0
    for item in items:
        item_bytes = num_bytes(item)
        is_full = len(group) == FAN_IN or group_bytes + item_bytes > most_bytes
        if group and is_full:
            yield tuple(group)
            group, group_bytes = [], 0
        group.append(item)
        group_bytes += item_bytes
    yield tuple(group)


def merged(
    tasks: Tasks, merge: Callable[..., Sequence[Any]], handles: Sequence[Any], *first: Any
) -> Any:
    """Handle of ``merge(*first, *values)`` over all ``handles``, at least one of them."""
    while len(handles) > 1:
        sums: list[Any] = []
        for some in batches(handles):
            sums += tasks.submit(merge, *first, *some)
        handles = sums
    return handles[0]


def merge_parts(
    tasks: Tasks,
    leaves: Iterable[list[Any]],
    merge: Callable[..., Sequence[Any]],
    subject: Any,
    fan_in: int | None = None,
) -> list[Any]:
    """Handles of the parts of the sum of ``leaves``.

    Each leaf is a list of handles, one for each part. ``merge(subject, *values)`` adds the values
    of one part, ``fan_in`` of them at a time, by default ``FAN_IN``. Sums are made as soon as their
    leaves are there: with a small ``fan_in`` few leaves wait.
    """
    most = fan_in or FAN_IN
    # At height h: sums of most^h leaves, each as a list of handles of its parts.
    levels: list[list[list[Any]]] = [[]]

    def add(sums: list[list[Any]]) -> list[Any]:
        """Handles of the parts of the sum of ``sums``."""
        parts: list[Any] = []
        for handles in zip(*sums, strict=True):
            parts += tasks.submit(merge, subject, *handles)
        return parts

    def merge_level(height: int) -> None:
        """Replace the sums at ``height`` by one sum at the next height."""
        if height + 1 == len(levels):
            levels.append([])
        sums = levels[height]
        levels[height] = []
        levels[height + 1] += [add(sums)] if len(sums) > 1 else sums

    for leaf in leaves:
        levels[0].append(leaf)
        height = 0
        while len(levels[height]) == most:
            merge_level(height)
            height += 1
    for height in range(len(levels)):
        merge_level(height)
    (parts,) = levels[-1]
    return parts
