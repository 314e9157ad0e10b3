"""Check that the parts of a model folder fit together: config, weights and tokenizer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch

from afn_ray.errors import ModelError
from afn_ray.text import count
from afn_ray.tokens.culprits import is_of_input

SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"
"""Names of the weight files that transformers loads.

Weights in several files have an index with this name plus ``.index.json``.
"""
ADAPTERS = ("adapter_config.json", "adapter_model*")
"""Patterns of files that belong to an adapter."""
TOKENIZERS = (
    "tokenizer.json",
    "*.model",
    "vocab*",
    "merges*",
    "tekken.json",
    "*.tiktoken",
    "*.spm",
)
"""Patterns of files from which transformers builds a tokenizer.

Without any of them, transformers builds a tokenizer with no vocabulary.
"""
READABLE = (
    "The quick fox, a lazy dog. 1 + 2 = 3; \u4e00 \u4e2d \u306e \u0438 \u0432 \u0648 \u05d5 "
    "\u03ba\u03b1\u03b9"
)
"""Text in several scripts, at least one of which every vocabulary covers."""

HEADS = frozenset({
    "classifier", "cls", "decoder", "dense", "discriminator_predictions", "embed_out",
    "generator_lm_head", "generator_predictions", "head", "lm_head", "lm_predictions",
    "logits_proj", "mask_predictions", "multiple_choice_head", "pooler", "pre_classifier",
    "predictions", "qa_outputs", "score", "sequence_summary", "sop_classifier", "v_head",
    "vocab_layer_norm", "vocab_projector", "vocab_transform",
})  # fmt: skip
"""Modules after the last block, by their names in transformers and trl.

No layer depends on them.
"""
BUFFERS = (
    ".position_ids",
    ".token_type_ids",
    ".rotary_emb.inv_freq",
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
)
"""Suffixes of tensors that older versions of transformers saved and newer versions compute.

They hold positions, masks and frequencies.
"""
ADAPTED = (
    ".lora_",
    ".lora.",
    "lora_embedding",
    ".ia3_",
    ".oft_",
    ".vera_",
    ".adapter",
    "base_model.model.",
    "modules_to_save",
)
"""Substrings that mark the names of an adapter's tensors."""
MOST_NAMES = 3
"""Largest number of tensors or files that a message names."""

ROUNDING = {
    "ONEDNN_DEFAULT_FPMATH_MODE": ("", "STRICT"),
    "NVIDIA_TF32_OVERRIDE": ("", "0"),
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": ("", "0"),
}
"""Environment variables that can round the inputs of float32 products, with their exact values."""


def find(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """The files and folders in ``folder`` that match any of ``patterns``, by pattern."""
    found: list[Path] = []
    for pattern in patterns:
        found += folder.glob(pattern)
    return found


def check_folder(name: str, folder: Path) -> None:
    """Raise ``ModelError`` if ``folder`` holds an adapter, with or without its base weights."""
    found = sorted({path.name for path in find(folder, ADAPTERS)})
    if found:
        raise ModelError(
            f"{name} holds an adapter ({', '.join(found)}), which transformers applies only where "
            "the package peft is installed. Merge it into its weights (peft: merge_and_unload, "
            "then save_pretrained), and give that folder; where it should not count, move its "
            "files elsewhere"
        )


def check_config(name: str, folder: Path, trust_remote_code: bool) -> None:
    """Raise ``ModelError`` for quantized weights, and for remote code outside ``folder``."""
    config = read_json(name, folder / "config.json")
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        if part.get("quantization_config"):
            method = part["quantization_config"]
            method = method.get("quant_method", "?") if isinstance(method, dict) else method
            raise ModelError(
                f"the weights of {name} are quantized ({method}), and what they are depends on a "
                "package of their own; give the model's own weights, or save it dequantized "
                "(model.dequantize(), then save_pretrained)"
            )
    described = [config]
    if (path := folder / "tokenizer_config.json").is_file():
        described.append(read_json(name, path))
    for part in described if trust_remote_code else ():
        for place in _places_of_code(part):
            if "--" in place:
                repository, _, _ = place.partition("--")
                raise ModelError(
                    f"the code of {name} is in another repository ({repository}), which may change "
                    "while the folder does not: put its .py files into the folder, and leave the "
                    "repository out of auto_map"
                )


def weight_files(name: str, folder: Path, allow_pickle: bool) -> list[str]:
    """Names of the weight files that transformers loads, with their index.

    Raises ``ModelError`` if there are none, if some are missing, or if transformers would ignore
    other weight files in the folder without a warning.
    """
    explicit = read_json(name, folder / "config.json").get("transformers_weights")
    if isinstance(explicit, str):
        if not (folder / _plain(name, explicit)).is_file():
            raise ModelError(
                f"config.json of {name} names {explicit} as its weights, and {folder} does not "
                "have it"
            )
        single, index = (explicit, "") if not explicit.endswith(".index.json") else ("", explicit)
        return [single] if single else [index, *_indexed(name, folder, index)]
    for single in (SAFETENSORS, PICKLED) if allow_pickle else (SAFETENSORS,):
        index = f"{single}.index.json"
        stem, suffix = single.split(".")
        parts = {p.name for p in folder.glob(f"{stem}-*-of-*.{suffix}")}
        whole = (folder / single).is_file()
        indexed = (folder / index).is_file()
        if not whole and not indexed:
            if parts:
                raise ModelError(
                    f"{name} has {count(len(parts), 'part')} of its weights ({min(parts)}, ...) "
                    f"and no {index} that says what is in them; copy that too"
                )
            continue
        used = [] if whole else _indexed(name, folder, index)
        if whole and indexed:
            raise ModelError(
                f"{name} has two sets of weights, {single} and {index}; keep the one that is meant"
            )
        if unused := sorted(parts - set(used)):
            raise ModelError(
                f"{name} has weights that {single if whole else index} knows nothing of: "
                f"{', '.join(unused[:MOST_NAMES])}; remove them, or give the folder that they are "
                "of"
            )
        return [single] if whole else [index, *used]
    others = sorted(p.name for p in folder.glob("*.safetensors"))
    if others:
        raise ModelError(
            f"no weights at {name}: {folder} has {', '.join(others[:MOST_NAMES])}, expected "
            f"{SAFETENSORS} or {SAFETENSORS}.index.json"
        )
    if allow_pickle or not any(folder.glob("pytorch_model*.bin")):
        raise ModelError(f"no weights at {name}: {folder} has no .safetensors file")
    raise ModelError(
        f"the weights of {name} are pickled (.bin), and a pickle can run code as it loads; convert "
        "them to safetensors, or give --allow-pickle if you trust where they come from"
    )


def _indexed(name: str, folder: Path, index: str) -> list[str]:
    """Names of the files that ``index`` lists. Raises ``ModelError`` if one of them is missing."""
    weight_map = read_json(name, folder / index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(
            f"{index} of {name} has no weight_map, which says what file each tensor is in"
        )
    files = sorted({_plain(name, file) for file in weight_map.values()})
    if missing := [f for f in files if not (folder / f).is_file()]:
        raise ModelError(
            f"{name} cannot be loaded: {index} names {count(len(files), 'file')} of weights, and "
            f"{folder} lacks {', '.join(missing[:MOST_NAMES])}; copy them too"
        )
    return files


def _plain(name: str, file: object) -> str:
    """``file``, a name without a folder. Raises ``ModelError`` for anything else."""
    if not isinstance(file, str) or not file or Path(file).name != file:
        raise ModelError(
            f"{name} names {file!r} as a file of its weights; expected a name in its own folder"
        )
    return file


def read_json(name: str, path: Path) -> dict[str, Any]:
    """The JSON object in ``path``. Raises ``ModelError`` if it cannot be read or is no object."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path.name} of {name} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(
            f"{path.name} of {name} holds a {type(value).__name__}, expected an object"
        )
    return value


def _places_of_code(config: dict[str, Any]) -> Iterator[str]:
    """The classes that ``auto_map`` in ``config`` names: a file and, after --, a repository's."""
    places = config.get("auto_map")
    for place in places.values() if isinstance(places, dict) else []:
        for one in place if isinstance(place, list) else [place]:
            yield str(one)


def check_has_tokenizer(name: str, folder: Path) -> None:
    """Raise ``ModelError`` if ``folder`` has no tokenizer files."""
    if not any(path.is_file() for path in find(folder, TOKENIZERS)):
        raise ModelError(
            f"{name} has no tokenizer: {folder} has no tokenizer.json, and no vocab.txt, "
            "vocab.json, merges.txt or *.model. Copy the files of the model's own tokenizer into "
            "it (AutoTokenizer: save_pretrained)"
        )


def check_tokenizer(
    name: str, tokenizer: tokenizers.Tokenizer, unknown: int | None, num_embeddings: int | None
) -> None:
    """Raise ``ModelError`` if the tokenizer has ids without an embedding, or no vocabulary.

    ``unknown`` is the id of the unknown token, if there is one. Special tokens beyond the
    embeddings are allowed (Gemma 3 1B has one for images). In a corpus they are tokenized as text,
    and another check refuses a template that contains one.
    """
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    added = {}
    for i, token in tokenizer.get_added_tokens_decoder().items():
        if not token.special:
            added[i] = token.content
    if num_embeddings is not None:
        names = {i: piece for piece, i in vocabulary.items()} | added
        if beyond := sorted(i for i in names if i >= num_embeddings):
            raise ModelError(
                f"the tokenizer of {name} has {count(len(beyond), 'id')} that the model has no "
                f"embedding for: {beyond[0]} ({names[beyond[0]][:40]!r}) is the first, and "
                f"vocab_size in config.json is {num_embeddings:,}. Give the model's own tokenizer; "
                "or, where tokens were added to it, a model with vectors for them "
                "(resize_token_embeddings, and trained)"
            )
    try:
        ids = tokenizer.encode(READABLE, add_special_tokens=False).ids
    except BaseException as error:  # raised by a tokenizer that has no unknown token
        if not is_of_input(error):
            raise
        return
    if not ids or (unknown is not None and set(ids) == {unknown}):
        num_entries = len(vocabulary) + len(added)
        raise ModelError(
            f"the tokenizer of {name} makes {'nothing' if not ids else 'its unknown token'} of "
            f"every word, with a vocabulary of {num_entries:,} "
            f"{'entry' if num_entries == 1 else 'entries'}: a file "
            "of the tokenizer is missing or another model's. Copy the files of the model's own "
            "tokenizer into the folder (AutoTokenizer: save_pretrained)"
        )


def find_unused(model: torch.nn.Module, keys: Iterable[str]) -> list[str]:
    """Checkpoint tensors of the model's body that ``model`` would ignore.

    ``keys`` are the checkpoint's tensors without a parameter in ``model``. Those of heads, poolers
    and computed buffers are left out: no layer depends on them. Tensors of adapters are kept.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    unused = []
    for key in sorted(keys):
        inner = key.removeprefix(prefix) if len(prefix) > 1 else key
        first = inner.partition(".")[0]
        is_pooler = first == "pooler"  # reads the last layer; not every family has one
        is_head = inner == key and first in HEADS and not hasattr(model, first)
        is_buffer = key.endswith(BUFFERS) or f".{key}" in BUFFERS
        if _is_adapted(key) or not (is_pooler or is_head or is_buffer):
            unused.append(key)
    return unused


def _is_adapted(key: str) -> bool:
    """True if the tensor named ``key`` is an adapter's."""
    return any(mark in f".{key}" for mark in ADAPTED)


def check_weights(name: str, model: torch.nn.Module, depth: int, unexpected: Iterable[str]) -> None:
    """Raise ``ModelError`` if the checkpoint holds body weights that ``model`` does not have.

    ``unexpected`` are the checkpoint's tensors without a parameter in ``model``; ``depth`` is the
    number of blocks in its config.
    """
    unused = find_unused(model, unexpected)
    if not unused:
        return
    hint = f"config.json says {count(depth, 'block')}: is it another model's?"
    if any(map(_is_adapted, unused)):
        hint = (
            "they are an adapter's: merge it into the weights (peft: merge_and_unload, then "
            "save_pretrained)"
        )
    raise ModelError(
        f"model {name}: its files hold {count(len(unused), 'tensor')} that {type(model).__name__} "
        f"does not have and that would be left out: {', '.join(unused[:MOST_NAMES])}; {hint}"
    )


def check_shapes(name: str, mismatched: Iterable[Any]) -> None:
    """Raise ``ModelError`` if tensors in the files have other shapes than the config gives."""
    mismatches = []
    for key in mismatched:
        named = isinstance(key, tuple) and len(key) == 3
        mismatches.append(
            f"{key[0]} is {tuple(key[1])}, expected {tuple(key[2])}" if named else str(key)
        )
    if mismatches:
        raise ModelError(
            f"model {name}: {count(len(mismatches), 'tensor')} of its files have other shapes than "
            f"config.json says: {'; '.join(sorted(mismatches)[:MOST_NAMES])}. Is config.json "
            "another model's?"
        )


def check_environment() -> None:
    """Raise ``ModelError`` if this process rounds float32 products.

    The measure does not record such rounding.
    """
    for variable, exact in ROUNDING.items():
        if (value := os.environ.get(variable, "")).upper() not in exact:
            raise ModelError(
                f"{variable} is {value!r}, which rounds the inputs of float32 products: unset it, "
                "and give --dtype bfloat16 or float16 where speed is wanted"
            )
    if (precision := torch.get_float32_matmul_precision()) != "highest":
        raise ModelError(
            f"torch multiplies float32 in precision {precision!r}, expected 'highest': leave "
            "torch.set_float32_matmul_precision out"
        )
