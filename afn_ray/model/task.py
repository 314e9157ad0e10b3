"""A sequence classifier's decision about one text, with each token's and neuron's part in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers.pytorch_utils import Conv1D

from afn_ray.errors import ModelError
from afn_ray.model.files import ModelFiles
from afn_ray.model.load import find_blocks, load_weights
from afn_ray.model.pending import Norms
from afn_ray.model.places import num_experts
from afn_ray.model.prove import compare_norms
from afn_ray.model.signals import norm


@dataclass(frozen=True, slots=True)
class Decided:
    """A classifier's answer, and each token's and neuron's part in the logit of ``chosen``.

    A part is value times gradient at the layer (Simonyan et al. 2013, arXiv:1312.6034; Shrikumar et
    al. 2016, arXiv:1605.01713). If the logit were linear, it would lose this much when the value
    went to 0. For a token, the parts of the dimensions of its hidden state are summed.
    """

    kind: str  # "one" of the labels (softmax), "any" of them (sigmoid each), or a "value"
    labels: tuple[str, ...]
    values: tuple[float, ...]  # by label: probabilities, or the value itself
    chosen: int  # index of the label with the largest value
    tokens: Norms  # parts of the tokens, [n_tokens]
    # Parts of the MLP's neurons, [n_tokens, intermediate_size]; [n_tokens, 0] if there are none,
    # as at layer 0.
    neurons: Norms


def decide(
    files: ModelFiles, ids: Sequence[int], layer: int, strengths: Norms, dtype: str, device: str
) -> Decided:
    """Run the sequence classifier in ``files`` over one text ``ids``, in float32, unchanged.

    ``strengths`` [n_tokens] are those measured at ``layer`` with products of ``dtype``. Raises
    ``ModelError`` if the classifier's own strengths differ by more than the tolerance of ``dtype``,
    and if ``files`` hold no classifier.
    """
    model = _load(files).to(device)
    blocks = find_blocks(model.base_model, files)
    read: dict[str, torch.Tensor] = {}
    calls = 0

    def before(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal calls
        calls += 1
        if calls == max(1, layer):
            hidden = args[0] if args else kwargs["hidden_states"]
            # Only computations after this point record gradients.
            read["hidden"] = hidden.requires_grad_()

    def after(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if calls == layer:
            read["hidden"] = output[0] if isinstance(output, tuple) else output

    def product(module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        if (
            calls == layer
            and not num_experts(model.config)
            and output.shape[-1] == files.hidden_size
            and args[0].shape[:-1].numel() == len(ids)
        ):
            # The last product of the block is the MLP's. In a mixture each token has its own
            # experts, so their neurons are left out.
            read["neurons"] = args[0]

    for block in blocks:
        block.register_forward_pre_hook(before, with_kwargs=True)
        block.register_forward_hook(after)
        for module in block.modules():
            if isinstance(module, torch.nn.Linear | Conv1D):
                module.register_forward_hook(product)
    with torch.enable_grad():
        batch = torch.tensor([list(ids)], device=device)
        logits = model(input_ids=batch).logits[0].float()
        if calls != files.depth:
            raise ModelError(
                f"the classifier in {files.name} ran {calls} blocks, its config says {files.depth}"
            )
        kind, values = _read(logits.detach(), model.config)
        chosen = int(values.argmax())
        gradients = torch.autograd.grad(logits[chosen], list(read.values()))
    hidden = read["hidden"].detach()
    own = norm(hidden)[0].cpu().numpy()
    what = f"layer {layer} of the classifier in {files.name} against what explain measured"
    compare_norms(what, own, strengths, getattr(torch, dtype))
    parts = {
        name: (x.detach() * g).reshape(len(ids), -1)
        for (name, x), g in zip(read.items(), gradients, strict=True)
    }
    names = getattr(model.config, "id2label", None) or {}
    of_tokens = parts["hidden"].sum(-1)
    of_neurons = parts.get("neurons", hidden.new_empty(len(ids), 0))
    return Decided(
        kind=kind,
        labels=tuple(str(names.get(i, i)) for i in range(len(values))),
        values=tuple(values.tolist()),
        chosen=chosen,
        tokens=of_tokens.cpu().numpy(),
        neurons=of_neurons.cpu().numpy(),
    )


def _load(files: ModelFiles) -> Any:
    """The sequence classifier in ``files``. Raises ``ModelError`` if there is none."""
    if files.gguf is not None:
        raise ModelError(
            f"{files.name} is a GGUF file, which holds no classifier; give a run of a model that "
            "has one"
        )
    try:
        return load_weights(files, transformers.AutoModelForSequenceClassification)
    except ModelError as error:
        raise ModelError(
            f"{files.name} holds no sequence classifier whose decision could be explained: {error}"
        ) from (error)


def _read(logits: torch.Tensor, config: Any) -> tuple[str, torch.Tensor]:
    """The kind of the answer in ``logits`` [n_labels], and its values."""
    if getattr(config, "problem_type", None) == "regression" or len(logits) == 1:
        return "value", logits
    if getattr(config, "problem_type", None) == "multi_label_classification":
        return "any", logits.sigmoid()
    return "one", logits.softmax(-1)
