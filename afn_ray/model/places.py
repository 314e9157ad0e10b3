"""The places in blocks from which signals read: found while a block runs, before products are
built.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.pytorch_utils import Conv1D

from afn_ray.errors import ModelError
from afn_ray.model import attention
from afn_ray.model.engine import Model, Place
from afn_ray.schema import MOST_NEURONS


class _Call(NamedTuple):
    """One call of a linear layer in the running block."""

    name: str  # of the layer in its block
    module: torch.nn.Module
    input: torch.Tensor
    width: int  # size of the output's last dimension
    attended: attention.Seen | None  # the block's attention call before this one


def find_places(model: Model, ids: Sequence[int], needs: frozenset[str]) -> list[Place]:
    """Find the places in each block that ``needs`` names, in one forward pass over one text.

    Raises ``ModelError`` if a block has no such place.
    """
    if "attention" in needs and not model.packed:
        raise ModelError(
            f"{model.name} gives no attention weights to read: its batches are padded, since "
            f"{model.why_padded}; leave the signal attention out"
        )
    watch = _Watch(model, needs)
    last = max(*model.layers, 1)
    try:
        model.measure(np.asarray(ids, np.int64), [len(ids)], layers=range(last + 1))
    finally:
        watch.close()
    return [watch.places[block] for block in model.blocks]


class _Watch:
    """Records what runs in each block, and finds its places while it still has its weights."""

    def __init__(self, model: Model, needs: frozenset[str]) -> None:
        self.places: dict[torch.nn.Module, Place] = {}
        self._model, self._needs = model, needs
        self._calls: list[_Call] = []  # in the running block
        # Name and output of the last LayerNorm.
        self._last: tuple[str, torch.Tensor | None] = "", None
        self._handles = []
        for block in model.blocks:
            self._handles.append(block.register_forward_pre_hook(self._begin))
            for name, module in block.named_modules():
                hook: Any = None
                if isinstance(module, torch.nn.Linear | Conv1D):
                    hook = partial(self._linear, name)
                elif isinstance(module, torch.nn.LayerNorm):
                    hook = partial(self._layer_norm, name)
                if hook is not None:
                    self._handles.append(module.register_forward_hook(hook))
            # Before the model's own hook, which stops the pass after the last block.
            self._handles.append(block.register_forward_hook(self._end, prepend=True))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _begin(self, block: torch.nn.Module, args: tuple[Any, ...]) -> None:
        self._calls.clear()
        if (layout := attention.current()) is not None:
            layout.watched = True  # after the model's own hook, which keeps no call here

    def _linear(
        self, name: str, module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor
    ) -> None:
        layout = attention.current()
        seen = None if layout is None else layout.seen
        self._calls.append(_Call(name, module, args[0], output.shape[-1], seen))

    def _layer_norm(
        self, name: str, module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor
    ) -> None:
        self._last = name, output

    def _end(self, block: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        made = output[0] if isinstance(output, tuple) else output
        norm = self._last[0] if self._last[1] is made else ""
        self.places[block] = _find_place(self._model, self._calls, norm, self._needs)


def _find_place(model: Model, calls: Sequence[_Call], norm: str, needs: frozenset[str]) -> Place:
    """The places that ``needs`` names in a block that made these ``calls``.

    ``norm`` is the LayerNorm that made the block's output; empty if none did. Raises
    ``ModelError`` if the block lacks a place.
    """
    width = model.files.hidden_size
    found = {
        "attention": [c for c in calls if _follows(c)],
        "neurons": [c for c in calls if c.width == width and not _follows(c)],
    }
    if lacking := sorted(n for n in needs & found.keys() if not found[n]):
        raise ModelError(
            f"{model.name}: no linear layer of its blocks was found to be the one behind its "
            f"{lacking[0]}; leave signals out that need {lacking[0]}"
        )
    behind, num_neurons = "", 0
    if "neurons" in needs:
        product = found["neurons"][-1]
        behind = product.name
        num_neurons = product.input.shape[-1]
        if experts := num_experts(model.module.config):
            raise ModelError(
                f"{model.name} is a mixture of {experts} experts: its neurons are other ones for "
                "each token; leave the signal neurons out"
            )
        if num_neurons > MOST_NEURONS:
            raise ModelError(
                f"{model.name} has {num_neurons:,} neurons in a block, and they are recorded as "
                f"numbers below {MOST_NEURONS:,}; leave the signal neurons out"
            )
    if "norm" in needs and not norm:
        raise ModelError(
            f"{model.name}: its blocks do not end with a LayerNorm, so there is no gain to leave "
            "out; leave the signal centred out"
        )
    gram = _gram(found["attention"][0]) if "attention" in needs else None
    return Place(norm if "norm" in needs else "", gram, behind, num_neurons)


def _follows(call: _Call) -> bool:
    """True if the input of ``call`` is the output of attention, unchanged."""
    return call.attended is not None and torch.equal(
        call.input.flatten(), call.attended.output.flatten()
    )


def _gram(call: _Call) -> torch.Tensor:
    """P P^T for each head's part P of the output projection in ``call``: [heads, size, size]."""
    assert call.attended is not None
    weight: torch.Tensor = call.module.weight  # type: ignore[assignment]
    weight = weight if isinstance(call.module, Conv1D) else weight.t()
    num_heads = call.attended.query.shape[1]
    parts = weight.detach().float().unflatten(0, (num_heads, -1))
    gram: torch.Tensor = parts @ parts.transpose(1, 2)
    return gram


def num_experts(config: Any) -> int:
    """Number of experts in a mixture-of-experts model; 0 for any other model.

    In a mixture each token has neurons of its own experts.
    """
    counts = [
        getattr(config.get_text_config(), n, None)
        for n in ("num_experts", "num_local_experts", "moe_num_experts")
    ]
    return next((n for n in counts if isinstance(n, int) and n > 1), 0)
