"""Masking: how the model's output changes without its HIGH tokens, against other tokens.

A token may be HIGH (its state is long) although the rest of the text does not depend on it.
Documents of the run are drawn by their hash and rebuilt from the recorded token ids, so the corpus
is not needed and the text is always the measured one. The output compared is that of the last
block, before a final norm.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from afn_ray.analysis.bootstrap import SEED, Drawn, Draws, Figure, Quantity
from afn_ray.analysis.local_model import LocalModel
from afn_ray.analysis.remeasure import recorded_task
from afn_ray.classes import upos_classes
from afn_ray.errors import ConfigError, ModelError
from afn_ray.model.signals import States
from afn_ray.query.database import Run
from afn_ray.runs import worker
from afn_ray.runs.measurer import Measurer
from afn_ray.runs.task import Task
from afn_ray.schema import strengths
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
"""Replacements for a masked token; the first one in the vocabulary is used.

Decoders seldom have a mask token.
"""
SHARE = 0.15
"""Largest share of a document's tokens that is masked; the usual share in masked training."""
KINDS = ("HIGH", "LOW", "random", "HIGH content", "LOW content")
DIFFERENCES = (("HIGH", "random"), ("HIGH", "LOW"), ("HIGH content", "LOW content"))
CHANGES = (
    "change of the text's mean state (1 - cosine)",
    "change of the other tokens' states (relative L2)",
)

Ints = npt.NDArray[np.int64]
Float64s = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class MaskedText:
    """One document of the run, cut to one window; all arrays are [n_tokens]."""

    doc: int
    ids: Ints
    free: npt.NDArray[np.bool_]  # neither special nor a sink: may be replaced, and is compared
    high: npt.NDArray[np.bool_]
    content: npt.NDArray[np.bool_]


def check(
    run: Run,
    num_documents: int,
    local: LocalModel = LocalModel(),  # noqa: B008 - frozen
) -> tuple[list[Figure], str]:
    """The figures of the claim ``masking`` for at most ``num_documents``, and a note on them.

    HIGH is the run's label at its deepest layer. In each document the same number of HIGH, LOW and
    random tokens is replaced, and the same again among content words. Special tokens and sinks are
    neither replaced nor compared. Means are over documents.

    Raises ``ModelError`` where the model here is not the run's. Raises ``ConfigError`` where its
    vocabulary has none of ``STAND_INS``, or where no document has both HIGH and LOW tokens.
    """
    task = recorded_task(manifest.find_run(run.uri), local)
    depth = run.info["model"]["depth"]
    layer = run.info["layers"][-1]
    measurer = Measurer(_at_output(task, depth))
    name, stand_in = _stand_in(measurer)
    changes = np.full((num_documents, len(KINDS), len(CHANGES)), np.nan)
    replaced = np.zeros((num_documents, len(KINDS)))
    window = run.info["measure"]["window_tokens"]
    texts = _texts(run, layer, num_documents, window, measurer)
    for at, text in enumerate(texts):
        chosen = choose(text)
        for kind, change in _changes(measurer, text, chosen, stand_in).items():
            of_kind = KINDS.index(kind)
            changes[at, of_kind] = change
            replaced[at, of_kind] = len(chosen[kind])
    was_masked = ~np.isnan(changes[:, 0, 0])
    changes, replaced = changes[was_masked], replaced[was_masked]
    if not len(changes):
        raise ConfigError(
            f"none of the documents drawn from {run.uri} has both HIGH and LOW tokens that may be "
            "masked"
        )
    figures: list[Figure] = []
    for of, what in enumerate(CHANGES):
        figures += _figures(what, layer, changes[:, :, of], replaced)
    return figures, _note(run, len(changes), name, depth)


def _at_output(task: Task, depth: int) -> Task:
    """``task`` that measures strength at the output of the last block, in float32."""
    last = (depth,)
    task = worker.with_signals(task)
    measure = replace(
        task.measure, layers=last, series=strengths(last), dtype="float32", outliers=(), means=()
    )
    return replace(task, measure=measure)


def _note(run: Run, num_documents: int, stand_in: str, depth: int) -> str:
    """Sentences on how the figures were made."""
    note = (
        f"Masking: {count(num_documents, 'document')} of the run, drawn by their hash, each in one "
        f"window. As many tokens of every kind, at most {SHARE:.0%} of a document's, became "
        f"{stand_in}. Only tokens that stayed are looked at, at the output of block {depth}, in "
        "float32."
    )
    if content_tags(run) == []:
        note += (
            " Which of the corpus's tags are content words is not known, so these are not looked "
            "at apart."
        )
    return note


def _figures(what: str, layer: int, changes: Float64s, replaced: Float64s) -> Iterator[Figure]:
    """Mean changes by kind, and their differences.

    ``changes`` and the numbers of ``replaced`` tokens are [n_docs, n_kinds].
    """
    draw = Draws(len(changes)).draw
    means: dict[str, Drawn] = {}
    num_replaced: dict[str, float] = {}
    num_docs: dict[str, int] = {}
    for at, kind in enumerate(KINDS):
        has_kind = replaced[:, at] > 0
        if not has_kind.any():
            continue
        num_replaced[kind] = float(replaced[:, at].sum())
        num_docs[kind] = int(has_kind.sum())
        values = np.where(has_kind, changes[:, at], 0)
        means[kind] = draw(np.divide, values, has_kind.astype(np.float64))
        quantity = Quantity("masking", what, f"{kind} tokens masked", layer)
        is_control = not kind.startswith("HIGH")
        yield means[kind].figure(
            quantity, num_replaced[kind], num_docs[kind], is_control=is_control
        )
    for a, b in DIFFERENCES:
        if a in means:
            quantity = Quantity("masking", what, f"{a} less {b}", layer)
            yield means[a].less(means[b]).figure(quantity, num_replaced[a], num_docs[a])


def _stand_in(measurer: Measurer) -> tuple[str, int]:
    pieces = measurer.preparer.pieces
    for name in STAND_INS:
        if name in pieces:
            return name, pieces.index(name)
    raise ConfigError(
        f"the vocabulary of {measurer.task.config.model} has nothing to put for a token that is "
        f"masked: none of {', '.join(STAND_INS)}"
    )


def _texts(
    run: Run, layer: int, num_documents: int, window: int, measurer: Measurer
) -> Iterator[MaskedText]:
    """Documents in the order of their hash.

    A document longer than a window is cut to its beginning, and the template's suffix is restored.
    """
    suffix = list(measurer.preparer.encoder.template.suffix)
    tags = content_tags(run)
    is_content = "coalesce(class, '') = 'content'"
    parameters: dict[str, object] = {"n": num_documents, "window": window}
    if tags is not None:  # a token's own tag is more exact than its type's most frequent class
        is_content = "coalesce(list_contains($content::VARCHAR[], tag), false)"
        parameters["content"] = tags
    rows = run.sql(
        "SELECT doc, token_id, NOT is_special AND NOT "  # noqa: S608
        f"coalesce(sink_{layer}, false), "
        f"coalesce(high_{layer}, false), {is_content} FROM tokens "
        "LEFT JOIN (SELECT token_id, class FROM vocabulary "
        f"WHERE layer = {layer} AND class <> 'special') USING (token_id) "
        "WHERE doc IN (SELECT doc FROM documents WHERE n_tokens > 0 "
        "ORDER BY hash(doc), doc LIMIT $n) "
        "AND position <= $window ORDER BY doc, position",
        parameters,
    ).to_arrow_table()
    columns = [column.to_numpy() for column in rows.columns]
    ends = np.flatnonzero(np.diff(columns[0])) + 1
    by_doc = zip(*(np.split(column, ends) for column in columns), strict=True)
    for doc, ids, free, high, content in by_doc:
        ids = ids.astype(np.int64)
        free = free.copy()
        if len(ids) > window:
            ids = ids[:window]
            free = free[:window]
            high = high[:window]
            content = content[:window]
            if suffix:
                ids[-len(suffix) :] = suffix
                free[-len(suffix) :] = False
        yield MaskedText(int(doc[0]), ids, free, high, content)


def content_tags(run: Run) -> list[str] | None:
    """Tags of content words; empty where the tags are not UPOS; None where the run has no tags."""
    if "tag" not in run.sql("FROM tokens LIMIT 0").columns:
        return None
    rows = run.sql("SELECT DISTINCT tag FROM tokens WHERE tag IS NOT NULL").fetchall()
    classes = upos_classes([tag for (tag,) in rows])
    return sorted(tag for tag, kind in classes.items() if kind == "content")


def choose(text: MaskedText) -> dict[str, Ints]:
    """Indices of the tokens of ``text`` to replace, by kind: the same number of each.

    Drawn without replacement, with a seed of the document's own. Kinds that the document lacks are
    left out.
    """
    dice = np.random.default_rng([SEED, text.doc])
    most = max(1, int(SHARE * text.free.sum()))
    chosen: dict[str, Ints] = {}
    for suffix, of in (("", text.free), (" content", text.free & text.content)):
        high = np.flatnonzero(of & text.high)
        low = np.flatnonzero(of & ~text.high)
        if n := min(len(high), len(low), most):
            chosen |= {
                f"HIGH{suffix}": dice.choice(high, n, replace=False),
                f"LOW{suffix}": dice.choice(low, n, replace=False),
            }
            if not suffix:
                chosen["random"] = dice.choice(np.flatnonzero(of), n, replace=False)
    return chosen


def _changes(
    measurer: Measurer, text: MaskedText, chosen: dict[str, Ints], stand_in: int
) -> dict[str, tuple[float, float]]:
    """Both ``CHANGES`` for each kind that leaves a token; text and variants form one batch."""
    if not chosen:
        return {}
    variants = np.repeat(text.ids[None], 1 + len(chosen), axis=0)  # [1 + n_kinds, n_tokens]
    for row, at in zip(variants[1:], chosen.values(), strict=True):
        row[at] = stand_in
    lengths = [len(text.ids)] * len(variants)
    states = measurer.model.measure(variants.ravel(), lengths, (States(),))[0]
    if not np.isfinite(states).all():
        raise ModelError(
            f"{measurer.task.config.model} gave states that are not finite for document {text.doc}"
        )
    before, *after = states.astype(np.float64).reshape(*variants.shape, -1)
    found = {}
    for (kind, at), state in zip(chosen.items(), after, strict=True):
        stayed = text.free.copy()
        stayed[at] = False
        if stayed.any():
            found[kind] = _change(before[stayed], state[stayed])
    return found


def _change(before: Float64s, after: Float64s) -> tuple[float, float]:
    """Both ``CHANGES`` between the states of the same tokens; arrays are [n_tokens, n_dims]."""
    mean_before = before.mean(axis=0)
    mean_after = after.mean(axis=0)
    norms = np.linalg.norm(mean_before) * np.linalg.norm(mean_after)
    cosine = mean_before @ mean_after / norms
    distance = np.linalg.norm(after - before) / np.linalg.norm(before)
    return 1 - float(cosine), float(distance)
