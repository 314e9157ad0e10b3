"""Load a model's weights: all of them, or only those of the first blocks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from afn_ray.errors import ModelError
from afn_ray.model import parts
from afn_ray.model.files import ModelFiles, loading_failed
from afn_ray.model.mapped import MappedFiles
from afn_ray.model.memory import is_out_of_memory
from afn_ray.text import count


class Loaded(NamedTuple):
    """A model whose first blocks have been loaded, on the CPU, frozen.

    Its parameters are in float32, but those of its blocks stay in half precision where all
    tensors of the files are in one such dtype. A weight that is stored as it is used is still in
    ``files``.
    """

    module: Any
    blocks: list[torch.nn.Module]  # a shared block (ALBERT) occurs once
    depth: int  # runs of a block in one pass
    files: MappedFiles


class _Shortened:
    """A class of models like ``kind`` that keeps only the first ``num_blocks`` of its blocks.

    transformers reads no weight that has no place in the model. The config stays as it is: some
    blocks compute with the number of all blocks.
    """

    def __init__(
        self, kind: Any, files: ModelFiles, num_blocks: int, half: torch.dtype | None
    ) -> None:
        self.blocks: list[torch.nn.Module] = []
        self.depth = files.depth
        # Prefix of the names of what is left out -> those that the files must have, if any.
        self.left_out: dict[str, list[str]] = {}

        def init(model: Any, config: Any, *args: Any, **options: Any) -> None:
            kind.__init__(model, config, *args, **options)
            self.blocks = find_blocks(model, files)
            self._leave_out_blocks(model, num_blocks)
            if config.get_text_config() is not config:
                self._leave_out_other_models(model)
            if half is not None:  # a weight is loaded in the dtype of its place
                for block in self.blocks:
                    for weight in block.parameters():
                        weight.data = weight.data.to(half)

        # transformers reads the source of a class's module.
        members = {n: getattr(kind, n) for n in ("__module__", "__qualname__")}
        self.kind: Any = type(kind.__name__, (kind,), members | {"__init__": init})

    def _leave_out_blocks(self, model: Any, num_blocks: int) -> None:
        names = {part: name for name, part in model.named_modules()}
        if len(self.blocks) == self.depth > num_blocks and (found := list_of(model, self.blocks)):
            for at in range(num_blocks, self.depth):
                prefix = f"{names[found]}.{at}."
                self.left_out[prefix] = [prefix + key for key in found[at].state_dict()]
            del found[num_blocks:]
            self.blocks = self.blocks[:num_blocks]
            self.depth = num_blocks

    def _leave_out_other_models(self, model: Any) -> None:
        """Leave out the models beside the one of text, which read images or sound."""
        for name, part in list(model.named_children()):
            is_other = isinstance(part, transformers.PreTrainedModel)
            if is_other and self.blocks[0] not in set(part.modules()):
                setattr(model, name, torch.nn.Identity())
                self.left_out[f"{name}."] = []


def load_weights(files: ModelFiles, kind: Any = transformers.AutoModel) -> Any:
    """Load the model as ``kind``, one of transformers' classes, frozen, in float32 on the CPU.

    Raises ``ModelError`` if weights that ``kind`` needs are missing from the files and would be
    random, if they have other shapes, or if the files hold weights that ``kind`` does not have.
    """
    with _loading(files):
        model, info = kind.from_pretrained(
            files.folder, use_safetensors=not files.allow_pickle or None, **_options(files)
        )
    _check(files, model, info, {}, with_pooler=kind is not transformers.AutoModel)
    return _frozen(model)


def load_blocks(files: ModelFiles, num_blocks: int) -> Loaded:
    """Load the parts around the blocks, and the first ``num_blocks`` blocks.

    All blocks are loaded, in float32, if the model comes with code of its own. Raises
    ``ModelError`` as ``load_weights`` does. Blocks that are left out must have a tensor in the
    files, but are not checked further; those of a GGUF file are not checked at all.
    """
    with _loading(files):
        config = transformers.AutoConfig.from_pretrained(
            files.folder,
            gguf_file=files.gguf,
            trust_remote_code=files.trust_remote_code,
            local_files_only=True,
        )
        if (kind := _class_of(files, config)) is not None:
            mapped = MappedFiles(_safetensors(files))
            _check_dtypes(files, mapped)
            short = _Shortened(kind, files, num_blocks, mapped.half)
            options = _options(files) | {"config": config}
            folder: Path | None = files.folder
            if mapped.tensors:
                folder, options["state_dict"] = None, mapped.tensors
            model, info = short.kind.from_pretrained(
                folder, use_safetensors=not files.allow_pickle or None, **options
            )
    if kind is None:
        model = load_weights(files)
        return Loaded(model, find_blocks(model, files), files.depth, MappedFiles([]))
    # Of a GGUF file transformers reads the tensors that the model has, and names no others.
    left_out = {} if files.gguf else short.left_out
    _check(files, model, info, left_out, with_pooler=False)
    blocks, short.blocks = short.blocks, []  # the model's class refers to ``short``
    return Loaded(_frozen(model), blocks, short.depth, mapped)


def _check_dtypes(files: ModelFiles, mapped: MappedFiles) -> None:
    """Raise ``ModelError`` for weights that are stored as whole numbers:
    their scales are unknown.
    """
    for name, tensor in mapped.tensors.items():
        if name.endswith("weight") and not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ModelError(
                f"model {files.name}: {name} is stored as {kind}; expected floating point. Give "
                "the weights of the model before it was quantized"
            )


def _class_of(files: ModelFiles, config: Any) -> Any:
    """transformers' class of models with ``config``; None if the model's own code is to run."""
    if files.trust_remote_code and "AutoModel" in (getattr(config, "auto_map", None) or {}):
        return None
    kind = transformers.MODEL_MAPPING.get(type(config), None)
    return kind if getattr(kind, "config_class", None) is type(config) else None


def _safetensors(files: ModelFiles) -> list[Path]:
    """The safetensors files that hold the weights; none for GGUF and pickled files."""
    return [files.folder / name for name in files.identity if name.endswith(".safetensors")]


def _options(files: ModelFiles) -> dict[str, Any]:
    return {
        "gguf_file": files.gguf,
        "dtype": torch.float32,
        "local_files_only": True,
        "trust_remote_code": files.trust_remote_code,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
    }


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers in this context: its notes on parts that are left out."""
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.utils.logging.set_verbosity(level)


@contextmanager
def _loading(files: ModelFiles) -> Iterator[None]:
    """Make transformers quiet in this context, and raise its errors as ``ModelError``."""
    parts.check_environment()
    transformers.utils.logging.disable_progress_bar()
    try:
        with quiet(), _reading_gguf(files):
            yield
    except Exception as error:  # transformers raises nearly any error for unusable files
        if is_out_of_memory(error) or isinstance(error, ModelError):
            raise
        raise ModelError(loading_failed(files.name, error)) from error


@contextmanager
def _reading_gguf(files: ModelFiles) -> Iterator[None]:
    """Make transformers read a GGUF file without a bar, and make its table of names once.

    It draws the bar whatever its settings say, and makes the table anew for each module of the
    model, which takes longer than all else.
    """
    if files.gguf is None:
        yield
        return
    import gguf
    from transformers import modeling_gguf_pytorch_utils as reading

    bar, make_names = reading.tqdm, gguf.get_tensor_name_map
    reading.tqdm = lambda tensors, **_: tensors
    gguf.get_tensor_name_map = cache(make_names)
    try:
        yield
    finally:
        reading.tqdm, gguf.get_tensor_name_map = bar, make_names


def _check(
    files: ModelFiles,
    model: torch.nn.Module,
    info: dict[str, Any],
    left_out: dict[str, list[str]],
    *,
    with_pooler: bool,
) -> None:
    """Raise ``ModelError`` if the weights in ``files`` are not those of ``model``.

    ``info`` is what transformers says of loading them; ``left_out`` is as in ``_Shortened``.
    """
    missing: set[str] = set()
    for key in info["missing_keys"]:
        is_unused_pooler = "pooler" in key and not with_pooler
        if not key.endswith("position_ids") and not is_unused_pooler:
            missing.add(key)
    unexpected = set(info["unexpected_keys"])
    base = f"{getattr(model, 'base_model_prefix', '')}."
    for prefix, names in left_out.items():
        there = set()
        for key in unexpected:
            inner = key.removeprefix(base)
            if inner.startswith(prefix):
                there.add(key)
        unexpected -= there
        if not there:
            missing |= set(names)
    parts.check_shapes(files.name, info["mismatched_keys"])
    parts.check_weights(files.name, model, files.depth, unexpected)
    if missing:
        hint = (
            f"config.json says {count(files.depth, 'block')} of {files.hidden_size}: is it another "
            "model's?"
        )
        if hasattr(model, base[:-1]) and all(
            not k.startswith(base) or k.startswith(f"{base}pooler.") for k in missing
        ):
            hint = "The model has no such head: give one that was trained with it"
        raise ModelError(
            f"model {files.name}: its files lack {count(len(missing), 'weight')}, which would be "
            f"random: {', '.join(sorted(missing)[:3])}. {hint}"
        )


def _frozen(model: Any) -> Any:
    model.eval()
    if getattr(model.config, "use_cache", False):
        model.config.use_cache = False  # no later pass would read cached keys and values
    model.requires_grad_(False)
    return model


def list_of(model: torch.nn.Module, blocks: list[torch.nn.Module]) -> torch.nn.ModuleList | None:
    """The list in ``model`` that holds the ``blocks``, if one does."""
    for part in model.modules():
        if isinstance(part, torch.nn.ModuleList) and list(part) == blocks:
            return part
    return None


def find_blocks(model: torch.nn.Module, files: ModelFiles) -> list[torch.nn.Module]:
    """The modules whose outputs are the layers; a shared module (ALBERT) occurs once.

    Raises ``ModelError`` if there are none.
    """
    # The attribute is private; no public one names the modules that make ``hidden_states``.
    recorded = getattr(model, "_can_record_outputs", None) or {}
    spec = recorded.get("hidden_states")
    classes = []
    for item in spec if isinstance(spec, list | tuple) else [spec]:
        target = getattr(item, "target_class", item)
        if isinstance(target, type):
            classes.append(target)
    kinds = tuple(classes)
    blocks = [module for module in model.modules() if isinstance(module, kinds)]
    if not blocks:
        for module in model.modules():
            if isinstance(module, torch.nn.ModuleList) and len(module) == files.depth:
                blocks = list(module)
                break
    if not blocks:
        raise ModelError(
            f"{files.name} ({files.model_type}): its blocks were not found; not supported"
        )
    return blocks
