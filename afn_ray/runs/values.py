"""The measured values of some tokens, on their way from the model to the record."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from afn_ray.reduce.mean_vectors import StateSums

Float32s = npt.NDArray[np.float32]
"""Values of tokens, float32."""
Numbers = npt.NDArray[np.int32]
"""Numbers of neurons, int32."""


@dataclass(frozen=True, slots=True)
class Values:
    """The measured values of some tokens, rounded.

    The rows of ``neurons`` and ``neuron_values`` are ``top_neurons`` for each neuron layer.
    """

    series: Float32s  # [n_series, n_tokens]
    neurons: Numbers  # [n_neuron_layers * top_neurons, n_tokens]
    neuron_values: Float32s  # same shape
    sums: StateSums  # of hidden states by type; empty: none are recorded
