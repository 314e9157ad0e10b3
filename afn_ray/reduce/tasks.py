"""Tasks: pure functions run in this process or in others, and sums of many in a tree of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

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
) -> list[Any]:
    """Handles of the parts of the sum of ``leaves``.

    Each leaf is a list of handles, one for each part. ``merge(subject, *values)`` adds the values
    of one part, ``FAN_IN`` of them at a time.
    """

    def add(_: int, sums: list[list[Any]]) -> list[Any]:
        if len(sums) == 1:
            return sums[0]
        parts: list[Any] = []
        for handles in zip(*sums, strict=True):
            parts += tasks.submit(merge, subject, *handles)
        return parts

    return _merged_levels(leaves, FAN_IN, add)


class Cuts(NamedTuple):
    """Numbers of parts, by a hash, of sums in a tree of merges; both are powers of two.

    The higher a sum is in the tree, the more leaves it covers and the more parts it has, so that a
    part covers about as much of the input at any height, however large the whole is.
    """

    fan_in: int  # sums that are merged at a time
    first: int  # parts of a leaf
    last: int  # parts of the whole, at most

    @classmethod
    def of(cls, num_parts: int, num_leaves: int, fan_in: int) -> Cuts:
        """Cuts by which ``num_leaves`` leaves become ``num_parts`` parts,
        or up to twice as many.
        """
        of_leaf = -(-num_parts // max(1, num_leaves))
        return cls(fan_in, _power_of_two(of_leaf), _power_of_two(num_parts))

    def at(self, height: int) -> int:
        """Number of parts of a sum of ``fan_in`` to the power of ``height`` leaves."""
        covered: int = self.fan_in**height  # leaves
        return min(self.last, self.first * covered)


def _power_of_two(n: int) -> int:
    """The least power of two that is ``n`` or more."""
    return 1 << (n - 1).bit_length()


def merge_and_cut(
    tasks: Tasks,
    leaves: Iterable[list[Any]],
    merge: Callable[..., Sequence[Any]],
    cuts: Cuts,
) -> list[Any]:
    """Handles of the parts of the sum of ``leaves``; each is a list of handles of ``cuts.first``
    parts.

    ``merge((before, after), *values)`` adds the values of one part, of ``before``, and returns the
    parts of ``after`` that it is cut into: of part p of ``before``, parts p, p + before, ... Sums
    are made as soon as their leaves are there: with a small fan-in few leaves wait.
    """

    def add(height: int, sums: list[list[Any]]) -> list[Any]:
        before = cuts.at(height)
        after = cuts.at(height + 1)
        if before == after and len(sums) == 1:
            return sums[0]
        found = []
        for handles in zip(*sums, strict=True):
            args = ((before, after), *handles)
            found.append(tasks.submit(merge, *args, num_results=after // before))
        return [handle for of_cut in zip(*found, strict=True) for handle in of_cut]

    return _merged_levels(leaves, cuts.fan_in, add)


def _merged_levels(
    leaves: Iterable[list[Any]],
    fan_in: int,
    add: Callable[[int, list[list[Any]]], list[Any]],
) -> list[Any]:
    """The sum of ``leaves`` in a tree: ``add(height, sums)`` adds up to ``fan_in`` sums.

    Sums at height h are those of up to ``fan_in^h`` leaves.
    """
    levels: list[list[list[Any]]] = [[]]

    def merge_level(height: int) -> None:
        """Replace the sums at ``height`` by one sum at the next height."""
        if height + 1 == len(levels):
            levels.append([])
        sums = levels[height]
        levels[height] = []
        if sums:
            levels[height + 1].append(add(height, sums))

    for leaf in leaves:
        levels[0].append(leaf)
        height = 0
        while len(levels[height]) == fan_in:
            merge_level(height)
            height += 1
    for height in range(len(levels)):
        merge_level(height)
    (parts,) = levels[-1]
    return parts
