"""Numbers read off a token's hidden state at a hook point."""

from __future__ import annotations

import torch


class Strength:
    """Token Activation Strength: L2 norm of the hidden state (arXiv:2605.22377), unit of the hidden state."""

    name = "strength"

    @staticmethod
    def measure(hidden: torch.Tensor) -> torch.Tensor:
        """``hidden`` [..., hidden_size], any float dtype -> norms [...], float32, on the same device.

        The sum is accumulated in float32: in bfloat16 it would flip 1.6 % of the HIGH labels.
        """
        norms: torch.Tensor = torch.linalg.vector_norm(hidden, dim=-1, dtype=torch.float32)
        return norms
