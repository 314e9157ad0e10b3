"""The README.md of an export: what its rows are, where they come from, how to read them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import NamedTuple

import pyarrow as pa

from afn_ray import token_rows
from afn_ray.exports.formats import CSV_RULES
from afn_ray.exports.request import ExportRequest
from afn_ray.exports.writing import ExportFile
from afn_ray.query.database import Run
from afn_ray.query.no_rows import OF_TOKENS
from afn_ray.query.views import described
from afn_ray.reduce import duplicates
from afn_ray.show import provenance, run_facts
from afn_ray.show.summary import summarise
from afn_ray.text import count, printable


class AboutRun(NamedTuple):
    """Facts of the run in a card."""

    facts: Sequence[tuple[str, str]]
    command: str
    cautions: Sequence[str]
    labels: str
    """The thresholds that decide HIGH."""
    row: str
    """A row of the exported table; empty for a query."""
    left_out: Sequence[str]
    """Rows that the export cannot have, in sentences."""


def about(run: Run, request: ExportRequest) -> AboutRun:
    """Facts of the run for its card. Raises ``StoreError`` if the run is damaged."""
    summary = summarise(run)
    config = run.info["config"]
    labels = "of the run's thresholds"
    if summary.is_frozen:
        labels = f"of frozen thresholds, those of {config['thresholds']}"
    return AboutRun(
        run_facts.facts(summary),
        provenance.command_line(config),
        run_facts.cautions(summary),
        labels,
        described(request.table, token_rows.record_of(run.info["config"])) if request.table else "",
        left_out(run, request.table or str(request.sql)),
    )


def left_out(run: Run, query: str) -> list[str]:
    """Rows that ``query`` of ``run`` cannot see: of tokens that were not kept, and of copies."""
    sentences = [f"{sentence}." for sentence in run.why_some(query)]
    found = duplicates.figures_of(run.info)
    choice = duplicates.choice_of(run.info)
    view = OF_TOKENS.search(query)
    if view and found and found.documents and choice != duplicates.KEEP:
        copies, _ = duplicates.describe(found, choice)
        sentences.append(f"{view[1]}: without those of copies; {copies}.")
    return sentences


def readme(
    run: AboutRun,
    request: ExportRequest,
    schema: pa.Schema,
    files: Sequence[ExportFile],
    read: Sequence[str],
) -> str:
    """The card of an export, as Markdown; the front matter makes it a dataset of the Hub.

    ``read`` are lines that read the export.
    """
    num_rows = sum(file.rows for file in files)
    of = "the result of a query" if request.table is None else f"the table `{request.table}`"
    parts = [
        _front_matter(request) if request.format == "hf-dataset" else "",
        f"# {request.title} of an afn-ray run",
        f"{count(num_rows, 'row')} in {count(len(files), 'file')}: {of} of the run "
        f"`{request.run}`.",
        "afn-ray measures the activation strength of every token of a corpus. A token is HIGH if "
        f"its strength is at or above Q3 {_inline(run.labels)}.",
    ]
    if request.table is not None:
        parts.append(f"A row is: {run.row}.")
    else:
        parts.append(_fenced(str(request.sql)))
    parts += map(_inline, run.left_out)
    if request.baseline is not None:
        parts.append(f"The baseline is the run `{request.baseline}`.")
    parts += ["## Read it", _fenced("\n".join(read))]
    if request.format == "csv":
        parts.append(CSV_RULES)
    parts += ["## Columns", _columns(schema), "## The run"]
    parts += [_table(("", ""), run.facts), _fenced(run.command)]
    parts += ["## Know its limits"]
    cautions = [_inline(line.strip()) for line in run.cautions]
    parts.append("\n".join(f"- {caution}" for caution in cautions))
    return "\n".join(f"{part}\n" for part in parts if part)


def _front_matter(request: ExportRequest) -> str:
    """YAML for the Hub; a string of JSON is one of YAML."""
    name = json.dumps(f"{request.title} of the afn-ray run {request.run}")
    return (
        f"---\npretty_name: {name}\ntags:\n- afn-ray\nconfigs:\n- config_name: default\n"
        "  data_files:\n  - split: train\n    path: data/*.parquet\n---"
    )


def _columns(schema: pa.Schema) -> str:
    rows = []
    for field in schema:
        comment = (field.metadata or {}).get(b"doc", b"").decode()
        rows.append((field.name, str(field.type), comment))
    return _table(("column", "type", "comment"), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head)]
    for row in rows:
        lines.append([_inline(cell) for cell in row])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _inline(text: str) -> str:
    """Third-party text for a line of Markdown: shown as it is, whatever is in it."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&$!])", r"\\\1", printable(text))


def _fenced(text: str) -> str:
    """Third-party text as a block of code, which no text can end."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{printable(text, keep=chr(10))}\n{fence}"
