"""Query a run's tables as SQL views in a separate process."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from types import TracebackType
from typing import Any

import pyarrow as pa

from afn_ray import cgroup, notebook
from afn_ray.errors import QueryError
from afn_ray.query import sandbox
from afn_ray.query.backend import Backend
from afn_ray.query.contents import AFN, read_contents
from afn_ray.query.no_rows import why_no_rows, why_some_rows
from afn_ray.query.result import Result
from afn_ray.query.shard_views import ShardViews
from afn_ray.query.views import VIEWS
from afn_ray.reduce import history
from afn_ray.store import manifest
from afn_ray.text import count, printable

MAX_TIMEOUT_S = 1_000_000
"""Largest time limit of a query, in seconds."""
MAX_THREADS = 1024
"""Largest number of DuckDB's threads."""
HISTORY = re.compile(r"\bhistory\b", re.IGNORECASE)
"""Name of the view that a query gets only if it has the name outside of its strings."""
STRING = re.compile("'[^']*'")


def open_run(
    uri: str,
    *,
    baseline: str | None = None,
    memory_limit: str = "2GB",
    threads: int | None = None,
    timeout_s: float = 60.0,
) -> Run:
    """Open the run at ``uri`` for queries in SQL.

    ``uri`` is a run's URI, or a store's URI for its latest complete run. ``baseline``, given in the
    same way, fills the views ``movers``, ``drift`` and ``class_drift``, in which ``_a`` is the
    baseline and ``_b`` this run; without it they are empty. ``memory_limit`` is DuckDB's limit.
    ``threads`` is DuckDB's number of threads, one per core by default. ``timeout_s`` is the limit
    of each query in seconds. Opening reads the run's small tables. The first query of a view that
    is read from files reads one Parquet footer for it; for each part of ``words``, at most 16.

    Raises ``StoreError`` if the run does not exist or is damaged, ``QueryError`` for a limit that
    is not valid, and ``ConfigError`` for a baseline of another measure.
    """
    against = None if baseline is None else manifest.find_run(baseline)
    return Run(
        manifest.find_run(uri),
        against,
        memory_limit=memory_limit,
        threads=threads,
        timeout_s=timeout_s,
    )


@contextlib.contextmanager
def opened(run: str | Run, *, timeout_s: float) -> Iterator[Run]:
    """``run`` itself, with its own limits, or the run at this URI, open with this time limit."""
    if isinstance(run, Run):
        yield run
        return
    with open_run(run, timeout_s=timeout_s) as found:
        yield found


def folder_of(run: str | manifest.RunFolder | Run) -> manifest.RunFolder:
    """The folder of ``run``: its URI, a store's URI for its latest complete run, or a run.

    Raises ``StoreError`` if there is no such run, or if it is not complete.
    """
    if isinstance(run, Run):
        return run._folder
    return manifest.find_run(run) if isinstance(run, str) else run


class Run:
    """A complete run as SQL views and macros, defined in ``views``.

    Queries run in a separate process (``sandbox``). It cannot write, and it can read only this
    run's own files (``session``). A query over its limits is interrupted. If that does not help,
    the process is killed, and the next query starts a new one.
    """

    def __init__(
        self,
        folder: manifest.RunFolder,
        baseline: manifest.RunFolder | None,
        *,
        memory_limit: str,
        threads: int | None,
        timeout_s: float,
    ) -> None:
        if not 0 < timeout_s <= MAX_TIMEOUT_S:
            raise QueryError(
                f"the time limit is {timeout_s} s; expected more than 0 and at most {MAX_TIMEOUT_S}"
            )
        if threads is not None and not 0 < threads <= MAX_THREADS:
            raise QueryError(
                f"threads is {threads}; expected 1 to {MAX_THREADS}, or None for one per core"
            )
        limits = sandbox.QueryLimits(
            memory_limit,
            sandbox.memory_bytes(memory_limit),
            threads or cgroup.num_cores(),
            timeout_s,
        )
        self.uri = folder.uri
        self.id = folder.id
        self.info = folder.info
        self.baseline = None if baseline is None else baseline.id
        self._folder = folder
        contents = read_contents(folder, baseline, AFN)
        self._shard_views = contents.shard_views
        self._backend = Backend(contents, limits)

    def sql(
        self, query: str, parameters: Sequence[Any] | Mapping[str, Any] | None = None, **tables: Any
    ) -> Result:
        """The result of one statement that reads; the result's methods compute it.

        ``parameters`` are for ``?`` or ``$1`` (a sequence) or ``$name`` (a mapping). ``tables`` are
        your own tables, from pandas, polars or Arrow, by the names that the query uses, as in
        ``run.sql("FROM words JOIN meta USING (doc)", meta=frame)``. Raises ``QueryError`` for SQL
        that is wrong or forbidden. The result's methods raise it for a query over its limits.
        """
        if not query.isascii() and any("\ud800" <= c <= "\udfff" for c in query):
            raise QueryError(
                "the query is no Unicode text: was it written in another encoding than UTF-8?"
            )
        own = {name: self._own(name, table) for name, table in tables.items()}
        if HISTORY.search(STRING.sub("", query)):
            own["history"] = self._history
        return Result(self._backend, ((query, parameters, own),))

    def tokens(self) -> Result:
        """One row per token, in the order of the corpus within a shard."""
        return self.sql("FROM tokens")

    def documents(self) -> Result:
        """One row per document read."""
        return self.sql("FROM documents")

    def vocabulary(self) -> Result:
        """Statistics of every type that occurs, per layer."""
        return self.sql("FROM vocabulary")

    def words(self) -> Result:
        """One row per word, in the order of the corpus within a shard."""
        return self.sql("FROM words")

    def thresholds(self) -> Result:
        """The run's quartiles per layer and population."""
        return self.sql("FROM thresholds")

    def shards(self) -> Result:
        """The run's shards in plan order."""
        return self.sql("FROM shards")

    def tables(self) -> dict[str, list[str]]:
        """The columns of each view."""
        views = {name: Result(self._backend, ((f"FROM {name}", None, {}),)) for name in VIEWS}
        return {name: view.columns for name, view in views.items()}

    @property
    def shard_views(self) -> ShardViews:
        """SQL of the views that grow with the corpus, over some of the run's shards."""
        return self._shard_views

    def why_empty(self, query: str) -> list[str]:
        """Possible reasons why ``query`` has no rows, found from its text."""
        return why_no_rows(self, query)

    def why_some(self, query: str) -> list[str]:
        """Reason why ``query`` may see rows of some tokens alone; nothing if the run keeps all."""
        return why_some_rows(self.info, query)

    def close(self) -> None:
        """End the session and its process."""
        self._backend.process.close()

    def __repr__(self) -> str:
        model = self.info.get("model", {}).get("name")
        layers = self.info["layers"]
        tokens = self.info.get("counts", {}).get("tokens", 0)
        return printable(
            f"<Run {self.id}: {model}, layers {layers}, {count(tokens, 'token')}, {self.uri}>"
        )

    def _repr_html_(self) -> str:
        counts = self.info.get("counts", {})
        named = {
            "run": self.id,
            "model": self.info.get("model", {}).get("name"),
            "layers": ", ".join(map(str, self.info["layers"])),
            "documents": f"{counts.get('documents', 0):,}",
            "tokens": f"{counts.get('tokens', 0):,}",
            "measure": self.info["measure"].get("id"),
            "place": self.uri,
        }
        return notebook.facts("Run", named)

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @cached_property
    def _history(self) -> pa.Table:
        """Rows of the view ``history``: read on demand, as they are from many runs."""
        return history.of_run(self._folder).table

    def _own(self, name: str, table: Any) -> pa.Table:
        """The caller's ``table`` as Arrow.

        Raises ``QueryError`` if its name is a view's, if it is no table, or if it has more than
        half of the memory limit.
        """
        if name.lower() in VIEWS:
            raise QueryError(f"{name} is a view of the run; give your table another name")
        try:
            arrow = pa.table(table)
        except (TypeError, ValueError, pa.ArrowException) as error:
            raise QueryError(f"{name} is no table of pandas, polars or Arrow: {error}") from error
        if arrow.nbytes > self._backend.limits.memory_bytes // 2:
            raise QueryError(
                f"{name} has {arrow.nbytes:,} bytes, over half of the memory limit of "
                f"{self._backend.limits.memory}; take the columns that the query needs, or raise "
                "the limit"
            )
        return arrow
