"""Linear layers and experts of the blocks: weights prepared once, in a chosen precision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as functional
from transformers.pytorch_utils import Conv1D

from afn_ray.model.lend import put, to_float, weights_of


class Cast:
    """Cast inputs to the dtype of the products; reuse the result while the input stays the same.

    Query, key and value layers read the same input. With ``wide``, the products that share this
    cast return float32, for blocks that normalise before they add.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.wide = False
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

    def output(self, x: torch.Tensor) -> torch.Tensor:
        """The output ``x`` of a product, in the dtype that products return."""
        return x.float() if self.wide else x

    def clear(self) -> None:
        self._source = self._result = None


class Product(torch.nn.Module):
    """A linear layer that multiplies in the dtype of ``cast`` and returns that dtype.

    torch promotes the sum of this output and a float32 residual stream to float32. So the stream,
    its norms and the values read from it keep full precision. ``rows`` is the expected number of
    input rows.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, cast: Cast, rows: int
    ) -> None:
        super().__init__()
        self._cast = cast
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
        return self._cast.output(result)


@cache  # a model has hundreds of products, and each trial wakes every thread
def _can_prepack(dtype: torch.dtype) -> bool:
    """True if oneDNN computes correct products from reordered weights of ``dtype`` here.

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
    """True if ``device`` reports that it multiplies faster in half precision than in float32."""
    if device == "cuda":
        return dtype == "float16" or torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    return dtype == "bfloat16" and bool(able.get("amx_bf16") or able.get("avx512_bf16"))


class Sizes(NamedTuple):
    """Numbers of weights that run: of products, of experts, and all others."""

    products: int
    experts: int
    others: int


def count_weights(
    model: torch.nn.Module, blocks: Sequence[torch.nn.Module], num_used: int
) -> Sizes:
    """Count the weights of ``model``, of whose ``blocks`` only the first ``num_used`` run."""
    unused = {w for block in blocks[num_used:] for w in block.parameters()}
    products = experts = 0
    for block in blocks[:num_used]:
        products += sum(weight.numel() for *_, weight in _linear_layers(block))
        for part in experts_in(block):
            experts += sum(weight.numel() for _, weight in _stacked(part))
    total = sum(w.numel() for w in model.parameters() if w not in unused)
    return Sizes(products, experts, total - products - experts)


def make_fast(
    block: torch.nn.Module, cast: Cast, rows: int, experts: torch.dtype, device: torch.device
) -> None:
    """Replace the linear layers in ``block`` by ``Product``s, for about ``rows`` rows of input.

    The experts of a mixture get their weights in the dtype ``experts``, and their input as well;
    they weigh their outputs as before, in the dtype of the router. All other weights become
    float32. All are on ``device`` afterwards.
    """
    for parent, name, layer, weight in list(_linear_layers(block)):
        bias: torch.Tensor | None = layer.bias  # type: ignore[assignment]
        with torch.inference_mode():
            bias = None if bias is None else bias.detach().to(device)
            moved = weight.detach().to(device)
            setattr(parent, name, Product(moved, bias, cast, rows))
    mixture = experts_in(block)
    for part, name, weight in weights_of(block):
        if part in mixture:
            put(part, name, weight.to(device).to(experts))
        else:
            put(part, name, to_float(weight, device))
    if experts != torch.float32:
        for part in mixture:
            part.register_forward_pre_hook(_cast_input(cast), with_kwargs=True)
            part.register_forward_hook(lambda part, args, output: cast.output(output))


def _linear_layers(
    block: torch.nn.Module,
) -> Iterator[tuple[torch.nn.Module, str, torch.nn.Module, torch.Tensor]]:
    """The linear layers in ``block``: parent, name there, layer, weight [outputs, inputs]."""
    for parent in block.modules():
        for name, layer in parent.named_children():
            if type(layer) is torch.nn.Linear:  # a subclass may compute something else
                yield parent, name, layer, layer.weight
            elif type(layer) is Conv1D:  # GPT-2's linear layer, stored transposed
                yield parent, name, layer, layer.weight.t()  # type: ignore[operator]


def experts_in(block: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules in ``block`` that hold the weights of all experts of a mixture."""
    return [part for part in block.modules() if _stacked(part)]


def _stacked(part: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """Weights and biases of ``part`` by name, if it has weights of three dimensions.

    The first dimension is the expert.
    """
    weights = []
    for name, weight in part.named_parameters(recurse=False):
        if weight.is_floating_point():
            weights.append((name, weight))
    return weights if any(weight.dim() == 3 for _, weight in weights) else []


def _cast_input(cast: Cast) -> Any:
    """Hook before experts: cast their first input, the hidden states, as those of products."""

    def before(
        part: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (cast(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": cast(kwargs["hidden_states"])}

    return before
