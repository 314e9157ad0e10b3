"""One shard from start to finish: read, encode, measure, record, commit. Knows nothing of Ray."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from afn_ray import corpus, manifest, model, records, tokens
from afn_ray.config import RunConfig, resolve_layers
from afn_ray.errors import ConfigError, ModelError
from afn_ray.schema import SCHEMA_VERSION, SPECIAL, Document, Shard, fingerprint, strength_column
from afn_ray.signals import Strength
from afn_ray.thresholds import Summary, round_strengths

CHUNK_BYTES = 1 << 20
"""Text encoded and sorted together: 1 MiB is about 250,000 tokens, enough for 1 % of padding."""

PROBES = ("A", "The quick brown fox jumps over the lazy dog.", "Strength is a norm; a norm is not a meaning, yet.")


@dataclass(frozen=True, slots=True)
class Task:
    """All that a worker must know to process shards of one run; small, and safe to pickle."""

    config: RunConfig
    layers: tuple[int, ...]
    dtype: str
    device: str
    measure_id: str
    identity: dict[str, str]  # of the model's files


@dataclass(slots=True)
class Progress:
    """What a worker has done so far; counts only grow."""

    documents: int = 0
    tokens: int = 0
    forward_tokens: int = 0  # with padding and overlaps


def prepare(config: RunConfig, device: str) -> tuple[Task, dict[str, Any], model.ModelFiles]:
    """The task of ``config``, its measure (everything that changes a value) and the model's files.

    ``device``: "cpu" or "cuda", of the workers. Raises ``ModelError`` or ``ConfigError``.
    """
    files = find_model(config)
    layers = resolve_layers(config.layers, files.depth)
    dtype = config.dtype if config.dtype != "auto" else "bfloat16" if device == "cuda" else "float32"
    window = config.window_tokens or min(files.context_tokens, model.DEFAULT_WINDOW_TOKENS)
    if window > files.context_tokens:
        raise ModelError(f"window_tokens is {window}, but {files.name} takes at most {files.context_tokens}")
    encoder = tokens.TextEncoder(*model.load_tokenizer(files))
    _, overlap = tokens.window_sizes(window, config.overlap_tokens, encoder.template)
    measure = {
        "schema_version": SCHEMA_VERSION, "model": files.identity, "model_type": files.model_type,
        "layers": list(layers), "signals": [Strength.name], "dtype": dtype,
        "window_tokens": window, "overlap_tokens": overlap, "offsets": config.offsets,
    }  # fmt: skip
    return Task(config, layers, dtype, device, fingerprint(measure), files.identity), measure, files


def find_model(config: RunConfig) -> model.ModelFiles:
    """The files of the config's model on this machine."""
    return model.find_model(
        config.model, config.revision, trust_remote_code=config.trust_remote_code, allow_pickle=config.allow_pickle
    )


def vocabulary_texts(files: model.ModelFiles) -> tuple[list[str], list[str]]:
    """The vocabulary by token id: as the tokenizer writes it, and as a reader does."""
    return tokens.TextEncoder(*model.load_tokenizer(files)).texts()


class Processor:
    """A loaded model and tokenizer that turn shards into commits, one after the other."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.progress = Progress()
        sweep_scratch(task.config)
        config = task.config
        files = find_model(config)
        if files.identity != task.identity:
            differing = sorted(
                k for k in {*files.identity, *task.identity} if files.identity.get(k) != task.identity.get(k)
            )
            raise ModelError(
                f"model {config.model} differs on this worker from the one planned: {', '.join(differing)}"
            )
        self.encoder = tokens.TextEncoder(*model.load_tokenizer(files))
        window = config.window_tokens or min(files.context_tokens, model.DEFAULT_WINDOW_TOKENS)
        self.width, self.overlap = tokens.window_sizes(window, config.overlap_tokens, self.encoder.template)
        self.pieces, self.readable = self.encoder.texts()
        self.model = model.Model(files, task.layers, task.dtype, task.device, config.batch_tokens)
        probes = self.encoder.encode(PROBES)
        ids = [probes.token_ids[a:b].tolist()[:window] for a, b in zip(probes.bounds, probes.bounds[1:], strict=False)]
        self.model.prepare([i for i in ids if len(i) > 2], Strength.measure)

    def process(self, shard: Shard) -> manifest.Commit:
        """Measure every token of ``shard`` and commit it; returns the winner's commit, ours or a rival's.

        Raises ``Interrupted`` for a full disk or a corpus that changed, ``StoreError`` for a store that fails.
        """
        began = time.monotonic()
        config, layers = self.task.config, self.task.layers
        counts = dict.fromkeys(
            ("documents", "empty", "quarantined", "tokens", "special", "windows", "forward_tokens", "chars"), 0
        )
        summary = Summary(layers)
        documents = (d for piece in shard.slices for d in corpus.read(piece, config.read_options))
        with _scratch_folder(config) as folder:
            with records.ShardFiles(folder, layers, config.offsets) as files:
                for chunk in _chunks(documents):
                    self._record(chunk, files, summary, counts)
                files.write_summary(summary.tables())
            made_by = {"device": self.task.device, **model.VERSIONS}
            return manifest.publish(
                config.store, self.task.measure_id, shard, uuid.uuid4().hex[:16], files.tables(), counts,
                round(time.monotonic() - began, 3), made_by,
            )  # fmt: skip

    def measure(self, texts: list[str], replaced: list[bool]) -> Measured:
        """Strengths of every token of ``texts``, which are encoded, cut into windows and batched together."""
        encoded = self.encoder.encode(texts, replaced)
        windows = tokens.make_windows(encoded, self.encoder.template, self.width, self.overlap, self.model.causal)
        assert sum(w.keep_end - w.keep_start for w in windows) == len(encoded.token_ids), "every token once"
        strengths = np.full((len(self.task.layers), len(encoded.token_ids)), np.nan, np.float32)
        for batch in tokens.make_batches(windows, self.task.config.batch_tokens):
            ids, mask = tokens.batch_inputs(batch, encoded, self.encoder)
            tokens.scatter(batch, self.model.measure(ids, mask, Strength.measure), strengths)
            self.progress.forward_tokens += ids.size
            self.progress.tokens += sum(w.keep_end - w.keep_start for w in batch)
        return Measured(encoded, windows, round_strengths(strengths))

    def _record(
        self, chunk: list[Document], files: records.ShardFiles, summary: Summary, counts: dict[str, int]
    ) -> None:
        """Measure one chunk of documents, write its rows and add it to the summary."""
        before = self.progress.forward_tokens
        layers, first_doc = self.task.layers, counts["documents"]
        texts = [d.text for d in chunk]
        measured = self.measure(texts, [d.num_replaced > 0 for d in chunk])
        encoded, strengths = measured.encoded, measured.strengths
        n_tokens = np.diff(encoded.bounds)
        bad = np.zeros(len(chunk), bool)
        bad[encoded.docs[~np.isfinite(strengths).all(axis=0)]] = True
        status = [
            f"quarantined: {d.problem}" if d.problem is not None
            else "quarantined: the model gave a strength that is not finite" if bad[i]
            else "ok" if n_tokens[i] else "empty"
            for i, d in enumerate(chunk)
        ]  # fmt: skip
        keep = ~bad[encoded.docs]
        n_tokens = np.where(bad, 0, n_tokens)
        n_windows = np.bincount(
            np.searchsorted(encoded.bounds, [w.row for w in measured.windows], side="right") - 1, minlength=len(chunk)
        )
        by_layer = {layer: strengths[at] for at, layer in enumerate(layers)}
        docs, flags = encoded.docs + np.int32(first_doc), encoded.flags
        surfaces = tokens.surfaces(encoded, texts, self.readable)
        table = records.make_table(
            {
                "doc": docs, "position": encoded.positions, "token_id": encoded.token_ids, "flags": flags,
                "surface": surfaces, "start": encoded.start, "end": encoded.end,
                **{strength_column(layer): values for layer, values in by_layer.items()},
            },
            files.tokens.schema,
        )  # fmt: skip
        if bad.any():
            table = table.filter(pa.array(keep))
        files.tokens.write(table)
        summary.add(docs[keep], encoded.token_ids[keep], flags[keep], {k: v[keep] for k, v in by_layer.items()})
        files.documents.write(
            records.make_table(
                {
                    "doc": np.arange(first_doc, first_doc + len(chunk)),
                    "doc_id": [d.doc_id for d in chunk],
                    "source": [d.source for d in chunk],
                    "offset": [d.offset for d in chunk],
                    "n_tokens": n_tokens,
                    "n_windows": n_windows,
                    "n_chars": [len(d.text) for d in chunk],
                    "n_replaced": [d.num_replaced for d in chunk],
                    "text_sha256": [
                        None if d.problem is not None else hashlib.sha256(d.text.encode()).digest() for d in chunk
                    ],
                    "status": status,
                    **{
                        f"mean_{strength_column(layer)}": _document_means(encoded, flags, values, n_tokens)
                        for layer, values in by_layer.items()
                    },
                },
                files.documents.schema,
            )
        )
        for name, value in (
            ("documents", len(chunk)), ("empty", status.count("empty")), ("tokens", int(keep.sum())),
            ("quarantined", sum(s.startswith("quarantined") for s in status)),
            ("special", int((flags[keep] & SPECIAL).sum())), ("windows", len(measured.windows)),
            ("forward_tokens", self.progress.forward_tokens - before), ("chars", sum(map(len, texts))),
        ):  # fmt: skip
            counts[name] += value
        self.progress.documents += len(chunk)


@dataclass(frozen=True, slots=True)
class Measured:
    """Tokens of some documents, their windows, and their rounded strengths [n_layers, n_tokens]."""

    encoded: tokens.Encoded
    windows: list[tokens.Window]
    strengths: npt.NDArray[np.float32]


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Whole documents, together about ``CHUNK_BYTES`` of text: a function of the shard alone."""
    chunk: list[Document] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document.text) + 64
        if size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _document_means(
    encoded: tokens.Encoded,
    flags: npt.NDArray[np.uint8],
    values: npt.NDArray[np.float32],
    n_tokens: npt.NDArray[np.int64],
) -> pa.Array:
    """Mean strength of each document's tokens, special ones apart; null where there are none."""
    counted = (flags & SPECIAL) == 0
    weights = counted.astype(np.float64)
    n = np.bincount(encoded.docs, weights, len(n_tokens))
    total = np.bincount(encoded.docs, np.where(counted, values, 0).astype(np.float64), len(n_tokens))
    none = (n == 0) | (n_tokens == 0)
    return pa.array((total / np.where(none, 1, n)).astype(np.float32), mask=none)


SCRATCH_PREFIX = "afn-scratch-"


@contextmanager
def _scratch_folder(config: RunConfig) -> Iterator[Path]:
    """A folder for one attempt's unfinished files, locked while its owner lives."""
    try:
        if config.scratch is not None:
            Path(config.scratch).mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX, dir=config.scratch)
    except OSError as error:
        raise ConfigError(f"scratch folder {config.scratch or tempfile.gettempdir()}: {error.strerror}") from error
    with folder as name, (Path(name) / "new-lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        Path(lock.name).rename(Path(name) / "lock")  # seen only once it is held
        yield Path(name)


def sweep_scratch(config: RunConfig) -> None:
    """Remove what killed workers left on this machine: scratch folders whose lock nobody holds."""
    for lock in Path(config.scratch or tempfile.gettempdir()).glob(f"{SCRATCH_PREFIX}*/lock"):
        with contextlib.suppress(OSError), lock.open() as file:  # held, gone, or somebody else's
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent)
