"""afn-ray: measure the activation strength of every token of a corpus on Ray; read it with SQL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from afn_ray.config import RunConfig
from afn_ray.errors import (
    AfnError,
    ConfigError,
    CorpusError,
    Damaged,
    IncompleteRun,
    Interrupted,
    ModelError,
    QueryError,
    ShardError,
    StoreError,
)

if TYPE_CHECKING:
    from afn_ray.analysis.audit import Audit, run_audit
    from afn_ray.analysis.claims import Claims, claims
    from afn_ray.analysis.explain import explain
    from afn_ray.analysis.explanation import Explanation, Question
    from afn_ray.analysis.findings import Finding
    from afn_ray.analysis.json_schema import schema_of as json_schema
    from afn_ray.analysis.layers import LayerComparison, compare_layers
    from afn_ray.analysis.local_model import LocalModel
    from afn_ray.analysis.neuron_questions import (
        NeuronUses,
        SelectiveNeurons,
        WordNeurons,
        neuron_uses,
        neurons,
        word_neurons,
    )
    from afn_ray.analysis.nights import Night
    from afn_ray.analysis.policy import Policy, read_policy
    from afn_ray.analysis.verify import Verification, verify_store
    from afn_ray.exports.export import Exported, export
    from afn_ray.exports.request import IcebergTable
    from afn_ray.query.catalog import write_catalog
    from afn_ray.query.database import Run, open_run
    from afn_ray.query.result import Result
    from afn_ray.reduce.compare import Comparison
    from afn_ray.reduce.compare import compare as compare_runs
    from afn_ray.reduce.history import History
    from afn_ray.reduce.history import of_store as history
    from afn_ray.runs.demo import demo_config
    from afn_ray.runs.estimate import Estimate, dry_run
    from afn_ray.runs.job import run
    from afn_ray.runs.status import Status, Statuses
    from afn_ray.runs.status import read_status as status
    from afn_ray.show.beyond import Rankings, rankings
    from afn_ray.show.card import Card
    from afn_ray.show.card import card_of as model_card
    from afn_ray.show.diagnosis import Diagnosis
    from afn_ray.show.doctor import check as check_installation
    from afn_ray.show.report import run_charts, write_report
    from afn_ray.show.summary import RunSummary, summarise
    from afn_ray.show.vega import Chart
    from afn_ray.store.garbage import Garbage, collect_garbage
    from afn_ray.store.settings import config_from
    from afn_ray.store.verdicts import accept_run

__version__ = "0.1.0"

__all__ = [
    "AfnError",
    "Audit",
    "Card",
    "Chart",
    "Claims",
    "Comparison",
    "ConfigError",
    "CorpusError",
    "Damaged",
    "Diagnosis",
    "Estimate",
    "Explanation",
    "Exported",
    "Finding",
    "Garbage",
    "History",
    "IcebergTable",
    "IncompleteRun",
    "Interrupted",
    "LayerComparison",
    "LocalModel",
    "ModelError",
    "NeuronUses",
    "Night",
    "Policy",
    "QueryError",
    "Question",
    "Rankings",
    "Result",
    "Run",
    "RunConfig",
    "RunSummary",
    "SelectiveNeurons",
    "ShardError",
    "Status",
    "Statuses",
    "StoreError",
    "Verification",
    "WordNeurons",
    "__version__",
    "accept_run",
    "check_installation",
    "claims",
    "collect_garbage",
    "compare_layers",
    "compare_runs",
    "config_from",
    "demo_config",
    "dry_run",
    "explain",
    "export",
    "history",
    "json_schema",
    "model_card",
    "neuron_uses",
    "neurons",
    "open_run",
    "rankings",
    "read_policy",
    "run",
    "run_audit",
    "run_charts",
    "status",
    "summarise",
    "verify_store",
    "word_neurons",
    "write_catalog",
    "write_report",
]

_LAZY = {
    "Audit": "analysis.audit",
    "Card": "show.card",
    "Chart": "show.vega",
    "Claims": "analysis.claims",
    "Comparison": "reduce.compare",
    "Diagnosis": "show.diagnosis",
    "Estimate": "runs.estimate",
    "Explanation": "analysis.explanation",
    "Exported": "exports.export",
    "Finding": "analysis.findings",
    "Garbage": "store.garbage",
    "History": "reduce.history",
    "IcebergTable": "exports.request",
    "LayerComparison": "analysis.layers",
    "LocalModel": "analysis.local_model",
    "NeuronUses": "analysis.neuron_questions",
    "Night": "analysis.nights",
    "Policy": "analysis.policy",
    "Question": "analysis.explanation",
    "Rankings": "show.beyond",
    "Result": "query.result",
    "Run": "query.database",
    "RunSummary": "show.summary",
    "SelectiveNeurons": "analysis.neuron_questions",
    "Status": "runs.status",
    "Statuses": "runs.status",
    "Verification": "analysis.verify",
    "WordNeurons": "analysis.neuron_questions",
    "accept_run": "store.verdicts",
    "check_installation": "show.doctor:check",
    "claims": "analysis.claims",
    "collect_garbage": "store.garbage",
    "compare_layers": "analysis.layers",
    "compare_runs": "reduce.compare:compare",
    "config_from": "store.settings",
    "demo_config": "runs.demo",
    "dry_run": "runs.estimate",
    "explain": "analysis.explain",
    "export": "exports.export",
    "history": "reduce.history:of_store",
    "json_schema": "analysis.json_schema:schema_of",
    "model_card": "show.card:card_of",
    "neuron_uses": "analysis.neuron_questions",
    "neurons": "analysis.neuron_questions",
    "open_run": "query.database",
    "rankings": "show.beyond",
    "read_policy": "analysis.policy",
    "run": "runs.job",
    "run_audit": "analysis.audit",
    "run_charts": "show.report",
    "status": "runs.status:read_status",
    "summarise": "show.summary",
    "verify_store": "analysis.verify",
    "word_neurons": "analysis.neuron_questions",
    "write_catalog": "query.catalog",
    "write_report": "show.report",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that ``afn --help`` loads neither torch nor DuckDB."""
    if name in _LAZY:
        from importlib import import_module

        module, _, attribute = _LAZY[name].partition(":")
        return getattr(import_module(f"afn_ray.{module}"), attribute or name)
    raise AttributeError(f"module 'afn_ray' has no attribute {name!r}")


def __dir__() -> list[str]:
    """All public names, whether loaded or not."""
    return sorted({*globals(), *__all__})
