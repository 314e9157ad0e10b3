"""Find a model on disk or on a hub, refuse unsafe files, load the model and its tokenizer."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

from afn_ray import cgroup
from afn_ray.errors import ModelError
from afn_ray.model import parts
from afn_ray.store import disk
from afn_ray.tokens.culprits import is_of_input

# With one worker per core, more threads would only compete for it.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

DEFAULT_WINDOW_TOKENS = 2048
"""Context length in tokens of a model whose config does not give one."""
DESCRIPTION_BYTES = 256 << 20
"""Largest size of a file other than weights, in bytes.

The largest tokenizers have 35 MB, and parsing takes many times the size of a file.
"""
DESCRIPTIONS = ("*.json", "*.txt", "*.model", "merges*", "*.py", "*.tiktoken", "*.spm")
"""Patterns of files other than weights: config, tokenizer and code."""
FETCHED = ("*.safetensors", "*.gguf", "*.bin", *DESCRIPTIONS)
"""Patterns of files that are downloaded from a hub."""
IGNORED_FILES = {"data_config.json", "generation_config.json", "README.txt", "requirements.txt"}
"""Files that do not count for a model's identity, even if it has code of its own."""
POSITIONS_AFTER_PADDING = {
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "camembert",
    "mpnet",
    "longformer",
    "roberta-prelayernorm",
    "data2vec-text",
    "xmod",
    "ibert",
}
"""Model types that number positions from ``pad_token_id + 1``.

Positions below that are not usable and shorten the context.
"""

TESTED = frozenset({
    "albert", "bert", "camembert", "deberta-v2", "distilbert", "electra", "eurobert", "gemma",
    "gemma2", "gemma3", "gemma3_text", "gpt2", "gpt_neox", "llama", "minicpm", "minicpm3",
    "mistral", "modernbert", "mpnet", "nomic_bert", "opt", "phi", "phi3", "qwen2", "qwen2_moe",
    "qwen3", "roberta", "xlm-roberta",
})  # fmt: skip
"""Model types that a test compares with the plain model (``tests/model/test_families.py``)."""

ACCELERATORS = ("CUDA", "cuDNN", "CUDNN", "CUBLAS", "HIP", "NVRTC", "NVML", "device-side assert")
"""Substrings that mark error messages of GPU libraries."""

VERSIONS = {"torch": torch.__version__, "transformers": transformers.__version__}
"""Full versions of the packages that run the model."""

MAKERS = {
    package.__name__: ".".join(package.__version__.split(".")[:2])
    for package in (tokenizers, transformers)
}
"""Major and minor versions of the packages that decide tokens and the computation of blocks."""


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model on this machine's disk, with the facts from its config."""

    name: str
    folder: Path
    gguf: str | None  # file name in ``folder``
    depth: int  # number of blocks
    hidden_size: int
    model_type: str
    context_tokens: int  # longest input the model takes
    num_embeddings: int | None  # size of the embedding table; None if the config has no size
    trust_remote_code: bool
    allow_pickle: bool
    identity: dict[str, str] = field(repr=False)  # file of the config, weights or code -> SHA-256

    @property
    def weights_bytes(self) -> int:
        """Size of the files of weights, in bytes."""
        if self.gguf is not None:
            return (self.folder / self.gguf).stat().st_size
        names = [n for n in self.identity if n.endswith((".safetensors", ".bin"))]
        return sum((self.folder / name).stat().st_size for name in names)


def find_model(
    name: str,
    revision: str | None,
    *,
    trust_remote_code: bool,
    allow_pickle: bool,
    allow_untested: bool = False,
) -> ModelFiles:
    """Find the model ``name``: a folder, a GGUF file, or a hub name.

    A hub model is downloaded unless the cache has it. Raises ``ModelError`` with the reason and
    what to do: the model is not found, its weights can run code, its architecture is no encoder or
    decoder of text, or its family is not in ``TESTED`` and ``allow_untested`` is not set.
    """
    path = Path(name).expanduser()
    gguf = None
    if revision is not None and path.exists():
        raise ModelError(
            f"{name} is on this disk, and revision {revision!r} is for hub models; leave it out"
        )
    if path.is_dir():
        folder = path.resolve()
    elif path.is_file() and path.suffix == ".gguf":
        folder = path.resolve().parent
        gguf = path.name
    elif path.exists() or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ModelError(f"no model at {name}: expected a folder with config.json, or a .gguf file")
    else:
        folder = _fetch(name, revision, trust_remote_code, allow_pickle)
    parts.check_folder(name, folder)
    weights: list[str] = []
    if gguf is None:
        if not (folder / "config.json").is_file():
            raise ModelError(f"no model at {name}: {folder} has no config.json")
        _check_sizes(name, folder)
        parts.check_config(name, folder, trust_remote_code)
        weights = parts.weight_files(name, folder, allow_pickle)
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, gguf_file=gguf, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(loading_failed(name, error)) from error
    text = _text_config(name, config, allow_untested)
    num_embeddings = getattr(text, "vocab_size", None)
    return ModelFiles(
        name,
        folder,
        gguf,
        text.num_hidden_layers,
        text.hidden_size,
        str(config.model_type),
        _context_tokens(text),
        num_embeddings if isinstance(num_embeddings, int) else None,
        trust_remote_code,
        allow_pickle,
        _identity(folder, gguf, weights, trust_remote_code),
    )


def _text_config(name: str, config: Any, allow_untested: bool) -> Any:
    """The part of ``config`` that is of text.

    Raises ``ModelError`` for an architecture that cannot be measured, as ``find_model`` does.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{name} is an encoder-decoder ({config.model_type}); afn-ray measures encoders and "
            "decoders"
        )
    if config.model_type not in TESTED and not allow_untested:
        raise ModelError(
            f"{name} is of the family {config.model_type}, which has no test; --allow-untested "
            "tries it: it is still held against the plain model at load, and refused where it "
            f"differs. Tested are: {', '.join(sorted(TESTED))}"
        )
    text = config.get_text_config()
    depth = getattr(text, "num_hidden_layers", None)
    hidden = getattr(text, "hidden_size", None)
    if not isinstance(depth, int) or not isinstance(hidden, int):
        raise ModelError(
            f"{name} ({config.model_type}) does not say how many layers it has; is it a model of "
            "text?"
        )
    for key in ("num_hidden_layers", "hidden_size", "num_attention_heads"):
        value = getattr(text, key, None)
        if isinstance(value, int) and value < 1:
            raise ModelError(
                f"model {name}: config.json says {key} = {value}; expected 1 or more. Copy the "
                "model's folder again"
            )
    return text


def _fetch(name: str, revision: str | None, trust_remote_code: bool, allow_pickle: bool) -> Path:
    """Folder of the hub model ``name``, downloaded if needed. Raises ``ModelError``."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [
        p for p in FETCHED if (p != "*.py" or trust_remote_code) and (p != "*.bin" or allow_pickle)
    ]
    try:
        return Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns)
        )
    except (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OSError,
        ValueError,
    ) as error:
        raise ModelError(
            f"no model {name!r}: no such folder here, and the hub did not give it "
            f"({_reason(error)}). Give a model folder, a .gguf file or a hub name; offline, set "
            "HF_HUB_OFFLINE=1 and fill the cache beforehand"
        ) from error


def _reason(error: BaseException) -> str:
    """The first line of the message of ``error``; without one, its type."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _check_sizes(name: str, folder: Path) -> None:
    """Raise ``ModelError`` for a pipe, and a file other than weights over ``DESCRIPTION_BYTES``."""
    for path in parts.find(folder, FETCHED):
        try:
            disk.check_ends(path)
        except OSError as error:
            raise ModelError(f"{path.name} of {name} cannot be read: {error.strerror}") from error
    for path in parts.find(folder, DESCRIPTIONS):
        size = path.stat().st_size
        if size > DESCRIPTION_BYTES:
            raise ModelError(
                f"{path.name} of {name} has {size:,} bytes; expected at most {DESCRIPTION_BYTES:,}"
            )


def _context_tokens(config: Any) -> int:
    """Longest input of the model, in tokens."""
    tokens = getattr(config, "max_position_embeddings", None) or getattr(
        config, "n_positions", None
    )
    tokens = tokens if isinstance(tokens, int) and tokens > 0 else DEFAULT_WINDOW_TOKENS
    if config.model_type in POSITIONS_AFTER_PADDING:
        tokens -= (config.pad_token_id or 0) + 1
    return min(tokens, _rotary_limit(config) or tokens)


def _rotary_limit(config: Any) -> int | None:
    """Longest input in tokens for which the rotary frequencies are fixed; None if they always are.

    In some families the frequencies for longer inputs depend on the longest text of the batch, so
    a text's values would depend on its neighbours.
    """
    scaling = (
        getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    )
    if not isinstance(scaling, dict) or scaling.get("rope_type", scaling.get("type")) not in (
        "longrope",
        "dynamic",
    ):
        return None
    limit = (
        scaling.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        or getattr(config, "max_position_embeddings", None)
    )
    return limit if isinstance(limit, int) else None


def _identity(
    folder: Path, gguf: str | None, weights: Sequence[str], trust_remote_code: bool
) -> dict[str, str]:
    """SHA-256 of each file that can change a value, by name.

    Tokenizer files are left out: ``identity`` hashes the tokenizer built from them. If the model
    has code of its own, almost every file counts, because that code may read it.
    """
    if gguf is not None:
        return {"model.gguf": _sha256(folder / gguf)}
    names = {"config.json", *weights}
    if trust_remote_code:
        found = {path.name for path in parts.find(folder, DESCRIPTIONS)}
        indices = {f"{parts.SAFETENSORS}.index.json", f"{parts.PICKLED}.index.json"}
        names |= found - IGNORED_FILES - indices
    return {name: _sha256(folder / name) for name in sorted(names)}


def _sha256(path: Path) -> str:
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def loading_failed(name: str, error: BaseException) -> str:
    """Message for a model that cannot be loaded, with a hint for common causes."""
    reason = _reason(error)
    hint = ""
    if "trust_remote_code" in str(error) or "custom code" in str(error):
        hint = (
            "; it needs Python code that comes with it: --trust-remote-code runs it, if you trust "
            "where it comes from"
        )
    elif isinstance(error, ImportError):
        hint = "; install what it names (GGUF files need: pip install 'afn-ray[gguf]')"
    return f"model {name} cannot be loaded: {reason}{hint}"


def load_tokenizer(files: ModelFiles) -> tokenizers.Tokenizer:
    """The model's fast (Rust) tokenizer; the same object as long as its files stay the same.

    Raises ``ModelError`` if the model has none, or if the tokenizer does not fit the model.
    """
    return _tokenizer(files).built


def load_identified(files: ModelFiles) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """``load_tokenizer``, and everything about the model that decides the recorded values, by name.

    These are the SHA-256 of its files and of the tokenizer, and the versions in ``MAKERS``.
    """
    found = _tokenizer(files)
    return found.built, files.identity | {"tokenizer": found.digest} | MAKERS


@dataclass(frozen=True, slots=True)
class _Tokenizer:
    """A tokenizer, and the SHA-256 of its JSON as its files describe it."""

    built: tokenizers.Tokenizer
    digest: str


def _tokenizer(files: ModelFiles) -> _Tokenizer:
    if files.gguf is None and not files.trust_remote_code:
        parts.check_has_tokenizer(files.name, files.folder)
    described = {} if files.gguf else _descriptions(files.folder)
    contents = files.identity | described
    # One run asks for the tokenizer several times, and building it takes longer than reading its
    # files.
    found = _build_tokenizer(
        files.name,
        files.folder,
        files.gguf,
        files.trust_remote_code,
        files.num_embeddings,
        tuple(contents.items()),
    )
    if files.gguf is None and _descriptions(files.folder) != described:
        _build_tokenizer.cache_clear()
        raise ModelError(
            f"the files of {files.name} changed while its tokenizer was read; give the "
            "command again"
        )
    return found


def _descriptions(folder: Path) -> dict[str, str]:
    """SHA-256 of each file in ``folder`` other than weights, by name."""
    found = {path for path in parts.find(folder, DESCRIPTIONS) if path.is_file()}
    return {path.name: _sha256(path) for path in sorted(found)}


@lru_cache(1)
def _build_tokenizer(
    name: str,
    folder: Path,
    gguf: str | None,
    trust_remote_code: bool,
    num_embeddings: int | None,
    contents: tuple[tuple[str, str], ...],
) -> _Tokenizer:
    """The tokenizer of the model ``name``, checked. Raises as ``load_tokenizer``.

    ``contents``: the files that it is built from and their SHA-256, for the cache alone.
    """
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder,
            gguf_file=gguf,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
        )
    # transformers raises nearly any error for a file that it cannot use, and Rust panics.
    except BaseException as error:
        if not is_of_input(error) and not isinstance(error, OSError):
            raise
        raise ModelError(loading_failed(f"{name} (its tokenizer)", error)) from error
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{name} has no fast tokenizer (tokenizer.json); character offsets need one"
        )
    made: str = tokenizer.backend_tokenizer.to_str()
    built = tokenizers.Tokenizer.from_str(made)
    digest = hashlib.sha256(built.to_str().encode()).hexdigest()
    parts.check_tokenizer(name, built, tokenizer.unk_token_id, num_embeddings)
    return _Tokenizer(built, digest)


def is_device_fault(error: BaseException) -> bool:
    """True if ``error`` comes from an accelerator, which may be unusable afterwards."""
    kind = getattr(torch, "AcceleratorError", None)
    return (kind is not None and isinstance(error, kind)) or any(
        name in str(error) for name in ACCELERATORS
    )


def choose_device(device: str) -> str:
    """Resolve ``auto`` to "cuda" if torch sees a GPU, else to "cpu".

    Raises ``ModelError`` for "cuda" if torch sees no GPU.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError(
            "device is cuda, but torch sees no GPU here; use --device cpu, or a CUDA build of torch"
        )
    return device


def count_devices(device: str) -> int:
    """Number of GPUs for "cuda"; otherwise the number of CPU cores that this process may use."""
    return torch.cuda.device_count() if device == "cuda" else cgroup.num_cores()
