"""Linear layers of the blocks: weights prepared once, products in a chosen precision."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch
import torch.nn.functional as functional
from transformers.pytorch_utils import Conv1D

Replaced = list[tuple[torch.nn.Module, str, torch.nn.Module]]
"""Replaced layers: the parent module, the name in the parent, and the original layer."""


class Cast:
    """Cast inputs to the dtype of the products; reuse the result while the input stays the same.

    Query, key and value layers read the same input.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._source: torch.Tensor | None = None
        self._result: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == self.dtype:
            return x
        if x is not self._source or self._result is None:
            self._source, self._result = x, x.to(self.dtype)
        return self._result

    def keep(self, source: torch.Tensor, result: torch.Tensor) -> None:
        """Use ``result`` as the cast of ``source``: a kernel has computed both."""
        self._source, self._result = source, result

    def clear(self) -> None:
        self._source = self._result = None


class Product(torch.nn.Module):
    """A linear layer that multiplies in the dtype of ``cast`` and returns that dtype.

    torch promotes the sum of this output and a float32 residual stream to float32. So the stream,
    its norms and the values read from it keep full precision. With ``wide`` the output is float32,
    for blocks that normalise before they add. ``rows`` is the expected number of input rows.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, cast: Cast, rows: int, wide: bool
    ) -> None:
        super().__init__()
        self._cast, self._wide = cast, wide
        self._bias = None if bias is None else bias.to(cast.dtype)
        self._weight = weight.to(cast.dtype).contiguous()
        self._prepacked = False
        if weight.device.type == "cpu" and _can_prepack(cast.dtype):
            self._weight = torch.ops.mkldnn._reorder_linear_weight(self._weight, rows)
            self._prepacked = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self._cast(x)
        if self._prepacked:
            result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
                x, self._weight, self._bias, "none", [], ""
            )
        else:
            result = functional.linear(x, self._weight, self._bias)
        return result.float() if self._wide else result


@cache  # a model has hundreds of products, and each trial wakes every thread
def _can_prepack(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes correct products from reordered weights of ``dtype`` here.

    The operators are private to torch, so this function tries them on a small product.
    """
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    weight = torch.linspace(-1, 1, 512, dtype=dtype).reshape(16, 32)
    x = torch.linspace(-1, 1, 96, dtype=dtype).reshape(3, 32)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 3)
        result = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    except (RuntimeError, NotImplementedError):
        return False
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    return torch.allclose(
        result.float(), functional.linear(x.float(), weight.float()), rtol=tolerance, atol=tolerance
    )


def has_fast_products(dtype: str, device: str) -> bool:
    """Whether ``device`` reports that it multiplies faster in half precision than in float32."""
    if device == "cuda":
        return dtype == "float16" or torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    return dtype == "bfloat16" and bool(able.get("amx_bf16") or able.get("avx512_bf16"))


def replace_linear_layers(
    blocks: Iterable[torch.nn.Module], dtype: torch.dtype, rows: int, *, wide: bool
) -> tuple[Replaced, Cast]:
    """Replace the linear layers inside ``blocks`` by ``Product``s for about ``rows`` rows.

    ``restore`` undoes the replacement. The second result is the cast that the products share.
    """
    cast = Cast(dtype)
    replaced: Replaced = []
    for block in blocks:
        for parent in list(block.modules()):
            for name, layer in list(parent.named_children()):
                if type(layer) is torch.nn.Linear:
                    weight: torch.Tensor = layer.weight
                elif type(layer) is Conv1D:  # GPT-2's linear layer, stored transposed
                    weight = layer.weight.t()  # type: ignore[operator]
                else:
                    continue
                bias: torch.Tensor | None = layer.bias  # type: ignore[assignment]
                with torch.inference_mode():
                    product = Product(weight.detach(), bias, cast, rows, wide)
                replaced.append((parent, name, layer))
                setattr(parent, name, product)
    return replaced, cast


def restore(replaced: Replaced) -> None:
    """Put the original layers back."""
    for parent, name, layer in replaced:
        setattr(parent, name, layer)
