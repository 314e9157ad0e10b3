"""Frozen surfaces: what users' scripts, SQL and stored data rely on changes only on purpose.

After a change on purpose: ``AFN_FREEZE=1 python -m pytest tests/test_surface.py``, and look at the
difference.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest

import afn_ray
import warm_workers
from afn_ray import schema
from afn_ray.analysis import audit, claims, explanation, neuron_questions
from afn_ray.columns import comments_of
from afn_ray.config import HINTS, RunConfig
from afn_ray.exports import export
from afn_ray.query import views
from afn_ray.runs import status
from afn_ray.show import beyond, card, diagnosis, summary
from afn_ray.store import garbage
from conftest import command_parsers

FROZEN = Path(__file__).parent / "frozen"


def check(name: str, value: Any) -> None:
    path = FROZEN / f"{name}.json"
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    if os.environ.get("AFN_FREEZE"):
        path.write_text(text, "utf-8")
    assert json.loads(text) == json.loads(path.read_text("utf-8"))


def columns(arrow: Any) -> list[str]:
    """Name, type and nullability of each column; no column, nested ones included, has metadata."""
    assert "metadata --" not in arrow.to_string(show_field_metadata=True, show_schema_metadata=True)
    return [str(field) for field in arrow]


def test_public_names_are_as_frozen() -> None:
    check("names", sorted(afn_ray.__all__))
    assert all(getattr(afn_ray, name) is not None for name in afn_ray.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        afn_ray.nothing  # noqa: B018


def test_tables_of_the_python_api_are_as_frozen() -> None:
    """Columns of the Arrow tables that results have and no store has."""
    tables = {
        "Audit.table": audit.RULES,
        "Card.table": card.LAYER_FIGURES,
        "Claims.table": claims.FIGURES,
        "Diagnosis.table": diagnosis.CHECKS,
        "Explanation.table": explanation.TOKENS,
        "Explanation.word_table": explanation.WORDS,
        "Exported.table": export.FILES,
        "Garbage.table": garbage.FOLDERS,
        "NeuronUses.table": neuron_questions.CONTEXT_COLUMNS,
        "Rankings.table": beyond.RANKED,
        "RunSummary.classes": summary.CLASS_SHARES,
        "RunSummary.table": summary.LAYERS,
        "SelectiveNeurons.table": neuron_questions.NEURON_COLUMNS,
        "Statuses.table": status.TABLE,
        "WordNeurons.table": neuron_questions.WORD_COLUMNS,
    }
    check("tables", {name: columns(arrow) for name, arrow in tables.items()})


def test_arrow_schemas_are_as_frozen() -> None:
    found = {
        name.lower(): columns(getattr(schema, name))
        for name in dir(schema)
        if name.endswith("_SCHEMA")
    }
    found["tokens"] = columns(schema.tokens_schema(schema.strengths([4, 8]), offsets=True))
    found["tokens_without_offsets"] = columns(
        schema.tokens_schema(schema.strengths([8]), offsets=False)
    )
    found["tokens_tagged"] = columns(schema.tokens_schema([], offsets=True, tagged=True))
    found["token_neurons"] = columns(schema.token_neurons_schema([4, 8]))
    found["documents"] = columns(schema.documents_schema(schema.strengths([4, 8])))
    found["documents_detected"] = columns(schema.documents_schema([], detected=True))
    check("schemas", {"version": schema.SCHEMA_VERSION, **found})


def test_comments_are_of_columns_that_their_schema_has() -> None:
    schemas = [getattr(schema, name) for name in dir(schema) if name.endswith("_SCHEMA")]
    commented = [arrow for arrow in schemas if comments_of(arrow)]
    assert len(commented) > 20
    assert all(comments_of(arrow).keys() <= {*arrow.names} for arrow in commented)
    assert schema.DOCUMENT_COMMENTS.keys() <= {*schema.documents_schema([], detected=True).names}
    assert comments_of(schema.KEPT_SCHEMA)["n"] == "documents with a value"
    assert comments_of(schema.SOURCES_SCHEMA)["n"] == "tokens, special ones apart"


def test_config_keys_and_defaults_are_as_frozen() -> None:
    check(
        "config",
        {
            f.name: [str(HINTS[f.name]), None if f.default is MISSING else f.default]
            for f in fields(RunConfig)
        },
    )


def test_flags_defaults_and_choices_are_as_frozen() -> None:
    found = {
        name: [
            {
                "flags": a.option_strings or a.metavar,
                "default": None if a.default in (None, argparse.SUPPRESS) else str(a.default),
                "choices": list(a.choices) if a.choices else None,
            }
            for a in parser._actions
        ]
        for name, parser in command_parsers().items()
    }
    check("cli", found)


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["run"],
        ["schema"],
        ["status"],
        ["show"],
        ["compare"],
        ["audit"],
        ["sql"],
        ["explain"],
        ["report"],
        ["verify"],
        ["gc"],
        ["doctor"],
        ["demo"],
    ],
)
def test_help_is_printed_at_once_without_torch_ray_or_duckdb(command: list[str]) -> None:
    code = "import sys; sys.argv = ['afn', *sys.argv[1:], '--help']\n" + (
        "try:\n    from afn_ray.cli.commands import main; main()\nfinally:\n"
        "    heavy = {'torch', 'ray', 'duckdb', 'transformers'} & set(sys.modules)\n    assert not "
        "heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("usage: afn")


def test_the_help_of_sql_names_every_view_and_macro() -> None:
    said = " ".join((command_parsers()["sql"].description or "").split())
    listed = said.partition("Views: ")[2].partition(". ")[0].split(", ")
    assert listed == list(views.VIEWS) and "word_movers" in listed
    assert all(macro in said for macro in views.MACROS)


def test_the_help_of_each_command_says_what_it_does_and_how_it_ends() -> None:
    for name, command in command_parsers().items():
        first, *_ = (command.description or "").partition(".")
        assert len(first.split()) > 3, name
        assert (command.epilog or "").startswith("exit codes"), name


def test_a_run_in_this_process_imports_no_ray(tmp_path: Path) -> None:
    """In a fork of a process that imports what a worker does, and not Ray."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, afn_ray.runs.worker, afn_ray.runs.cluster, afn_ray.runs.job\n"
        "assert 'torch' in sys.modules and 'ray' not in sys.modules\n"
    )
    assert subprocess.run([warm_workers.choose(has_faults=False), script]).returncode == 0
