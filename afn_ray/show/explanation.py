"""An explained text in words: running text, cells of tables, and legends."""

from __future__ import annotations

from collections import Counter

from afn_ray.analysis.explanation import (
    TOP,
    Cell,
    Decision,
    ExplainedToken,
    Explanation,
    Reading,
    Thresholds,
)
from afn_ray.analysis.word_readings import Usual
from afn_ray.schema import STRENGTH
from afn_ray.text import visible

QUARTILES = {1: "1", 2: "2", 3: "3", 4: "4 HIGH"}


def token_name(token: ExplainedToken) -> str:
    """A token as a table shows it; one that continues a word begins with an ellipsis."""
    if token.special:
        return visible(token.piece)
    text = visible(token.text.strip()) or visible(token.text).replace(" ", "␣")
    return text if token.word_start else f"…{text}"


def reading_cells(reading: Reading) -> list[str]:
    """Cells of a token's table row after the token: strength to n, as in ``HEADS``."""
    cells = [
        f"{reading.strength:.4f}",
        "special" if reading.quartile is None else QUARTILES[reading.quartile],
        "" if reading.rank is None else f"{reading.rank:.1%}",
    ]
    usual = reading.usual
    if usual is None:
        return [*cells, "not in run", "", "0"]
    return [*cells, *_usual_cells(usual)]


def _usual_cells(usual: Usual) -> list[str]:
    """Cells of the figures of a type or word in the run: median, HIGH and n."""
    share_high = "" if usual.share_high is None else f"{usual.share_high:.0%}"
    return [f"{usual.median:.4f}", share_high, f"{usual.n:,}"]


HEADS = ("token", "strength", "quartile", "rank", "median", "HIGH", "n")
LEGEND = (
    "rank: share of the run's tokens at or below this strength. median, HIGH, n: of the same type "
    "in the run (median strength, share that is HIGH, occurrences). Special tokens are apart. "
    "Compare strengths within one layer of one model only."
)
WORD_HEADS = ("word", "tokens", "strongest", "is", "median", "HIGH", "n")
WORDS_LEGEND = (
    "Words of several tokens: is: HIGH if the strongest token is. median, HIGH, n: of the same "
    "word in the run, in upper or lower case (median of the strongest tokens, share that is HIGH, "
    "occurrences)."
)


def word_cells(explanation: Explanation, at: int) -> list[list[str]]:
    """Rows of the table of words at the layer with index ``at``, as in ``WORD_HEADS``."""
    rows = []
    for word in explanation.words:
        reading = word.readings[at]
        usual = reading.usual
        figures = ["rare", "", ""]
        if usual is not None:
            figures = _usual_cells(usual)
        is_high = "HIGH" if reading.high else "LOW"
        cells = [visible(word.text), f"{word.n_tokens}", f"{reading.strength:.4f}", is_high]
        rows.append([*cells, *figures])
    return rows


SIGNALS_LEGEND = (
    "In parentheses, and coloured by it: the quartile among the run's tokens, where the run "
    "recorded the signal."
)
SWEEP_LEGEND = (
    "Strength's rank within its layer among the tokens of this text: 0 is the lowest tenth, 9 the "
    "highest; behind a slash the quartile among the run's tokens, at layers that it recorded. "
    "Special tokens are apart."
)
DECISION_LEGEND = (
    "attribution: value times gradient of the answer's logit at this layer, summed over the "
    "dimensions of a token's hidden state, and over tokens for a neuron of the MLP; ranked by "
    "size. #2 is the second such token of the text. Special tokens take part in the decision and "
    "are left out of ranks and correlation."
)


def signal_rows(explanation: Explanation, at: int) -> tuple[list[str], list[list[tuple[str, int]]]]:
    """Names of the signals and, for each token, their values as text with a quartile (0: none).

    Strength comes first. No names where there is no other signal.
    """
    first = explanation.tokens[0].readings[at]
    if not first.signals:
        return [], []
    rows = []
    for token in explanation.tokens:
        reading = token.readings[at]
        of_signals = [(signal.value, signal.quartile) for signal in reading.signals]
        rows.append([(reading.strength, reading.quartile), *of_signals])
    digits = []
    for column in zip(*rows, strict=True):
        largest = max(value for value, _ in column)
        digits.append(4 if largest >= 1 else 5)
    shown = []
    for row in rows:
        cells = []
        for n, (value, quartile) in zip(digits, row, strict=True):
            text = f"{value:.{n}f}"
            if quartile:
                text += f" ({quartile})"
            cells.append((text, quartile or 0))
        shown.append(cells)
    return [STRENGTH, *(signal.signal for signal in first.signals)], shown


def heat_cell(cell: Cell) -> str:
    """A token's cell in the heat map."""
    if cell.decile is None:
        return "·"
    return f"{cell.decile}/{cell.quartile}" if cell.quartile else f"{cell.decile}"


def answer(decision: Decision) -> str:
    """The classifier's labels, the most likely first."""
    if decision.kind == "value":
        return ", ".join(f"{visible(label.name)} {label.value:.4f}" for label in decision.labels)
    best = sorted(decision.labels, key=lambda label: -label.value)
    rest = f", and {len(best) - TOP} less likely" if len(best) > TOP else ""
    how = "one" if decision.kind == "one" else "any"
    return (
        ", ".join(f"{visible(label.name)} {label.value:.1%}" for label in best[:TOP])
        + f"{rest} ({how} of {len(best)} labels)"
    )


def attribution_note(explanation: Explanation, decision: Decision) -> str:
    """The label that is explained, and how its attributions correlate with strength."""
    special = sum(
        a for a, t in zip(decision.attributions, explanation.tokens, strict=True) if t.special
    )
    rho = "not defined" if decision.spearman is None else f"{decision.spearman:.2f}"
    n = sum(not t.special for t in explanation.tokens)
    return (
        f"Behind {visible(decision.labels[decision.chosen].name)}, at layer {decision.layer}: "
        f"attributions sum to {sum(decision.attributions):+.4f}, of which {special:+.4f} at "
        f"special tokens; Spearman's rho of strength and size of attribution {rho} ({n} tokens)"
    )


def _numbered(explanation: Explanation) -> list[str]:
    """Names of the tokens; repeated names get a number."""
    names = [token_name(token) for token in explanation.tokens]
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(f"{name} #{seen[name]}" if names.count(name) > 1 else name)
    return found


DECISION_HEADS = ("rank", "by strength", "strength", "by attribution", "attribution")
NEURON_HEADS = ("neuron", "attribution", "most at", "attribution there")


def decision_rows(explanation: Explanation, decision: Decision) -> list[tuple[str, ...]]:
    """Rows under ``DECISION_HEADS``: the highest ranked tokens, without special ones."""
    at = explanation.layers.index(decision.layer)
    names = _numbered(explanation)
    scored = []
    of_tokens = zip(names, explanation.tokens, decision.attributions, strict=True)
    for name, token, attribution in of_tokens:
        if not token.special:
            scored.append((name, token.readings[at].strength, attribution))
    by_strength = sorted(scored, key=lambda row: -row[1])[:TOP]
    by_attribution = sorted(scored, key=lambda row: -abs(row[2]))[:TOP]
    return [
        (f"{rank}", strong[0], f"{strong[1]:.4f}", weighty[0], f"{weighty[2]:+.4f}")
        for rank, (strong, weighty) in enumerate(zip(by_strength, by_attribution, strict=True), 1)
    ]


def neuron_rows(explanation: Explanation, decision: Decision) -> list[tuple[str, ...]]:
    """Rows under ``NEURON_HEADS``: the highest ranked neurons."""
    names = _numbered(explanation)
    return [
        (f"{n.neuron}", f"{n.attribution:+.4f}", names[n.token], f"{n.attribution_there:+.4f}")
        for n in decision.neurons
    ]


def legends(explanation: Explanation, at: int) -> list[str]:
    asked = (
        (True, LEGEND),
        (explanation.words, WORDS_LEGEND),
        (explanation.tokens[0].readings[at].signals, SIGNALS_LEGEND),
        (explanation.sweep, SWEEP_LEGEND),
        (explanation.decision, DECISION_LEGEND),
    )
    return [*(legend for there, legend in asked if there), *explanation.notes]


def limits_of(t: Thresholds) -> dict[int, str]:
    return {
        1: f"1 < {t.q1:.4f}",
        2: f"2 < {t.q2:.4f}",
        3: f"3 < {t.q3:.4f}",
        4: f"4 HIGH ≥ {t.q3:.4f}",
    }


TEXTS = ("by strength", "by attribution", "most at")
"""Columns of a decision that hold tokens."""


def layer_name(layer: int) -> str:
    return f"Layer {layer}" + (" (embeddings)" if layer == 0 else "")
