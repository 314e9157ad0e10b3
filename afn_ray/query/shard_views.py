"""SQL of the views that grow with the corpus, over some of a run's shards or documents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from afn_ray.query import views
from afn_ray.query.expressions import RecordedColumns, ShardFile, rows_of, tokens_of
from afn_ray.query.words import words_view

SHARD_VIEWS = ("tokens", "documents", "words", "token_neurons")
"""Views whose rows belong to a document of the run."""


class ShardRange(NamedTuple):
    """Consecutive shards of a run, or some documents of one shard."""

    first: int
    end: int  # exclusive
    docs: tuple[int, int] | None = None
    """Run-wide numbers of the first document and of the one after the last; None: all."""


@dataclass(frozen=True)
class ShardViews:
    """A run's ``SHARD_VIEWS``, of which any range of shards can be read alone."""

    files: Mapping[str, Sequence[ShardFile]]
    """Files of the shards by table (tokens, documents, neurons), in plan order."""
    recorded: RecordedColumns
    neurons: views.NeuronFiles | None
    own_q3: Callable[[str], str] | None
    """SQL for ``RecordedColumns.own_q3`` from that of the rows of documents."""

    @property
    def shards(self) -> Sequence[ShardFile]:
        """The files of tokens, one for each shard, which say how large the shard is."""
        return self.files["tokens"]

    def sql(self, view: str, part: ShardRange) -> str:
        """SQL of the rows of ``view`` that belong to ``part``: those of
        the view, with its columns.
        """
        documents = self._files("documents", part)
        recorded = replace(self.recorded, of_docs=self._of_docs(part))
        if self.own_q3 is not None:
            recorded = replace(recorded, own_q3=self.own_q3(rows_of(documents)))
        if view == "documents":
            return views.documents_view(rows_of(documents), recorded)
        if view == "words":
            return words_view(self._files("tokens", part), documents, recorded)
        if view == "tokens":
            rows = tokens_of(self._files("tokens", part), recorded.offsets)
            return views.tokens_view(rows, recorded)
        neurons = self.neurons
        if neurons is not None:
            neurons = neurons._replace(tokens=self._files("neurons", part))
        return views.token_neurons_view(neurons, recorded)

    def _of_docs(self, part: ShardRange) -> str:
        """SQL of the condition that ``doc`` is one of ``part``; a filter skips row groups."""
        files = self.files["documents"]
        begin, end = part.docs or (files[part.first].doc_offset, None)
        if end is None and part.end < len(files):
            end = files[part.end].doc_offset
        return f" WHERE doc >= {begin}" + ("" if end is None else f" AND doc < {end}")

    def _files(self, table: str, part: ShardRange) -> list[ShardFile]:
        files = list(self.files[table][part.first : part.end])
        if part.docs is None:
            return files
        begin, end = part.docs
        return [f._replace(docs=(begin - f.doc_offset, end - f.doc_offset)) for f in files]
