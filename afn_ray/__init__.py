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
    from afn_ray.analysis.findings import Finding
    from afn_ray.analysis.layers import LayerComparison, compare_layers
    from afn_ray.analysis.nights import Night
    from afn_ray.analysis.policy import Policy, read_policy
    from afn_ray.analysis.verify import Verification, verify_store
    from afn_ray.exports.export import Exported, export
    from afn_ray.exports.request import IcebergTable
    from afn_ray.query.catalog import write_catalog
    from afn_ray.query.database import Run, open_run
    from afn_ray.reduce.compare import Comparison
    from afn_ray.reduce.compare import compare as compare_runs
    from afn_ray.runs.estimate import Estimate, dry_run
    from afn_ray.runs.job import run
    from afn_ray.show.report import write_report
    from afn_ray.store.garbage import Garbage, collect_garbage
    from afn_ray.store.settings import config_from

__version__ = "0.1.0"

__all__ = [
    "AfnError",
    "Audit",
    "Comparison",
    "ConfigError",
    "CorpusError",
    "Damaged",
    "Estimate",
    "Exported",
    "Finding",
    "Garbage",
    "IcebergTable",
    "IncompleteRun",
    "Interrupted",
    "LayerComparison",
    "ModelError",
    "Night",
    "Policy",
    "QueryError",
    "Run",
    "RunConfig",
    "ShardError",
    "StoreError",
    "Verification",
    "__version__",
    "collect_garbage",
    "compare_layers",
    "compare_runs",
    "config_from",
    "dry_run",
    "export",
    "open_run",
    "read_policy",
    "run",
    "run_audit",
    "verify_store",
    "write_catalog",
    "write_report",
]

_LAZY = {
    "Audit": "analysis.audit",
    "Comparison": "reduce.compare",
    "Estimate": "runs.estimate",
    "Exported": "exports.export",
    "Finding": "analysis.findings",
    "Garbage": "store.garbage",
    "IcebergTable": "exports.request",
    "LayerComparison": "analysis.layers",
    "Night": "analysis.nights",
    "Policy": "analysis.policy",
    "Run": "query.database",
    "Verification": "analysis.verify",
    "collect_garbage": "store.garbage",
    "compare_layers": "analysis.layers",
    "compare_runs": "reduce.compare:compare",
    "config_from": "store.settings",
    "dry_run": "runs.estimate",
    "export": "exports.export",
    "open_run": "query.database",
    "read_policy": "analysis.policy",
    "run": "runs.job",
    "run_audit": "analysis.audit",
    "verify_store": "analysis.verify",
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
