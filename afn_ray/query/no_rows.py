"""Possible reasons why a query has no rows, or not all, found from its text."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from afn_ray import token_rows
from afn_ray.query.views import VIEWS
from afn_ray.run_info import RunInfo

if TYPE_CHECKING:
    from afn_ray.query.database import Run

EMPTY_BY_DESIGN = (
    "signals", "signal_vocabulary", "token_neurons", "neurons", "neuron_types", "sources",
    "screened", "movers", "drift", "class_drift", "kept", "groups", "group_classes", "group_drift",
    "group_class_drift", "group_movers", "strange", "copied", "salience", "word_vocabulary",
    "languages", "moments", "mean_vectors", "word_salience", "word_movers",
)  # fmt: skip
"""Views that may be empty; their descriptions say when."""
SCREENED = (
    "sources", "screened", "strange", "copied", "salience", "word_salience", "word_vocabulary",
    "word_movers",
)  # fmt: skip
"""Those of them that come from the scan of ``screen``, which needs the rows of all tokens."""

OF_TOKENS = re.compile(r"\b(tokens|words|kwic|classes|document_text)\b")
"""Views and macros that are made of the rows of tokens."""


def why_some_rows(info: RunInfo, query: str) -> list[str]:
    """Reason why ``query`` sees rows of some tokens alone; ``info`` is the run's run.json."""
    record = token_rows.record_of(info["config"])
    if token_rows.is_complete(record) or not (found := OF_TOKENS.search(query)):
        return []
    return [f"{found[1]}: the run recorded {token_rows.describe(record)}"]


def why_no_rows(run: Run, query: str) -> list[str]:
    """Possible reasons why ``query`` has no rows of ``run``."""
    notes = []
    for view in EMPTY_BY_DESIGN:
        if re.search(rf"\b{view}\b", query) and not _has_rows(run, view):
            notes.append(f"{view}: {_why_empty(run.info, view)}")
    layers = run.info["layers"]
    asked_layers = {int(k) for k in re.findall(r"\blayer\s*=\s*(\d{1,9})\b", query)}
    missing_layers = sorted(asked_layers - set(layers))
    if missing_layers:
        recorded = ", ".join(map(str, layers))
        notes.append(f"layer {missing_layers[0]} was not recorded; the run has {recorded}")
    asked_classes = re.findall(r"\bclass\s*=\s*'([^']*)'", query)
    if asked_classes and "classes" not in query:
        classes = _classes(run)
        unknown = [name for name in asked_classes if name not in classes]
        if unknown:
            notes.append(f"no type is of class {unknown[0]!r}; the run has {', '.join(classes)}")
    if (note := _about_kwic(query)) is not None:
        notes.append(note)
    return notes


def _why_empty(info: RunInfo, view: str) -> str:
    """Reason why the view is empty, or the description that says when it is."""
    record = token_rows.record_of(info["config"])
    if view not in SCREENED or token_rows.is_complete(record):
        return VIEWS[view]
    return (
        f"empty, since --record {record} leaves out the screening; give the afn run command "
        "without --record to have it"
    )


def _about_kwic(query: str) -> str | None:
    """Reason why ``kwic`` found nothing, if ``query`` calls it."""
    if found := re.search(r"\bkwic\(\s*'((?:[^']|'')*\S\s+\S(?:[^']|'')*)'", query):
        return (
            f"kwic takes one word, and {found[1]!r} is several: ask for one and filter by its "
            "context"
        )
    if found := re.search(r"\bkwic\(\s*'((?:[^']|'')*)'", query):
        return (
            f"no word is {found[1]!r}, in upper or lower case, or the rest of the query leaves no "
            "row"
        )
    return None


def _classes(run: Run) -> list[str]:
    """The classes of the run's types, then those that only a baseline has."""
    here = run.sql("SELECT DISTINCT class FROM vocabulary ORDER BY class").fetchall()
    either = run.sql("SELECT DISTINCT class FROM class_drift").fetchall()
    return list(dict.fromkeys(name for (name,) in [*here, *either]))


def _has_rows(run: Run, view: str) -> bool:
    return bool(run.sql(f"SELECT 1 FROM {view} LIMIT 1").fetchall())  # noqa: S608 - a name of ours
