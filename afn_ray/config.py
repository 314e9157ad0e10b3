"""RunConfig: every option of a run, with its default, and the checks of several together."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from fractions import Fraction
from typing import Any, get_type_hints

from afn_ray import conditions, kept, samples, text_encodings, token_rows
from afn_ray.corpus_values import ReadOptions
from afn_ray.errors import ConfigError
from afn_ray.option_rules import ADD_THRESHOLDS, AUTO_LANGUAGE, NEEDS, SCREENED, check_value
from afn_ray.schema import LANGUAGE as LANGUAGE_COLUMN
from afn_ray.schema import STRENGTH

BUILT_IN_SIGNALS = (
    "strength",
    "shift",
    "centred",
    "trimmed",
    "centred_mean",
    "attention",
    "neurons",
)
"""Names of the signals that afn-ray brings."""
SIGNAL_GROUP = "afn_ray.signals"
"""Entry-point group for signals of other packages: ``name = "package.module:Class"``."""
SIGNAL = re.compile(r"[a-z][a-z_]*")
"""Form of a signal's name."""
LAYER = re.compile(r"-?[0-9]{1,9}(/[0-9]{1,9}|\.[0-9]{1,9})?")
"""Form of one entry of ``layers``: a block number, or a share of the depth."""
TOP_NEURONS = 8
"""Default number of neurons to record for each token and layer."""
MOST_CORPUS_BYTES = 8 << 20
"""Largest ``corpus`` as JSON, in bytes; every plan.parquet and run.json stores it."""
ANY_DEPTH = 10_000
"""Depth assumed while the model is unknown, in blocks; no model is deeper."""


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """One run: a corpus, a model, a store, and all options.

    ``afn run --help`` prints the ``help`` of each field. Raises ``ConfigError`` with the field's
    name, the value that it has and the values that it may have.
    """

    corpus: tuple[str, ...] = field(
        metadata={"help": "files, folders or globs to measure; paths or fsspec URLs"}
    )
    model: str = field(
        metadata={"help": "model folder, GGUF file, or name on the Hugging Face hub"}
    )
    store: str = field(metadata={"help": "folder or bucket prefix in which the results are stored"})
    layers: str = _option(
        "0,2/3",
        "layers to record: 8, 2/3 (of the depth), 4,8,12 or all; layer 0 is the embeddings, a "
        "control",
    )
    signals: str = _option(
        "strength", "signals to record beside strength, with commas between: shift,attention"
    )
    top_neurons: int = _option(
        TOP_NEURONS, "neurons to record per token: those furthest from 0, 5 bytes each"
    )
    neurons_of: str = _option(
        "all",
        "tokens whose neurons are recorded: all, or high (those HIGH by --thresholds, which must "
        "be given)",
    )
    mean_vectors: int = _option(
        0,
        "most frequent types whose mean state is recorded at every layer, which splits their "
        "second moment into mean and variance; 0: none",
    )
    revision: str | None = _option(
        None, "revision of a hub model; name one for nightly runs, so that the model stays the same"
    )
    dtype: str = _option(
        "auto",
        "number type of the matrix products; auto: half precision if a calibration finds it safe, "
        "else float32",
    )
    window_tokens: int | None = _option(
        None, "tokens that the model reads at once; default: the model's context, at most 2048"
    )
    overlap_tokens: int | None = _option(
        None, "tokens that neighbouring windows share; default: a quarter of a window"
    )
    text_column: str = _option(
        "text", "column of the text (JSONL, CSV, Parquet); nested: meta.text"
    )
    id_column: str | None = _option(
        None, "column that holds the document id; default: a content hash"
    )
    keep_columns: str | None = _option(
        None,
        "columns to carry into documents (JSONL, CSV, Parquet), with commas between, each with a "
        "type if it is not a string: lang,meta.year:int64",
    )
    labels: str | None = _option(
        None,
        "column that holds the tags of a labelled corpus (JSONL, Parquet); for CoNLL-U upos or "
        "xpos, default: upos",
    )
    format: str = _option("auto", "format of the files; auto: each file's ending decides")
    txt_documents: str = _option("file", "what one document is: a .txt file, or a line of it")
    csv_escape: str = _option(
        "auto",
        "how CSV files write a quote within quotes; auto: doubled, and doubtful rows are "
        "quarantined",
    )
    encoding: str | None = _option(
        None,
        "encoding of the files (all but Parquet): latin-1, cp1251, shift-jis, gb18030 ...; "
        "default: UTF-8, or UTF-16 and UTF-32 with their byte order mark",
    )
    limit: int | None = _option(
        None, "number of documents to measure: the first ones of the corpus, or of those selected"
    )
    sample: str | None = _option(
        None,
        "share of the documents to measure, 1% or 0.01, drawn by their ids: the same ones in every "
        "run",
    )
    where: str | None = _option(
        None,
        "condition on keep_columns that documents to measure meet, as in SQL: lang = 'de' AND year "
        ">= 2020",
    )
    record: str = _option(
        token_rows.ALL,
        "tokens whose rows are kept beside the summaries. all: every token. summaries: no token. "
        "high: tokens that are HIGH by --thresholds. sample:0.01: the tokens of a sample of the "
        "documents",
    )
    offsets: bool = _option(True, "record where each token is in its text, about 1 byte per token")
    language: str = _option(
        AUTO_LANGUAGE,
        "language whose closed-class words are function words (ISO 639-1, such as en); auto: that "
        "of each document, detected",
    )
    sink_factor: float = _option(
        10.0, "a token is a sink if its strength is over this many medians"
    )
    thresholds: str | None = _option(
        None,
        "run whose thresholds decide what is HIGH, or a store for its latest run; default: this "
        "run's own",
    )
    screen: int = _option(
        SCREENED,
        "number of strangest documents to list, found in one more scan of the records; 0: no scan",
    )
    group_by: str | None = _option(
        None,
        "how documents are grouped, for thresholds, classes and drift by group: a kept column, "
        f"source, {LANGUAGE_COLUMN}, or a key of the path as in /lang=de/",
    )
    thresholds_by: str = _option(
        "run",
        "thresholds that decide what is HIGH. run: those of the whole corpus. group: also those of "
        "each group of --group-by, in labels of their own",
    )
    duplicates: str = _option(
        "keep",
        "which of several documents with one text count. keep: all. once: the first. weight: one "
        "that is drawn, each with the same chance",
    )
    near_duplicates: float | None = _option(
        None,
        "least similarity, 0.5 to 1, at which a document is a near-copy of an earlier one: the "
        "word 5-grams that both have, divided by those that either has; default: near-copies are "
        "not looked for",
    )
    max_document_bytes: int = _option(
        8 << 20, "largest document, in bytes; larger ones are quarantined"
    )
    shard_bytes: int | None = _option(
        None,
        "corpus bytes in one shard, the unit of work and retry; default: a 64th of the corpus, "
        "rounded up to a power of 4, from 64 KiB to 16 MiB",
    )
    batch_tokens: int | None = _option(
        None,
        "tokens in one forward pass, filler included; default: 2048, on GPUs 32768; it may change "
        "the last bit of a strength",
    )
    tokenizer_workers: int | None = _option(
        None,
        "tokenizer processes per worker, each on its own CPU; 0: a thread of the worker; default: "
        "0, but with Ray on GPUs the CPUs of a node divided by its workers, less the worker's own, "
        "at most 15",
    )
    workers: int | None = _option(
        None, "workers; default: one per GPU (or --workers-per-gpu), else one per CPU"
    )
    workers_per_gpu: int = _option(
        1, "workers that share a GPU, each with its share of the memory; needs Ray"
    )
    device: str = _option("auto", "device of the workers; auto: GPUs if there are any, else CPUs")
    executor: str = _option(
        "auto",
        "where the work runs: ray, or inline (this process); auto: inline below 1 MiB to read",
    )
    address: str | None = _option(
        None, "address of the Ray cluster; default: RAY_ADDRESS, else a Ray on this machine"
    )
    wait_s: float = _option(
        1800.0, "seconds without any worker after which the run stops (exit 75); it can resume"
    )
    shard_deadline_s: float | None = _option(
        None,
        "seconds after which a shard counts as hung; default: from its size and the slowest shard "
        "so far",
    )
    allow_quarantined: int = _option(0, "number of failed shards that a complete run may lack")
    scratch: str | None = _option(
        None, "local folder for unfinished files; default: the system's temporary folder"
    )
    log_format: str = _option(
        "text", "format of the log on stderr and of the workers' logs; json: one object per line"
    )
    trust_remote_code: bool = _option(False, "allow Python code that comes with the model to run")
    allow_pickle: bool = _option(
        False, "allow pickled weights, which can run code, if the model has no safetensors"
    )
    allow_untested: bool = _option(False, "allow a model of a family that afn-ray does not test")
    series: str | None = _option(
        None,
        "name of the series that the run belongs to, whose earlier runs an audit compares with; "
        "default: from the store and the corpus, with dates replaced",
    )
    allow_another_measure: bool = _option(False, "allow a second measure in a store that has one")
    allow_open_cluster: bool = _option(
        False, "allow a Ray without a token: everyone who reaches it can run code on it"
    )

    def __post_init__(self) -> None:
        for f in fields(self):
            _check_type(f.name, getattr(self, f.name))
        for name in HINTS:
            check_value(name, getattr(self, name))
        if (num_bytes := len(json.dumps(self.corpus))) > MOST_CORPUS_BYTES:
            raise ConfigError(
                f"corpus names {len(self.corpus):,} places in {num_bytes:,} bytes; expected at "
                f"most {MOST_CORPUS_BYTES:,}: name folders or globs that hold the files"
            )
        # 10 and 10.0 describe the same run.
        object.__setattr__(self, "sink_factor", float(self.sink_factor))
        object.__setattr__(self, "signals", ",".join(signal_names(self.signals)))
        self._check_kept()
        self._check_encoding()
        self._check_selection()
        self._check_record()
        for need in NEEDS:
            is_default = getattr(self, need.key) == DEFAULTS[need.key]
            if not is_default and not need.is_met_by(getattr(self, need.other)):
                raise ConfigError(f"{need.key} is {getattr(self, need.key)!r}, but {need.message}")
        if not token_rows.is_complete(self.record):
            object.__setattr__(self, "screen", 0)  # the scan reads the rows of all tokens
        # This checks the form alone; the depth is checked once the model is known.
        resolve_layers(self.layers, ANY_DEPTH)

    def _check_kept(self) -> None:
        """Raise ``ConfigError`` for kept columns that cannot be; write them in canonical form."""
        if self.keep_columns is None:
            return
        columns = kept.parse(self.keep_columns, is_new=True)
        if self.text_column in [column.path for column in columns]:
            raise ConfigError(
                f"keep_columns has {self.text_column!r}, the text column; texts are not kept"
            )
        object.__setattr__(self, "keep_columns", kept.canonical(columns))

    def _check_encoding(self) -> None:
        """Raise ``ConfigError`` for an encoding that cannot be read; write
        it as Python names it.
        """
        if self.encoding is None:
            return
        try:
            name = text_encodings.canonical(self.encoding)
        except ValueError as error:
            raise ConfigError(
                f"encoding is {self.encoding!r}; expected one that Python knows and that has ASCII "
                "in it, such as latin-1, cp1251 or gb18030; UTF-16 and UTF-32 are read by their "
                "byte order mark, without this option"
            ) from error
        object.__setattr__(self, "encoding", name or None)

    def _check_selection(self) -> None:
        """Raise ``ConfigError`` for a selection that cannot be; write it in canonical form."""
        if self.sample is not None:
            object.__setattr__(self, "sample", samples.canonical(self.sample))
        if self.where is not None:
            condition = conditions.parse(self.where, kept.parse(self.keep_columns or ""))
            object.__setattr__(self, "where", str(condition))

    def _check_record(self) -> None:
        """Raise ``ConfigError`` for rows that are not known; write them in canonical form."""
        object.__setattr__(self, "record", token_rows.canonical(self.record))
        if self.record == token_rows.HIGH and self.thresholds is None:
            raise ConfigError(
                "record is 'high', but what is HIGH is known before the corpus is measured only by "
                f"thresholds: {ADD_THRESHOLDS}, or ask for --record sample:1%"
            )

    @classmethod
    def of_stored(cls, values: Mapping[str, Any]) -> RunConfig:
        """The config of a stored run, whose kept columns may have ``kept.NEWLY_RESERVED`` names."""
        without = {"keep_columns": None, "where": None}
        config = cls(**{**values, "corpus": tuple(values["corpus"]), **without})
        if (spec := values.get("keep_columns")) is not None:
            object.__setattr__(config, "keep_columns", kept.canonical(kept.parse(spec)))
        object.__setattr__(config, "where", values.get("where"))
        return config

    @property
    def read_options(self) -> ReadOptions:
        """Options that decide how bytes become documents."""
        return ReadOptions(
            self.format,
            self.text_column,
            self.id_column,
            self.txt_documents,
            self.max_document_bytes,
            self.labels,
            self.csv_escape,
            self.keep_columns or "",
            self.encoding or "",
            self.sample or "",
            self.where or "",
        )


HINTS: dict[str, Any] = get_type_hints(RunConfig)
"""Type of each field of ``RunConfig``."""


DEFAULTS: dict[str, Any] = {f.name: f.default for f in fields(RunConfig)}
"""Default of each field of ``RunConfig``; ``MISSING`` for those that must be given."""


def _check_type(name: str, value: object) -> None:
    hint = HINTS[name]
    if name == "corpus":
        ok = isinstance(value, tuple) and all(isinstance(v, str) for v in value)
    elif hint is float or hint == float | None:
        ok = (isinstance(value, int | float) and not isinstance(value, bool)) or (
            value is None and hint is not float
        )
    elif hint is int or hint == int | None:
        ok = (isinstance(value, int) and not isinstance(value, bool)) or (
            value is None and hint is not int
        )
    else:
        ok = isinstance(value, hint)
    if not ok:
        expected = "a list of strings" if name == "corpus" else getattr(hint, "__name__", str(hint))
        raise ConfigError(f"{name} is {value!r} ({type(value).__name__}); expected {expected}")


def signal_names(spec: str) -> tuple[str, ...]:
    """Signals in ``spec``, each once: strength first, since labels use it, then the others by name.

    Raises ``ConfigError`` for an entry that is not a name.
    """
    names = {name.strip() for name in spec.split(",")}
    if bad := sorted(n for n in names if not SIGNAL.fullmatch(n)):
        raise ConfigError(
            f"signals has {bad[0]!r}; expected names with commas between, as in strength,shift"
        )
    return (STRENGTH, *sorted(names - {STRENGTH}))


def resolve_layers(spec: str, depth: int) -> tuple[int, ...]:
    """Layers that ``spec`` names in a model of ``depth`` blocks, ascending, without repeats.

    A fraction is rounded to the nearest block (2/3 of 12 is 8). ``all`` is 0 to ``depth``; 0 is the
    embeddings. Raises ``ConfigError`` for an entry that is not a layer of the model.
    """
    if spec.strip() == "all":
        return tuple(range(depth + 1))
    layers: set[int] = set()
    for part in spec.split(","):
        try:
            # Fraction alone also accepts exponents, even 1e999999999.
            if not LAYER.fullmatch(part.strip()):
                raise ValueError
            value = Fraction(part.strip())
        except (ValueError, ZeroDivisionError):
            raise ConfigError(
                f"layers is {spec!r}; expected numbers, fractions of the depth or 'all', as in 8, "
                "2/3 or 0,4,8"
            ) from None
        is_share = "/" in part or "." in part
        layer = int(value * depth + Fraction(1, 2)) if is_share else int(value)
        if not 0 <= layer <= depth or (is_share and not 0 <= value <= 1):
            has = f"; the model has layers 0 (embeddings) to {depth}" if depth < ANY_DEPTH else ""
            raise ConfigError(f"layer {part.strip()} does not exist{has}")
        layers.add(layer)
    return tuple(sorted(layers))
