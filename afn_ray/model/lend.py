"""Weights of blocks that are in float32 on the device only while their block runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from afn_ray.model.mapped import MappedFiles

HALF = (torch.float16, torch.bfloat16)


def to_float(weight: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``weight`` on ``device``; in float32 if it is in half precision, which loses nothing."""
    moved = weight.to(device)  # in half precision: fewer bytes to move
    return moved.float() if moved.dtype in HALF else moved


def put(part: torch.nn.Module, name: str, weight: torch.Tensor) -> None:
    """Make ``weight`` the parameter ``name`` of ``part``."""
    if not isinstance(weight, torch.nn.Parameter):
        weight = torch.nn.Parameter(weight, requires_grad=False)
    setattr(part, name, weight)


def weights_of(block: torch.nn.Module) -> list[tuple[torch.nn.Module, str, torch.nn.Parameter]]:
    """The parameters of ``block``, each with the module that has it and its name there."""
    return [
        (part, name, weight)
        for part in block.modules()
        for name, weight in part.named_parameters(recurse=False)
    ]


def move_rest(
    model: torch.nn.Module, blocks: Sequence[torch.nn.Module], device: torch.device
) -> None:
    """Move to ``device`` the buffers of ``model``, and the parameters outside ``blocks``."""
    inside = {part for block in blocks for part in block.modules()}
    moved: dict[torch.nn.Parameter, torch.nn.Parameter] = {}  # two modules may share one
    for part in model.modules():
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, buffer.to(device))
        for name, weight in list(part.named_parameters(recurse=False)):
            if part not in inside:
                if weight not in moved:
                    moved[weight] = torch.nn.Parameter(weight.to(device), requires_grad=False)
                setattr(part, name, moved[weight])


def move_weights(block: torch.nn.Module, device: torch.device) -> None:
    """Move the parameters of ``block`` to ``device``; those in half precision become float32."""
    for part, name, weight in weights_of(block):
        put(part, name, to_float(weight, device))


def copy_out(model: torch.nn.Module, files: MappedFiles) -> None:
    """Copy what ``model`` still has in files into memory of its own, one tensor after another.

    ``files`` are not all of them: safetensors and torch map the files that they read, too. So all
    tensors on the CPU are copied, but for those that inference has computed or oneDNN has packed,
    which are copies.
    """
    for part in model.modules():
        own = (*part.parameters(recurse=False), *part.buffers(recurse=False), *vars(part).values())
        for value in (v for v in own if isinstance(v, torch.Tensor)):
            is_stored = value.layout == torch.strided and not value.is_inference()
            if value.device.type == "cpu" and is_stored:
                stored = value.detach()
                value.data = stored.clone()
                files.release([stored])


class Lender:
    """Lends the blocks their weights, in float32 on ``device``, one block at a time.

    Between its runs a block has its weights as they were loaded: on the CPU, perhaps in half
    precision, perhaps not yet read from ``files``. So memory holds the float32 weights of at most
    one block. Where a block's own weights serve as they are, they are lent as they are.
    """

    def __init__(
        self, blocks: Sequence[torch.nn.Module], device: torch.device, files: MappedFiles
    ) -> None:
        self._device, self._files = device, files
        self._owned: list[tuple[torch.nn.Module, str, torch.nn.Parameter]] = []  # of the one lent
        self._handles = []
        for block in blocks:
            self._handles.append(block.register_forward_pre_hook(self._lend))
            # First of its kind: the model's own hook may stop the pass.
            self._handles.append(block.register_forward_hook(self._take_back, prepend=True))

    def _lend(self, block: torch.nn.Module, args: object) -> None:
        self._take_back()  # after a block that failed
        self._owned = weights_of(block)
        for part, name, weight in self._owned:
            put(part, name, to_float(weight, self._device))

    def _take_back(self, *args: object) -> None:
        for part, name, weight in self._owned:
            setattr(part, name, weight)
        self._files.release(weight for _, _, weight in self._owned)
        self._owned = []

    def close(self) -> None:
        """Take back what is lent, and lend no more."""
        self._take_back()
        for handle in self._handles:
            handle.remove()
