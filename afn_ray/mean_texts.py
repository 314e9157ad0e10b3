"""Mean hidden states as text, for the measure that they are part of."""

from __future__ import annotations

import base64

import numpy as np
import numpy.typing as npt

from afn_ray.errors import ModelError

Floats = npt.NDArray[np.floating]


def to_text(state: Floats) -> str:
    """``state`` [hidden_size] as base64 of little-endian float32 numbers."""
    numbers = state.astype("<f4")
    return base64.b64encode(numbers.tobytes()).decode()


def from_text(text: str, hidden_size: int | None = None) -> npt.NDArray[np.float32]:
    """The inverse of ``to_text``.

    Raises ``ModelError`` unless it is a state of ``hidden_size`` dimensions; None: of any number.
    """
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ModelError(f"a mean state of the measure is no base64: {error}") from error
    if len(data) % 4 or (hidden_size is not None and len(data) != 4 * hidden_size):
        raise ModelError(
            f"a mean state of the measure has {len(data)} bytes, expected 4 for each of the "
            f"{hidden_size or ''} dimensions"
        )
    return np.frombuffer(data, "<f4").astype(np.float32)
