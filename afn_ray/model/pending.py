"""Values that a model reads from a batch, perhaps still in transfer from its device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from afn_ray.model.type_sums import Chosen, TypeSums

Norms = npt.NDArray[np.float32]
"""Norms of tokens, float32."""

Numbers = npt.NDArray[np.int32]
"""Numbers of neurons, int32."""
ToTokens = Callable[[npt.NDArray[Any]], npt.NDArray[Any]]
"""Function from an array of a batch's form, [n, rows of the batch ...], to [n, n_tokens]."""


class Read(NamedTuple):
    """Values that a model read from the tokens of one batch."""

    values: Norms  # float32 [n_measured, n_tokens], in the order of ``signals.measured``
    numbers: Numbers  # int32 [n_numbered, n_tokens], in the order of ``signals.numbered``
    sums: TypeSums | None = None  # of hidden states; None: none were asked for


class Pending:
    """The values of one batch, perhaps still in transfer from the device.

    ``values`` is float32 [n_measured, ...] and ``numbers`` int32 [n_numbered, ...], None for none.
    """

    def __init__(
        self,
        values: torch.Tensor,
        numbers: torch.Tensor | None,
        layout: ToTokens,
        sums: tuple[Chosen, torch.Tensor] | None = None,
    ) -> None:
        """``sums``: chosen tokens and the totals of their states, [n_layers, n_types, hidden]."""
        self._layout = layout
        self._sums: tuple[Chosen, torch.Tensor] | None = None
        if sums is not None:
            self._sums = sums[0], _begin_copy(sums[1])
        self._event: torch.cuda.Event | None = None
        self._values = _begin_copy(values)
        self._numbers = None if numbers is None else _begin_copy(numbers)
        if values.device.type == "cuda":
            self._event = torch.cuda.Event(blocking=True)  # waiting takes no core
            self._event.record()

    def result(self) -> Read:
        """Wait for the device; return what it read."""
        if self._event is not None:
            self._event.synchronize()
        values = self._layout(self._values.numpy())
        numbers = np.empty((0, values.shape[1]), np.int32)
        if self._numbers is not None:
            numbers = self._layout(self._numbers.numpy())
        if self._sums is None:
            return Read(values, numbers)
        (num_types, _, slots, _, n), totals = self._sums
        sums = TypeSums(num_types, slots, n, totals.numpy())
        return Read(values, numbers, sums)


def _begin_copy(values: torch.Tensor) -> torch.Tensor:
    """``values`` in memory of the host. From a GPU, they arrive there after its computation."""
    if values.device.type != "cuda":
        return values
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values, non_blocking=True)
