"""afn-ray: the activation strength of every token of a corpus, measured on Ray and read with SQL."""

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
    from afn_ray.audit import Audit, Policy, read_policy, run_audit
    from afn_ray.compare import Comparison
    from afn_ray.compare import compare as compare_runs
    from afn_ray.estimate import Estimate, dry_run
    from afn_ray.garbage import Garbage, collect_garbage
    from afn_ray.job import run
    from afn_ray.query import Run, open_run, write_catalog
    from afn_ray.report import write_report
    from afn_ray.settings import config_from
    from afn_ray.verify import Finding, Verification, verify_store

__version__ = "0.1.0"

__all__ = [
    "AfnError",
    "Audit",
    "Comparison",
    "ConfigError",
    "CorpusError",
    "Damaged",
    "Estimate",
    "Finding",
    "Garbage",
    "IncompleteRun",
    "Interrupted",
    "ModelError",
    "Policy",
    "QueryError",
    "Run",
    "RunConfig",
    "ShardError",
    "StoreError",
    "Verification",
    "__version__",
    "collect_garbage",
    "compare_runs",
    "config_from",
    "dry_run",
    "open_run",
    "read_policy",
    "run",
    "run_audit",
    "verify_store",
    "write_catalog",
    "write_report",
]

_LAZY = {
    "Audit": "audit", "Comparison": "compare", "Estimate": "estimate", "Finding": "verify", "Garbage": "garbage",
    "Policy": "audit", "Run": "query", "Verification": "verify", "collect_garbage": "garbage",
    "compare_runs": "compare:compare", "config_from": "settings", "dry_run": "estimate", "open_run": "query",
    "read_policy": "audit", "run": "job", "run_audit": "audit", "verify_store": "verify",
    "write_catalog": "query", "write_report": "report",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Imports torch and DuckDB only for those who use them: ``afn --help`` answers at once."""
    if name in _LAZY:
        from importlib import import_module

        module, _, attribute = _LAZY[name].partition(":")  # afn_ray.compare is the module, once it is imported
        return getattr(import_module(f"afn_ray.{module}"), attribute or name)
    raise AttributeError(f"module 'afn_ray' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The names that there are, loaded or not."""
    return sorted({*globals(), *__all__})
