"""Sums of hidden states by token type, in whole units, so that no order changes a bit of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from afn_ray.schema import STATE_UNITS

Ints = npt.NDArray[np.int64]

STEP_NUMBERS = 1 << 22
"""Numbers of hidden states that are added at a time; bounds the memory of their whole units."""


class Chosen(NamedTuple):
    """Tokens of a batch whose states are added, by type."""

    num_types: int  # recorded types
    rows: Ints  # [n_chosen], indexes into the ids of the batch
    slots: Ints  # [n_types], which of the recorded types occur, ascending
    slot_of: Ints  # [n_chosen], index into ``slots`` of each token's type
    n: Ints  # [n_types], tokens of each


class TypeSums(NamedTuple):
    """Sums of the hidden states of a batch's tokens, by type."""

    num_types: int  # recorded types
    slots: Ints  # [n_types], ascending indexes into the recorded types
    n: Ints  # [n_types], tokens of each
    totals: Ints  # [n_layers, n_types, hidden_size], in units of 1 / ``STATE_UNITS``


class Chooser:
    """Chooses the tokens of the recorded types in each batch."""

    def __init__(self, types: Sequence[int], num_ids: int) -> None:
        """``types`` are ids below ``num_ids``, ascending."""
        self._num_types = len(types)
        self._slot_of_id = np.full(num_ids, -1, np.int64)
        self._slot_of_id[list(types)] = np.arange(len(types))

    def choose(self, ids: npt.NDArray[Any], kept: Ints) -> Chosen:
        """Those of the tokens ``kept``, indexes into ``ids``, that are of a recorded type."""
        slots = self._slot_of_id[ids[kept]]
        is_chosen = slots >= 0
        found, slot_of, n = np.unique(slots[is_chosen], return_inverse=True, return_counts=True)
        rows = kept[is_chosen]
        slot_of = slot_of.astype(np.int64)
        return Chosen(self._num_types, rows, found, slot_of, n.astype(np.int64))


class DeviceRows(NamedTuple):
    """``Chosen`` tokens on the model's device."""

    rows: torch.Tensor  # int64 [n_chosen], rows of the flattened batch
    slot_of: torch.Tensor  # int64 [n_chosen]
    num_types: int

    def add(self, hidden: torch.Tensor) -> torch.Tensor:
        """Sum of the states by type, int64 [n_types, hidden_size], of ``hidden`` [...,
        hidden_size].

        A state is rounded to whole units first: integers add up to the same in any order.
        """
        states = hidden.reshape(-1, hidden.shape[-1])
        totals = states.new_zeros((self.num_types, states.shape[1]), dtype=torch.int64)
        step = max(1, STEP_NUMBERS // states.shape[1])
        for begin in range(0, len(self.rows), step):
            picked = states[self.rows[begin : begin + step]].float()
            units = (picked * STATE_UNITS).round_().to(torch.int64)  # a power of two: exact
            totals.index_add_(0, self.slot_of[begin : begin + step], units)
        return totals
