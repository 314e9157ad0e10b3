"""Valid values of each option of a run, in tables; and the check of one value."""

from __future__ import annotations

import re
import sys
from typing import Any, NamedTuple

from afn_ray import kept, samples, token_rows
from afn_ray.errors import ConfigError
from afn_ray.schema import LANGUAGE as LANGUAGE_COLUMN

CHOICES: dict[str, tuple[str, ...]] = {
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "format": ("auto", "txt", "jsonl", "csv", "parquet", "conllu", "warc"),
    "txt_documents": ("file", "line"),
    "csv_escape": ("auto", "doubled", "backslash"),
    "device": ("auto", "cpu", "cuda"),
    "executor": ("auto", "ray", "inline"),
    "neurons_of": ("all", "high"),
    "thresholds_by": ("run", "group"),
    "duplicates": ("keep", "once", "weight"),
    "log_format": ("text", "json"),
}
"""Accepted values of each option that takes one of a fixed set."""
SERIES = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""Form of the name of a series."""
AUTO_LANGUAGE = "auto"
"""Value of ``language`` that detects the language of each document."""
LANGUAGE = re.compile(rf"{AUTO_LANGUAGE}|[A-Za-z]{{2,3}}([-_][A-Za-z0-9]{{2,8}}){{0,3}}")
"""Form of a language: a code of ISO 639, which a script or a region may follow."""
MOST_TOP_NEURONS = 256
"""Largest number of neurons to record for each token and layer."""
MOST_MEAN_VECTORS = 4096
"""Largest number of types whose mean state is recorded; the measure lists them all."""
MOST_WORKERS_PER_GPU = 48
"""Largest ``workers_per_gpu``: the processes that NVIDIA's MPS serves on one GPU."""
MOST_QUARANTINED = 5_000
"""Largest ``allow_quarantined``, in shards: run.json lists every missing shard."""


class Form(NamedTuple):
    """Form of a text."""

    pattern: re.Pattern[str]
    expected: str  # the form in words


class Need(NamedTuple):
    """A key whose value, if it is not the default, needs another key."""

    key: str
    other: str
    rule: dict[str, Any]  # what ``other`` must be: ``pattern``, ``minimum``, ``enum``; empty: given
    message: str

    def is_met_by(self, value: Any) -> bool:
        """True if ``value`` of ``other`` is as needed."""
        if value is None:
            return False
        if "pattern" in self.rule:
            return re.search(self.rule["pattern"], value) is not None
        if "enum" in self.rule:
            return value in self.rule["enum"]
        return "minimum" not in self.rule or bool(value >= self.rule["minimum"])


# ``analysis.json_schema`` describes run.toml by the following tables.
NOT_EMPTY = {
    "corpus": "name at least one file, folder or glob",
    "model": "it must be given",
    "store": "it must be given",
    "text_column": "it must be given",
    "language": "it must be given",
    "thresholds": "name a run or a store, or leave it out",
    "labels": "name the column that holds the tags, or leave it out",
    "keep_columns": "name a column, or leave it out",
    "encoding": "name one, or leave it out",
    "where": "write a condition, or leave it out",
}
"""Keys whose text must not be empty, and what to do about one that is."""
FORMS = {
    "series": Form(
        SERIES,
        "1 to 100 letters, digits, dots, hyphens or underscores, the first a letter or a digit",
    ),
    "group_by": Form(
        kept.NAME,
        f"source, {LANGUAGE_COLUMN}, one of keep_columns, or a key of the path: letters, digits, _ "
        "and -, at most 63",
    ),
    "sample": Form(samples.SHARE, samples.EXPECTED),
    "record": Form(token_rows.FORM, "all, summaries, high, or sample: and a share, as sample:0.01"),
    "language": Form(LANGUAGE, "auto, or a code of ISO 639, such as en, pt-BR or yue"),
}
"""Forms of texts, by key."""
LEAST = {
    "window_tokens": 8,
    "overlap_tokens": 0,
    "workers": 1,
    "workers_per_gpu": 1,
    "batch_tokens": 16,
    "tokenizer_workers": 0,
    "allow_quarantined": 0,
    "screen": 0,
    "top_neurons": 1,
    "shard_bytes": 1024,
    "max_document_bytes": 1,
    "near_duplicates": 0.5,
    "mean_vectors": 0,
    "limit": 1,
}
"""Smallest values of numbers, by key."""
MOST = {
    "top_neurons": MOST_TOP_NEURONS,
    "workers_per_gpu": MOST_WORKERS_PER_GPU,
    "allow_quarantined": MOST_QUARANTINED,
    "near_duplicates": 1,
    "mean_vectors": MOST_MEAN_VECTORS,
}
"""Largest values of numbers, by key."""
ABOVE = {"wait_s": 0, "shard_deadline_s": 0, "sink_factor": 1}
"""Values that numbers must exceed, by key; none is infinite."""
SCREENED = 1000
"""Number of strangest documents that are listed unless another is given."""
ADD_THRESHOLDS = (
    "measure once without this option, then add the thresholds of that run (--thresholds RUN, in a "
    "config thresholds = 'RUN')"
)
"""Advice for an option that asks which tokens are HIGH while they are measured."""
HAS_NEURONS = {"pattern": r"(^|,)\s*neurons\s*(,|$)"}
HAS_NO_NEURONS = {"pattern": r"^(?!(.*,)?\s*neurons\s*(,|$))"}
NEEDS = (
    Need(
        "top_neurons",
        "signals",
        HAS_NEURONS,
        "signals does not have neurons: add it, or leave top_neurons out",
    ),
    Need(
        "neurons_of",
        "signals",
        HAS_NEURONS,
        "signals does not have neurons: add it, or leave neurons_of out",
    ),
    Need(
        "neurons_of",
        "thresholds",
        {},
        f"what is HIGH is known before the corpus is measured only by thresholds: {ADD_THRESHOLDS}",
    ),
    Need(
        "mean_vectors",
        "duplicates",
        {"pattern": "^keep$"},
        "the states of a copy cannot be taken out of a mean again: leave duplicates out",
    ),
    Need(
        "record",
        "signals",
        HAS_NO_NEURONS,
        "signals has neurons, which are recorded for rows of tokens: leave one of the two out",
    ),
    *(
        Need(
            key,
            "record",
            {"pattern": f"^{token_rows.ALL}$"},
            f"record leaves out rows of tokens, which {why}: leave one of the two out",
        )
        for key, why in (
            ("group_by", "groups are made of"),
            ("near_duplicates", "near-copies are found in"),
            ("duplicates", "a copy's tokens are taken out of the summaries by"),
        )
    ),
    Need(
        "record",
        "screen",
        {"enum": [0, SCREENED]},
        "the scan that screen asks for reads the rows of all tokens: leave one of the two out",
    ),
    Need(
        "thresholds_by",
        "group_by",
        {},
        "group_by is not given: name what makes the groups",
    ),
    Need(
        "group_by",
        "screen",
        {"minimum": 1},
        "screen is 0, and groups come from the scan that screen asks for: give screen "
        "another number",
    ),
)
"""Keys that need others."""


def check_value(name: str, value: Any) -> None:
    """Raise ``ConfigError`` if the tables of values do not allow ``value`` for the key ``name``."""
    if value is None:
        return
    if name in NOT_EMPTY:
        texts = value if name == "corpus" else [value]
        if not texts or not all(texts):
            raise ConfigError(f"{name} is empty; {NOT_EMPTY[name]}")
    expected = None
    if name in CHOICES and value not in CHOICES[name]:
        expected = f"one of {', '.join(CHOICES[name])}"
    elif name in FORMS and not FORMS[name].pattern.fullmatch(value):
        expected = FORMS[name].expected
    elif name in LEAST and not value >= LEAST[name]:  # of nan, neither is true
        expected = f"at least {LEAST[name]}"
    elif name in MOST and value > MOST[name]:
        expected = f"at most {MOST[name]}"
    elif name in ABOVE and not ABOVE[name] < value <= sys.float_info.max:
        expected = f"a number over {ABOVE[name]}"
    if expected is not None:
        raise ConfigError(f"{name} is {value!r}; expected {expected}")
