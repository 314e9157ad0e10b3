"""Attention over packed sequences: one function for every family that uses transformers' interface.

A packed batch holds its sequences one after another, without padding. A token attends to tokens of
its own sequence only.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as functional
import transformers

from afn_ray.model.files import is_device_fault
from afn_ray.model.memory import is_out_of_memory

NAME = "afn_packed"
"""Name of the attention function in transformers' registry.

The name has no mask function, so transformers never builds a mask.
"""

IGNORED = {
    "dropout",
    "is_causal",
    "scaling",
    "sliding_window",
    "position_ids",
    "deterministic",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "cache_position",
    "layer_idx",
}
"""Options of transformers' attention interface that ``attend`` accepts.

They have no effect here, or are read from named arguments. ``attend`` refuses any other option that
is set.
"""

SCORES = 1 << 19
"""Number of attention scores computed at a time on a CPU, over all heads: 1 MiB in bfloat16."""

SCORES_ON_GPU = 1 << 26
"""Number of attention scores computed at a time on a GPU, over all heads: 256 MiB in float32.

A batch of 32,768 tokens then takes a few launches a layer instead of about 128.
"""

FLASH, SDPA, FLOAT32, PADDED = "flash", "sdpa", "float32", "padded"
"""Names of the ways in which a model attends, as commits record them.

- ``FLASH``: flash attention in half precision, one launch for all sequences of a batch; GPUs only.
- ``SDPA``: torch's attention in half precision, one call for each group of equally long sequences.
- ``FLOAT32``: the same in float32.
- ``PADDED``: the family's own attention, on padded batches.
"""

FLASH_SIZES, LARGEST_FLASH_SIZE = 8, 256
"""Flash attention takes head sizes that are multiples of the first, up to the second."""


class UnsupportedAttention(Exception):
    """The model needs an attention feature that packed attention does not implement."""


class FlashRefused(UnsupportedAttention):
    """Flash attention does not run here: the GPU, torch or the model's head size forbids it."""


class Seen(NamedTuple):
    """Inputs and output of one attention call, as in ``attend``.

    ``left`` and ``right`` are the tokens visible on either side; -1 means all.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    left: int
    right: int
    output: torch.Tensor


@dataclass(slots=True)
class Layout:
    """Row ranges of the sequences in one packed batch.

    The sequences follow one another from row 0. Rows after the last sequence are filler.
    """

    lengths: Sequence[int]
    num_rows: int
    device: torch.device
    flash: bool = True  # whether to use flash attention where the device has it
    calls: int = 0  # calls of ``attend`` so far
    kernels: set[str] = field(default_factory=set)  # names of the kernels that these calls used
    windowed: bool = False  # a call had a sliding window
    watched: bool = False  # keep the next call in ``seen``
    seen: Seen | None = None
    # Neighbouring sequences of equal length: first row, number of sequences, length.
    groups: list[tuple[int, int, int]] = field(init=False)
    # On CUDA only: int32 [n_sequences + 2], first row of each sequence and of the filler, then
    # the end.
    bounds: torch.Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.groups, row = [], 0
        for length, same in groupby(self.lengths):
            n = sum(1 for _ in same)
            self.groups.append((row, n, length))
            row += n * length
        if self.device.type == "cuda":
            ends = [0]
            for length in [*self.lengths, self.num_rows - row]:
                ends.append(ends[-1] + length)
            self.bounds = (
                torch.tensor(ends, dtype=torch.int32)
                .pin_memory()
                .to(self.device, non_blocking=True)
            )

    @property
    def longest(self) -> int:
        """Length of the longest sequence; the filler counts as one."""
        return max(max(self.lengths), self.num_rows - sum(self.lengths))


_layout: ContextVar[Layout] = ContextVar("layout")


@contextmanager
def packed(layout: Layout) -> Iterator[None]:
    """Make forward passes in this context attend within the sequences of ``layout``."""
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


def current() -> Layout | None:
    """The layout of the pass that runs in this context; None outside of ``packed``."""
    return _layout.get(None)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each sequence of the layout set by ``packed``.

    ``query`` is [1, heads, rows, size]; ``key`` and ``value`` are [1, kv_heads, rows, size]. The
    output is [1, rows, heads, size]. A token sees its own sequence; in a decoder, only itself and
    the tokens to its left. Raises ``UnsupportedAttention`` for features of single families: a mask
    of their own, soft capping, learned sinks, position biases.
    """
    if attention_mask is not None:
        raise UnsupportedAttention("its attention wants a mask of its own")
    if unknown := sorted(
        k for k, v in options.items() if v is not None and v is not False and k not in IGNORED
    ):
        raise UnsupportedAttention(f"its attention wants {', '.join(unknown)}")
    layout = _layout.get()
    layout.calls += 1
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    left = right = -1  # tokens visible on either side; -1 means all
    if sliding_window is not None:  # the window counts the token itself, as in flash attention
        layout.windowed = True
        left = right = sliding_window - 1
    if causal:
        right = 0
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    dtype = min((query.dtype, key.dtype, value.dtype), key=lambda d: d.itemsize)
    query, key, value = (x.to(dtype) for x in (query, key, value))
    if layout.bounds is not None and layout.flash and dtype != torch.float32:
        layout.kernels.add(FLASH)
        output = _attend_by_flash(query, key, value, layout, scale, left, right)[None]
    else:
        layout.kernels.add(FLOAT32 if dtype == torch.float32 else SDPA)
        output = attend_by_group(query, key, value, layout, scale, left, right)
    if layout.watched:
        layout.seen = Seen(query, key, value, scale, left, right, output)
    return output, None


def received(seen: Seen, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention that each token receives from other tokens, and from itself.

    Both results are float32 [heads, rows]. The first is the mean over the other tokens of the same
    sequence that may attend to this one; it is 0 if there are none. A fused kernel keeps no
    weights, so this function recomputes the scores of one block, at most about ``SCORES`` or
    ``SCORES_ON_GPU`` at a time.
    """
    heads = seen.query.shape[1]
    rows = seen.query.shape[2]
    at_once = SCORES_ON_GPU if seen.query.device.type == "cuda" else SCORES
    of_others = torch.zeros(heads, rows, device=seen.query.device)
    own = torch.zeros_like(of_others)
    for row, n, length in layout.groups:
        mask = _band(length, seen.left, seen.right, seen.query.device)
        may = (mask.sum(0) - 1).clamp(min=1)  # other queries that see each key
        # ``step`` sequences at a time; a long sequence is cut into ``block`` queries at a time.
        step = max(1, at_once // (length * length * heads))
        block = length if step > 1 else max(1, min(length, at_once // (length * heads)))
        for at in range(0, n, step):
            here = slice(row + at * length, row + min(n, at + step) * length)
            q, k = (
                x[0, :, here].float().unflatten(1, (-1, length)) for x in (seen.query, seen.key)
            )
            k = k.repeat_interleave(heads // k.shape[0], 0).transpose(-1, -2)
            sums = torch.zeros(q.shape[:-1], device=q.device)
            selves = torch.zeros_like(sums)
            for first in range(0, length, block):
                some = slice(first, first + block)
                scores = (q[:, :, some] @ k).mul_(seen.scale)
                scores.masked_fill_(~mask[some], -torch.inf)
                shares = scores.softmax(-1)
                itself = shares.diagonal(first, dim1=-2, dim2=-1)
                selves[:, :, some] = itself
                itself.zero_()
                sums += shares.sum(-2)
            own[:, here] = selves.flatten(1)
            of_others[:, here] = (sums / may).flatten(1)
    return of_others, own


def value_norms(seen: Seen, gram: torch.Tensor) -> torch.Tensor:
    """L2 norm of each token's value after the output projection of each head.

    The result is float32 [heads, rows]. ``gram`` [heads, size, size] is P P^T, where P [size,
    hidden_size] is the head's part of the output projection.
    """
    value = seen.value[0].float()
    value = value.repeat_interleave(len(gram) // value.shape[0], 0)
    return ((value @ gram) * value).sum(-1).clamp(min=0).sqrt()


def attend_by_group(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: Layout,
    scale: float,
    left: int,
    right: int,
) -> torch.Tensor:
    """Attend with one call for each group of equally long sequences; the reference everywhere.

    Shapes are as in ``attend``. On a GPU, torch has kernels that hold no scores in memory for
    inputs as from ``_fitted``; others fall back to one that does.
    """
    heads, value_size = query.shape[1], value.shape[-1]
    if query.device.type == "cuda":
        query, key, value = _fitted(query, key, value)
        key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    parts: list[torch.Tensor] = []
    for row, n, length in layout.groups:
        sees_all_left = left < 0 or left >= length - 1
        sees_all_right = right < 0 or right >= length - 1
        causal = right == 0 and sees_all_left
        whole = not causal and sees_all_left and sees_all_right
        q, k, v = (
            x[0, :, row : row + n * length].unflatten(1, (n, length)) for x in (query, key, value)
        )
        if (
            whole
            and query.dtype == torch.bfloat16
            and query.device.type == "cpu"
            and heads == key.shape[1]
        ):
            parts += _attend_by_products(q, k, v, scale)
            continue
        mask = None if whole or causal else _band(length, left, right, query.device)
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        out = functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=causal and length > 1,
            scale=scale,
            enable_gqa=heads != key.shape[1],
        )
        out = out[..., :value_size]
        parts.append(out.transpose(1, 2).reshape(n * length, heads, value_size))
    if filler := layout.num_rows - sum(layout.lengths):
        parts.append(parts[0].new_zeros(filler, *parts[0].shape[1:]))
    return (torch.cat(parts) if len(parts) > 1 else parts[0])[None]


def _attend_by_products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> Iterator[torch.Tensor]:
    """Full attention by batched matrix products, for bfloat16 on the CPU.

    Inputs are [heads, n, length, size]. Yields the output of a few sequences at a time, in order,
    as [sequences * length, heads, size]. torch's own attention does not use the CPU's bfloat16
    units: batched products are 1.6 times faster on 40 tokens and 2.2 times on 512 (AMD EPYC). At
    most about ``SCORES`` scores are in memory.
    """
    heads, n, length, _ = query.shape
    step = max(1, SCORES // (length * length * heads))
    nothing = query.new_empty(())
    for at in range(0, n, step):
        q, k, v = (x[:, at : at + step].flatten(0, 1) for x in (query, key, value))
        # Scale inside the product: q * scale would add one more rounding.
        scores = torch.baddbmm(nothing, q, k.transpose(1, 2), beta=0, alpha=scale)
        shares = scores.softmax(-1)
        attended = torch.bmm(shares, v)
        yield attended.view(heads, -1, value.shape[-1]).transpose(0, 1)


def _band(length: int, left: int, right: int, device: torch.device) -> torch.Tensor:
    """Mask bool [length, length]: the keys (columns) that each query (row) sees.

    A query sees ``left`` keys to its left and ``right`` keys to its right; -1 means all.
    """
    at = torch.arange(length, device=device)
    distance = at[None, :] - at[:, None]
    return (distance >= (-left if left >= 0 else -length)) & (
        distance <= (right if right >= 0 else length)
    )


def _fitted(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inputs with zeros behind each head, up to one size that GPU kernels take.

    The zeros do not change the scores. They add columns to the output, which the caller cuts off.
    """
    largest = max(query.shape[-1], value.shape[-1])
    size = -(-largest // FLASH_SIZES) * FLASH_SIZES

    def fit(x: torch.Tensor) -> torch.Tensor:
        missing = size - x.shape[-1]
        return functional.pad(x, (0, missing)) if missing else x

    return fit(query), fit(key), fit(value)


def _attend_by_flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: Layout,
    scale: float,
    left: int,
    right: int,
) -> torch.Tensor:
    """Flash attention over all sequences at once; [rows, heads, size].

    Raises ``FlashRefused`` where torch, the GPU or the head size forbids it. With ``num_splits=1``
    the result of a sequence does not depend on the others. torch before 2.12 has no such option and
    splits as it sees fit, by the longest sequence of the batch: the last bits of a sequence may
    then depend on its batch. A batch is decided by its shard, so a shard still has one result.
    """
    from torch.nn.attention import varlen

    assert layout.bounds is not None
    options = _options_of(varlen.varlen_attn)
    if lacking := sorted({"scale", "window_size"} - options):
        raise FlashRefused(f"torch {torch.__version__} has no {' and '.join(lacking)} for it")
    heads, value_size = query.shape[1], value.shape[-1]
    query, key, value = _fitted(query, key, value)
    if query.shape[-1] > LARGEST_FLASH_SIZE:
        raise FlashRefused(
            f"its heads have {query.shape[-1]} dimensions, expected at most {LARGEST_FLASH_SIZE}"
        )
    chosen: dict[str, Any] = {"scale": scale, "window_size": (left, right)}
    if "num_splits" in options:
        chosen["num_splits"] = 1
    if "enable_gqa" in options:
        chosen["enable_gqa"] = heads != key.shape[1]
    else:
        key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    bounds, longest = layout.bounds, layout.longest
    try:
        result = varlen.varlen_attn(q, k, v, bounds, bounds, longest, longest, **chosen)
    except (RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error) or is_device_fault(error):
            raise
        first_line, _, _ = str(error).strip().partition("\n")
        raise FlashRefused(first_line) from error
    assert isinstance(result, torch.Tensor)
    return result[..., :value_size]


@cache
def _options_of(function: Callable[..., Any]) -> frozenset[str]:
    """Names of the parameters of ``function``; torch's ``varlen_attn`` gains some by version."""
    return frozenset(inspect.signature(function).parameters)


transformers.AttentionInterface.register(NAME, attend)
