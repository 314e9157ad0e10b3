"""What the model's own output loses with its HIGH tokens: they are masked, and beside them as many
others.

A token may be HIGH, that is long, without the rest of the text depending on it. Documents of the
run are drawn by their hash and put together again from the token ids that the run recorded, so the
corpus is not needed, and is always what was measured. What is read is the output of the last block,
before a final norm.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from afn_ray.analysis import explain
from afn_ray.analysis.claims import SEED, Drawn, Draws, Figure
from afn_ray.errors import ConfigError, ModelError
from afn_ray.model.signals import States
from afn_ray.query.database import Run
from afn_ray.runs import worker
from afn_ray.schema import strengths, upos_classes
from afn_ray.store import manifest
from afn_ray.text import count

STAND_INS = (
    "[MASK]",
    "<mask>",
    "[UNK]",
    "<unk>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "[PAD]",
    "<pad>",
)
"""What a token is replaced by: the first of these that the vocabulary has. Decoders have seldom a
mask.
"""
SHARE = 0.15
"""Of a document's tokens, at most: as many as were masked when masked models learned."""
KINDS = ("HIGH", "LOW", "random", "HIGH content", "LOW content")
DIFFERENCES = (("HIGH", "random"), ("HIGH", "LOW"), ("HIGH content", "LOW content"))
CHANGES = (
    "change of the text's mean state (1 - cosine)",
    "change of the other tokens' states (relative L2)",
)

Ints = npt.NDArray[np.int64]
States32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Text:
    """One document of the run, as far as a window reaches; all [n_tokens]."""

    doc: int
    ids: Ints
    free: npt.NDArray[np.bool_]  # neither special nor a sink: may be replaced, and is looked at
    high: npt.NDArray[np.bool_]
    content: npt.NDArray[np.bool_]


def check(
    run: Run,
    *,
    num_documents: int,
    model_name: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> tuple[list[Figure], str]:
    """The figures of the claim ``masking`` for at most ``num_documents``, and what must be known to
    read them.

    HIGH is as the run labels it at its deepest layer. In each document as many HIGH, LOW and random
    tokens are replaced, in each class of words too; special tokens and sinks are neither replaced
    nor looked at. Means are over documents. The rest is that of ``explain.explain``: raises
    ``ModelError`` where the model here is not the run's, ``ConfigError`` where its vocabulary has
    none of ``STAND_INS``, or no document a token of both kinds.
    """
    task = explain.recorded_task(
        manifest.find_run(run.uri),
        model_name=model_name,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )
    last, layer = (run.info["model"]["depth"],), run.info["layers"][-1]
    task = replace(
        worker.with_signals(task), layers=last, series=strengths(last), dtype="float32", outliers=()
    )
    changes = np.full((num_documents, len(KINDS), len(CHANGES)), np.nan)
    replaced = np.zeros((num_documents, len(KINDS)))
    with contextlib.closing(worker.Processor(task)) as processor:
        name, stand_in = _stand_in(processor)
        for at, text in enumerate(
            _texts(run, layer, num_documents, run.info["measure"]["window_tokens"], processor)
        ):
            chosen = choose(text)
            for kind, change in _changes(processor, text, chosen, stand_in).items():
                changes[at, KINDS.index(kind)], replaced[at, KINDS.index(kind)] = (
                    change,
                    len(chosen[kind]),
                )
    there = ~np.isnan(changes[:, 0, 0])
    changes, replaced = changes[there], replaced[there]
    if not len(changes):
        raise ConfigError(
            f"none of the documents drawn from {run.uri} has both HIGH and LOW tokens that may be masked"
        )
    draws = Draws(len(changes))
    figures = []
    for of, what in enumerate(CHANGES):
        means: dict[str, Drawn] = {}
        for at, kind in enumerate(KINDS):
            if n_docs := int((is_there := replaced[:, at] > 0).sum()):
                values = np.where(is_there, changes[:, at, of], 0)
                means[kind] = draws.draw(np.divide, values, is_there.astype(np.float64))
                figures.append(
                    _figure(
                        what,
                        f"{kind} tokens masked",
                        layer,
                        means[kind],
                        replaced[:, at].sum(),
                        n_docs,
                        is_control=not kind.startswith("HIGH"),
                    )
                )
        for a, b in DIFFERENCES:
            if a in means:
                n_docs = int((replaced[:, KINDS.index(a)] > 0).sum())
                difference, n = means[a].less(means[b]), replaced[:, KINDS.index(a)].sum()
                figures.append(
                    _figure(what, f"{a} less {b}", layer, difference, n, n_docs, is_control=False)
                )
    note = (
        f"Masking: {count(len(changes), 'document')} of the run, drawn by their hash, each in one window. As many "
        f"tokens of every kind, at most {SHARE:.0%} of a document's, became {name}. Only tokens that stayed are looked "
        f"at, at the output of block {last[0]}, in float32."
    )
    if content_tags(run) == []:
        note += " Which of the corpus's tags are content words is not known, so these are not looked at apart."
    return figures, note


def _figure(
    what: str, of: str, layer: int, drawn: Drawn, n: float, n_docs: int, *, is_control: bool
) -> Figure:
    return Figure(
        "masking", what, of, layer, drawn.value, *drawn.interval(), int(n), n_docs, is_control
    )


def _stand_in(processor: worker.Processor) -> tuple[str, int]:
    pieces = processor.preparer.pieces
    for name in STAND_INS:
        if name in pieces:
            return name, pieces.index(name)
    raise ConfigError(
        f"the vocabulary of {processor.task.config.model} has nothing to put for a token that is masked: "
        f"none of {', '.join(STAND_INS)}"
    )


def _texts(
    run: Run, layer: int, num_documents: int, window: int, processor: worker.Processor
) -> Iterator[Text]:
    """Documents in the order of their hash; of one that is longer than a window the beginning, with
    the template.
    """
    suffix = list(processor.preparer.encoder.template.suffix)
    content = content_tags(run)
    is_content = "coalesce(class, '') = 'content'"
    parameters: dict[str, Any] = {"n": num_documents, "window": window}
    if content is not None:  # a token's own tag says more than what its type mostly is
        is_content, parameters["content"] = (
            "coalesce(list_contains($content::VARCHAR[], tag), false)",
            content,
        )
    rows = run.sql(
        f"SELECT doc, token_id, NOT is_special AND NOT coalesce(sink_{layer}, false), coalesce(high_{layer}, false), "  # noqa: S608
        f"{is_content} FROM tokens LEFT JOIN (SELECT token_id, class FROM vocabulary "
        f"WHERE layer = {layer} AND class <> 'special') USING (token_id) "
        "WHERE doc IN (SELECT doc FROM documents WHERE n_tokens > 0 ORDER BY hash(doc), doc LIMIT $n) "
        "AND position <= $window ORDER BY doc, position",
        parameters,
    ).to_arrow_table()
    columns = [rows.column(i).to_numpy() for i in range(5)]
    ends = np.flatnonzero(np.diff(columns[0])) + 1
    for doc, ids, free, high, content in zip(*(np.split(c, ends) for c in columns), strict=True):
        ids, free = ids.astype(np.int64), free.copy()
        if len(ids) > window:
            ids, free, high, content = ids[:window], free[:window], high[:window], content[:window]
            if suffix:
                ids[-len(suffix) :], free[-len(suffix) :] = suffix, False
        yield Text(int(doc[0]), ids, free, high, content)


def content_tags(run: Run) -> list[str] | None:
    """Tags of content words where the run is labelled, none where its tags are not UPOS; None where
    it has no tags.
    """
    if "tag" not in run.sql("FROM tokens LIMIT 0").columns:
        return None
    tags = [
        tag
        for (tag,) in run.sql("SELECT DISTINCT tag FROM tokens WHERE tag IS NOT NULL").fetchall()
    ]
    return sorted(tag for tag, kind in upos_classes(tags).items() if kind == "content")


def choose(text: Text) -> dict[str, Ints]:
    """Which tokens of ``text`` are replaced, kind by kind: as many of each, drawn without
    replacement by a seed that is the document's own. Kinds that it lacks are left out.
    """
    dice = np.random.default_rng([SEED, text.doc])
    most = max(1, int(SHARE * text.free.sum()))
    chosen: dict[str, Ints] = {}
    for suffix, of in (("", text.free), (" content", text.free & text.content)):
        high, low = np.flatnonzero(of & text.high), np.flatnonzero(of & ~text.high)
        if n := min(len(high), len(low), most):
            chosen |= {
                f"HIGH{suffix}": dice.choice(high, n, replace=False),
                f"LOW{suffix}": dice.choice(low, n, replace=False),
            }
            if not suffix:
                chosen["random"] = dice.choice(np.flatnonzero(of), n, replace=False)
    return chosen


def _changes(
    processor: worker.Processor, text: Text, chosen: dict[str, Ints], stand_in: int
) -> dict[str, tuple[float, float]]:
    """Both of ``CHANGES`` for each kind that leaves a token; the text and its variants are one
    batch.
    """
    if not chosen:
        return {}
    variants = np.repeat(text.ids[None], 1 + len(chosen), axis=0)
    for row, at in zip(variants[1:], chosen.values(), strict=True):
        row[at] = stand_in
    lengths = [len(text.ids)] * len(variants)
    states = processor.model.measure(variants.ravel(), lengths, (States(),))[0]
    if not np.isfinite(states).all():
        raise ModelError(
            f"{processor.task.config.model} gave states that are not finite for document {text.doc}"
        )
    before, *after = states.astype(np.float64).reshape(*variants.shape, -1)
    found = {}
    for (kind, at), state in zip(chosen.items(), after, strict=True):
        rest = text.free.copy()
        rest[at] = False
        if rest.any():
            a, b = before[rest], state[rest]
            means = a.mean(axis=0), b.mean(axis=0)
            cosine = means[0] @ means[1] / (np.linalg.norm(means[0]) * np.linalg.norm(means[1]))
            found[kind] = (1 - float(cosine), float(np.linalg.norm(b - a) / np.linalg.norm(a)))
    return found
