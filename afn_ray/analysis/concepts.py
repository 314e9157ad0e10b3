"""Selective neurons of a word, and what one neuron responds to: words, types, contexts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from afn_ray.errors import ConfigError
from afn_ray.query.database import Run
from afn_ray.query.expressions import lower_word

LEAST_N = 20
"""Least number of tokens with a neuron for it to be ranked; fewer have much in common by chance."""
MOST_OCCURRENCES = 20_000
"""Number of occurrences of a word that are read, the first ones; enough for a share.

A word that occurs more often is a type, so the vocabulary has its exact count.
"""
CONTEXTS = 10
WORDS_BESIDE = 6
TOKENS_BESIDE = 40
"""Number of tokens read on each side of a token, to form the words around it."""


@dataclass(frozen=True, slots=True)
class Neuron:
    """A neuron and its types, as in the table ``neurons``."""

    layer: int
    neuron: int
    n: int  # tokens that have it among their neurons, without special ones
    share: float  # n as a share of all tokens whose neurons are recorded
    mean: float
    largest: float
    n_types: int
    selectivity: float  # bits
    types: tuple[tuple[str, int, float], ...]  # text, n, lift


@dataclass(frozen=True, slots=True)
class Concept:
    """A neuron compared between a word and all other tokens."""

    neuron: Neuron
    share: float  # share of the word's tokens that have the neuron
    elsewhere: float  # share of all other tokens that have it
    mean: float  # mean value in the word's tokens

    @property
    def lift(self) -> float | None:
        """``share`` over ``elsewhere``; None where ``elsewhere`` is 0."""
        return self.share / self.elsewhere if self.elsewhere else None


@dataclass(frozen=True, slots=True)
class Context:
    """A token that has the neuron, and the words around it."""

    doc: int
    position: int
    value: float
    left: str
    word: str
    right: str


def layer_of(run: Run, layer: int | None) -> int:
    """``layer``, or the deepest layer with recorded neurons.

    Raises ``ConfigError`` where the layer's neurons were not recorded, or none were.
    """
    layers: list[int] = run.info["measure"].get("neuron_layers", [])
    if not layers:
        raise ConfigError(f"run {run.uri} recorded no neurons; 'afn run --signals neurons' does")
    if layer is not None and layer not in layers:
        recorded = ", ".join(map(str, layers))
        raise ConfigError(f"neurons of layer {layer} were not recorded; those of {recorded} were")
    return layers[-1] if layer is None else layer


def selective_neurons(run: Run, layer: int, most: int) -> list[Neuron]:
    """The ``most`` most selective neurons of those with at least ``LEAST_N`` tokens.

    Selectivity is how far the types of a neuron's tokens are from the corpus's mixture of types.
    """
    rows = run.sql(
        "FROM neurons WHERE layer = ? AND n >= ? ORDER BY selectivity DESC, neuron LIMIT ?",
        [layer, LEAST_N, most],
    )
    return [_neuron(row) for row in rows.to_arrow_table().to_pylist()]


def find_neuron(run: Run, layer: int, number: int) -> Neuron:
    """The neuron ``number`` of ``layer``.

    Raises ``ConfigError`` for a neuron that no token has among its neurons.
    """
    found = run.sql("FROM neurons WHERE layer = ? AND neuron = ?", [layer, number])
    rows = found.to_arrow_table().to_pylist()
    if not rows:
        others = [str(k) for k in run.info["measure"]["neuron_layers"] if k != layer]
        hint = f"; --layer {' or '.join(others)} may be meant" if others else ""
        raise ConfigError(
            f"no token of the run has neuron {number} of layer {layer} among those recorded of "
            f"it{hint}"
        )
    return _neuron(rows[0])


def _neuron(row: dict[str, Any]) -> Neuron:
    types = row.pop("types")
    named = tuple((kind["text"], kind["n"], kind["lift"]) for kind in types)
    return Neuron(**row, types=named)


def neurons_of_word(run: Run, word: str, layer: int, most: int) -> tuple[list[Concept], int]:
    """Neurons more frequent in ``word`` than elsewhere, and the number of occurrences read.

    Sorted by share times the logarithm of the lift, largest first. Raises ``ConfigError`` for a
    word that does not occur.
    """
    ((occurrences,),) = run.sql(
        f"SELECT count(*) FROM kwic($word, n := 0, most := {MOST_OCCURRENCES})",  # noqa: S608
        {"word": word},
    ).fetchall()
    if not occurrences:
        hint = "; it is more than one word, ask for one" if len(word.split()) > 1 else ""
        raise ConfigError(f"the word {word!r} does not occur in the run{hint}")
    word_tokens = "(SELECT count(*) FROM mine)"
    if occurrences == MOST_OCCURRENCES:
        n = "n_high" if "neurons_above" in run.info["measure"] else "n"
        word_tokens = (
            f"(SELECT greatest((SELECT count(*) FROM mine), sum({n})) "  # noqa: S608
            "FROM vocabulary "
            f"WHERE layer = {layer} AND class <> 'special' AND {lower_word('text')} = "
            f"{lower_word('$word')})"
        )
    query = _neurons_of_word_sql(layer, most, word_tokens)
    concepts = []
    for row in run.sql(query, {"word": word}).to_arrow_table().to_pylist():
        shares = [row.pop(name) for name in ("in_share", "elsewhere", "mean_in_word")]
        del row["all_tokens"]
        concepts.append(Concept(_neuron(row), *shares))
    return concepts, occurrences


def _neurons_of_word_sql(layer: int, most: int, word_tokens: str) -> str:
    """Query for the neurons of ``$word``; ``word_tokens`` is SQL for how
    many tokens the word has.
    """
    # DuckDB estimates one row for an unnested list, so the join builds its hash table from the list
    # and not from all tokens.
    return f"""
        WITH places AS MATERIALIZED (
            SELECT doc, position + unnest(range(n_tokens))::INTEGER AS position
            FROM kwic($word, n := 0, most := {MOST_OCCURRENCES})
        ),
        mine AS MATERIALIZED (
            SELECT neurons_{layer} AS items FROM token_neurons t
            JOIN (SELECT one.* FROM (SELECT unnest(list(places)) AS one FROM places)) f
                ON t.doc = f.doc AND t.position = f.position
            WHERE neurons_{layer} IS NOT NULL
        ),
        met AS (
            SELECT item.neuron AS neuron, count(*) AS n, avg(item.value) AS mean
            FROM (SELECT unnest(items) AS item FROM mine) GROUP BY ALL
        ),
        counted AS (
            SELECT s.*, met.n / (SELECT count(*) FROM mine) AS in_share, met.mean AS mean_in_word,
                {word_tokens} AS word_tokens, s.n / s.share AS all_tokens
            FROM met JOIN neurons s ON s.layer = {layer} AND s.neuron = met.neuron
        )
        SELECT * EXCLUDE (word_tokens),
            greatest(0, n - round(in_share * word_tokens))
              / greatest(1, all_tokens - word_tokens) AS elsewhere
        FROM counted WHERE in_share > elsewhere
        ORDER BY in_share * ln(in_share / greatest(elsewhere, 0.5 / all_tokens)) DESC, neuron
          LIMIT {most}
    """  # noqa: S608


def contexts(run: Run, layer: int, number: int, most: int = CONTEXTS) -> list[Context]:
    """Tokens with the largest absolute values of the neuron, with the words around them.

    Reads all recorded neurons of the layer.
    """
    # With neurons of all tokens the two tables have the same rows in the same order. With neurons
    # of HIGH tokens alone there are no special tokens to exclude.
    high_only = "neurons_above" in run.info["measure"]
    normal = (
        "token_neurons t"
        if high_only
        else "token_neurons t POSITIONAL JOIN tokens WHERE NOT is_special"
    )
    rows = run.sql(
        f"""
        SELECT doc, position, item.value FROM (
            SELECT t.doc, t.position,
              unnest(list_filter(neurons_{layer}, lambda x: x.neuron = {number})) AS item
            FROM {normal}
        ) ORDER BY abs(item.value) DESC, doc, position LIMIT {most}
        """  # noqa: S608
    ).fetchall()
    return [_context(run, *row) for row in rows]


def _context(run: Run, doc: int, position: int, value: float) -> Context:
    tokens = run.sql(
        "SELECT position, coalesce(surface, text) AS text, is_word_start, surface IS NOT NULL AS "
        "is_whole FROM tokens WHERE doc = ? AND position BETWEEN ? AND ? AND NOT is_special ORDER "
        "BY position",
        [doc, position - TOKENS_BESIDE, position + TOKENS_BESIDE],
    ).fetchall()
    words: list[str] = []
    last_is_whole = False  # the last word is complete: its other pieces add nothing
    at = 0
    for place, text, is_word_start, is_whole in tokens:
        if is_word_start or not words:
            words.append(text)
            last_is_whole = is_whole
        elif not last_is_whole:
            words[-1] += text
        if place <= position:
            at = len(words) - 1
    left = words[max(0, at - WORDS_BESIDE) : at]
    right = words[at + 1 : at + 1 + WORDS_BESIDE]
    return Context(doc, position, value, " ".join(left), words[at], " ".join(right))
