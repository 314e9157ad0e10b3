"""Output of an explained text, coloured by quartile: on a terminal and as an HTML page."""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from html import escape

from rich import box
from rich.cells import cell_len, set_cell_size
from rich.console import Console, JustifyMethod
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from afn_ray.analysis.explain import (
    TOP,
    Cell,
    Decision,
    Explanation,
    Reading,
    Thresholds,
    Token,
    index_of,
)
from afn_ray.schema import STRENGTH
from afn_ray.text import visible

TABLE_ROWS = 40
"""Largest number of rows of the terminal's table, without ``show_all``."""
QUARTILES = {1: "1", 2: "2", 3: "3", 4: "4 HIGH"}


# --- the text for reading


def _running(explanation: Explanation) -> Iterator[tuple[str, Token | None]]:
    """The text in order, cut into tokens and the parts between them (None); each character once.

    White space before a token's first letter counts as between. Where tokens share a character
    (byte-level pieces), the first one shows it.
    """
    text, cursor = explanation.text, 0
    for token in explanation.tokens:
        body = text[max(cursor, token.start) : token.end]
        if token.special or not body:
            continue
        begin = token.end - len(body.lstrip() or body)
        if cursor < begin:
            yield _shown(text[cursor:begin]), None
        yield _shown(text[begin : token.end]), token
        cursor = token.end
    if cursor < len(text):
        yield _shown(text[cursor:]), None


def _shown(text: str) -> str:
    return visible(text.replace("\r\n", "\n"), keep="\n\t")


def _token_name(token: Token) -> str:
    """A token as a table shows it; one that continues a word begins with an ellipsis."""
    if token.special:
        return visible(token.piece)
    text = visible(token.text.strip()) or visible(token.text).replace(" ", "␣")
    return text if token.word_start else f"…{text}"


def _cells(token: Token, reading: Reading) -> list[str]:
    """Cells of a token's table row after the token: strength to n, as in ``HEADS``."""
    usual = reading.usual
    return [
        f"{reading.strength:.4f}",
        "special" if reading.quartile is None else QUARTILES[reading.quartile],
        "" if reading.rank is None else f"{reading.rank:.1%}",
        *(
            ("not in run", "", "0")
            if usual is None
            else (
                f"{usual.median:.4f}",
                "" if token.special else f"{usual.share_high:.0%}",
                f"{usual.n:,}",
            )
        ),
    ]


HEADS = ("token", "strength", "quartile", "rank", "median", "HIGH", "n")
LEGEND = (
    "rank: share of the run's tokens at or below this strength. median, HIGH, n: of the same type "
    "in the run "
    "(median strength, share that is HIGH, occurrences). Special tokens are apart. Compare "
    "strengths within one "
    "layer of one model only."
)


SIGNALS_LEGEND = (
    "In parentheses, and coloured by it: the quartile among the run's tokens, where the run "
    "recorded the signal."
)
SWEEP_LEGEND = (
    "Strength's rank within its layer among the tokens of this text: 0 is the lowest tenth, 9 the "
    "highest; behind a "
    "slash the quartile among the run's tokens, at layers that it recorded. Special tokens are "
    "apart."
)
DECISION_LEGEND = (
    "attribution: value times gradient of the answer's logit at this layer, summed over the "
    "dimensions of a token's "
    "hidden state, and over tokens for a neuron of the MLP; ranked by size. #2 is the second such "
    "token of the text. "
    "Special tokens take part in the decision and are left out of ranks and correlation."
)


def _value_rows(explanation: Explanation, at: int) -> tuple[list[str], list[list[tuple[str, int]]]]:
    """Names of the signals and, for each token, their values as text with a quartile (0: none).

    Strength comes first. No names where there is no other signal.
    """
    first = explanation.tokens[0].readings[at]
    if not first.signals:
        return [], []
    rows = [
        [(r.strength, r.quartile), *((v.value, v.quartile) for v in r.signals)]
        for r in (token.readings[at] for token in explanation.tokens)
    ]
    digits = [
        4 if max(value for value, _ in column) >= 1 else 5 for column in zip(*rows, strict=True)
    ]
    return [STRENGTH, *(v.signal for v in first.signals)], [
        [
            (f"{value:.{n}f}" + (f" ({quartile})" if quartile else ""), quartile or 0)
            for n, (value, quartile) in zip(digits, row, strict=True)
        ]
        for row in rows
    ]


def _cell(cell: Cell) -> str:
    """A token's cell in the heat map."""
    return (
        "·"
        if cell.decile is None
        else f"{cell.decile}" + (f"/{cell.quartile}" if cell.quartile else "")
    )


def _answer(decision: Decision) -> str:
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


def _behind(explanation: Explanation, decision: Decision) -> str:
    """The label that is explained, and how its attributions correlate with strength."""
    special = sum(
        a for a, t in zip(decision.attributions, explanation.tokens, strict=True) if t.special
    )
    rho = "not defined" if decision.spearman is None else f"{decision.spearman:.2f}"
    n = sum(not t.special for t in explanation.tokens)
    return (
        f"Behind {visible(decision.labels[decision.chosen].name)}, at layer {decision.layer}: "
        "attributions sum to "
        f"{sum(decision.attributions):+.4f}, of which {special:+.4f} at special tokens; Spearman's "
        "rho of strength and "
        f"size of attribution {rho} ({n} tokens)"
    )


def _numbered(explanation: Explanation) -> list[str]:
    """Names of the tokens; repeated names get a number."""
    names = [_token_name(token) for token in explanation.tokens]
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(f"{name} #{seen[name]}" if names.count(name) > 1 else name)
    return found


DECISION_HEADS = ("rank", "by strength", "strength", "by attribution", "attribution")
NEURON_HEADS = ("neuron", "attribution", "most at", "attribution there")


def _decision_rows(explanation: Explanation, decision: Decision) -> list[tuple[str, ...]]:
    """Rows under ``DECISION_HEADS``: the highest ranked tokens, without special ones."""
    at = explanation.layers.index(decision.layer)
    scored = [
        (name, t.readings[at].strength, a)
        for name, t, a in zip(
            _numbered(explanation), explanation.tokens, decision.attributions, strict=True
        )
        if not t.special
    ]
    by_strength = sorted(scored, key=lambda row: -row[1])[:TOP]
    by_attribution = sorted(scored, key=lambda row: -abs(row[2]))[:TOP]
    return [
        (f"{rank}", strong[0], f"{strong[1]:.4f}", weighty[0], f"{weighty[2]:+.4f}")
        for rank, (strong, weighty) in enumerate(zip(by_strength, by_attribution, strict=True), 1)
    ]


def _neuron_rows(explanation: Explanation, decision: Decision) -> list[tuple[str, ...]]:
    """Rows under ``NEURON_HEADS``: the highest ranked neurons."""
    names = _numbered(explanation)
    return [
        (f"{n.neuron}", f"{n.attribution:+.4f}", names[n.token], f"{n.attribution_there:+.4f}")
        for n in decision.neurons
    ]


def _legends(explanation: Explanation, at: int) -> list[str]:
    asked = (
        (True, LEGEND),
        (explanation.tokens[0].readings[at].signals, SIGNALS_LEGEND),
        (explanation.sweep, SWEEP_LEGEND),
        (explanation.decision, DECISION_LEGEND),
    )
    return [*(legend for there, legend in asked if there), *explanation.notes]


def _limits(t: Thresholds) -> dict[int, str]:
    return {
        1: f"1 < {t.q1:.4f}",
        2: f"2 < {t.q2:.4f}",
        3: f"3 < {t.q3:.4f}",
        4: f"4 HIGH ≥ {t.q3:.4f}",
    }


# --- terminal

TERMINAL = {
    1: "",
    2: "#10202c on #9cc3dc",
    3: "#241a00 on #f2b84b",
    4: "bold underline #ffffff on #b23a0e",
}
"""Styles of the quartiles.

The first keeps the terminal's colours; the others set their own background, so all four are legible
on dark and light. Bold and underline mark HIGH without colour.
"""


def render_terminal(
    explanation: Explanation, layer: int | None, console: Console, *, show_all: bool = False
) -> None:
    """Print the text coloured by quartile at ``layer``, then a table of its tokens.

    ``layer`` None is the deepest recorded one. The table stops after ``TABLE_ROWS`` rows unless
    ``show_all``. Raises ``ConfigError`` for a layer that was not recorded.
    """
    at = index_of(explanation.layers, layer)
    n = f"{explanation.thresholds[at].n:,}"
    head = (
        f"{_layer_name(explanation.layers[at])}, against {n} tokens of {visible(explanation.run)}"
    )
    console.print(Text(head, "bold"), soft_wrap=True)
    running = Text(overflow="fold")
    for text, token in _running(explanation):
        running.append(text, TERMINAL[token.readings[at].quartile or 1] if token else "")
    console.print(Padding(running, (1, 2)))
    legend = Text("  quartile ")
    for quartile, limits in _limits(explanation.thresholds[at]).items():
        legend.append(" ").append(f" {limits} ", TERMINAL[quartile])
    console.print(legend)
    table = Table(box=box.SIMPLE_HEAD)
    for i, head in enumerate(HEADS):
        justify: JustifyMethod = "left" if head in ("token", "quartile") else "right"
        table.add_column(head, justify=justify, overflow="fold", no_wrap=i > 0)
    shown = explanation.tokens if show_all else explanation.tokens[:TABLE_ROWS]
    for token in shown:
        reading = token.readings[at]
        label = Text.assemble(
            (_token_name(token), TERMINAL[reading.quartile or 1])
        )  # colours only its letters
        table.add_row(label, *_cells(token, reading), style="dim" if token.special else "")
    console.print(table)
    _print_signals(explanation, at, console, len(shown))
    _print_sweep(explanation, console, len(shown))
    if hidden := len(explanation.tokens) - len(shown):
        console.print(Text(f"  {hidden:,} more tokens are not listed; --all lists them"))
    if explanation.decision is not None:
        _print_decision(explanation, explanation.decision, console)
    for note in _legends(explanation, at):
        console.print(Padding(Text(visible(note), "dim"), (0, 2)))


def _print_signals(explanation: Explanation, at: int, console: Console, n: int) -> None:
    names, rows = _value_rows(explanation, at)
    if not names:
        return
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"Signals at layer {explanation.layers[at]}",
        title_justify="left",
        title_style="bold",
    )
    table.add_column(
        "token",
        overflow="fold",
        min_width=min(12, max(cell_len(_token_name(t)) for t in explanation.tokens)),
    )
    for name in names:
        table.add_column(name.replace("_", "_\n"), justify="right", no_wrap=True)
    for token, row in zip(explanation.tokens[:n], rows, strict=False):
        values = [Text.assemble((text, TERMINAL[quartile or 1])) for text, quartile in row]
        table.add_row(Text(_token_name(token)), *values, style="dim" if token.special else "")
    console.print(table)


NAME_WIDTH = 24


def _print_sweep(explanation: Explanation, console: Console, n: int) -> None:
    """Print the heat map of the first ``n`` tokens, in parts that fit the console's width."""
    layers = list(explanation.sweep)
    width = min(NAME_WIDTH, max(cell_len(_token_name(t)) for t in explanation.tokens[:n]))
    if layers:
        console.print(Text("Rank of strength within each layer", "bold"))
    while layers:
        part: list[int] = []
        while layers and width + 7 * (len(part) + 1) < console.width - 2:
            part.append(layers.pop(0))
        part = part or [layers.pop(0)]
        at = [explanation.sweep.index(k) for k in part]
        widths = [5 if k in explanation.layers else 3 for k in part]
        heads = "".join(f"{k:^{w}} " for k, w in zip(part, widths, strict=True))
        console.print(Text(f"\n  {set_cell_size('layer', width)}  {heads}", "bold"), no_wrap=True)
        for token in explanation.tokens[:n]:
            line = Text(
                f"  {set_cell_size(_token_name(token), width)}  ", "dim" if token.special else ""
            )
            for i, w in zip(at, widths, strict=True):
                cell = token.cells[i]
                colours = "" if cell.decile is None else "{} on {}".format(*LIGHT_HEAT[cell.decile])
                line.append(f"{_cell(cell):^{w}}", colours).append(" ")
            console.print(line, no_wrap=True)
    if explanation.sweep:
        console.print()


def _print_decision(explanation: Explanation, decision: Decision, console: Console) -> None:
    console.print(Text(f"Decision: {_answer(decision)}", "bold"), soft_wrap=True)
    console.print(Padding(Text(_behind(explanation, decision)), (0, 2)))
    for heads, rows in (
        (DECISION_HEADS, _decision_rows(explanation, decision)),
        (NEURON_HEADS, _neuron_rows(explanation, decision)),
    ):
        if rows:
            table = Table(box=box.SIMPLE_HEAD)
            for head in heads:
                justify: JustifyMethod = "left" if head in TEXTS else "right"
                table.add_column(head, justify=justify, overflow="fold", no_wrap=justify == "right")
            for row in rows:
                table.add_row(*map(Text, row))
            console.print(table)


TEXTS = ("by strength", "by attribution", "most at")
"""Columns of a decision that hold tokens."""


# --- page

LIGHT = {
    0: ("#1c2024", "#ffffff"),
    2: ("#10202c", "#cfe3f1"),
    3: ("#241a00", "#f8ce7c"),
    4: ("#ffffff", "#b23a0e"),
}
DARK = {
    0: ("#e4e7ea", "#15181c"),
    2: ("#eaf3fa", "#27485f"),
    3: ("#fff8e8", "#7a5200"),
    4: ("#2a0c00", "#ff9d66"),
}
"""Text and background colours of the page (0) and of quartiles 2 to 4.

The first quartile has the page's colours.
"""


def _ramp(low: str, high: str) -> list[tuple[str, str]]:
    """Text and background colours of the ten deciles of a heat map.

    The background is a mixture of ``low`` and ``high``; the text is black or white, whichever has
    more contrast.
    """
    colours = []
    for tenth in range(10):
        parts = [
            round(int(low[i : i + 2], 16) * (9 - tenth) / 9 + int(high[i : i + 2], 16) * tenth / 9)
            for i in (1, 3, 5)
        ]
        linear = [p / 3294.6 if p <= 10 else ((p / 255 + 0.055) / 1.055) ** 2.4 for p in parts]
        luminance = sum(
            weight * p for weight, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True)
        )
        colours.append(
            (
                "#000000" if luminance > 0.179 else "#ffffff",
                "#" + "".join(f"{p:02x}" for p in parts),
            )
        )
    return colours


LIGHT_HEAT = _ramp("#fdf3e7", LIGHT[4][1])
DARK_HEAT = _ramp("#20262c", DARK[4][1])

STYLE = """
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; font: 1rem/1.5 system-ui, sans-serif;
  color: var(--text-0); background: var(--page-0); }
h1 { font-size: 1.4rem; } h2 { font-size: 1.15rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; } dd { margin: 0; overflow-wrap: anywhere; }
fieldset { border: 0; padding: 0; } legend { font-weight: bold; } label { margin-right: 1rem; }
.text { font-size: 1.2rem; line-height: 2; white-space: pre-wrap; overflow-wrap: anywhere; }
.q2, .q3, .q4 { border-radius: .2em; padding: .05em 0; }
.q2 { color: var(--text-2); background: var(--page-2); }
.q3 { color: var(--text-3); background: var(--page-3); }
.q4 { color: var(--text-4); background: var(--page-4); font-weight: bold; text-decoration: underline; }
.legend { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .3rem 1rem; }
.legend span { padding: .1em .4em; border: 1px solid; border-radius: .2em; }
.table { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .3rem 0; }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid var(--page-2); }
th:first-child, td:first-child, th:nth-child(3), td:nth-child(3) { text-align: left; }
td:first-child span { padding: .05em .3em; }
.values :is(th, td):nth-child(3), .decision :is(th, td):is(:first-child, :nth-child(3)) { text-align: right; }
.decision :is(th, td).name:is(*, :nth-child(3)) { text-align: left; }
.table + .table { margin-top: 1rem; }
.heat { width: auto; border-collapse: separate; border-spacing: 2px; }
.heat th, .heat td, .heat td:nth-child(3) { text-align: center; border: 0; padding: .15rem .4rem; }
.heat tbody th { text-align: left; font-weight: normal; }
HEAT@media print {
  body { max-width: none; margin: 0; } fieldset { display: none; }
  .q2, .q3, .q4, .heat td { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  thead { display: table-header-group; } tr { break-inside: avoid; }
}
""".replace(
    "HEAT",
    "".join(
        f".h{i} {{ color: var(--ink-{i}); background: var(--heat-{i}); }}\n" for i in range(10)
    ),
)


def render_html(explanation: Explanation) -> str:
    """A self-contained page: light and dark, printable, no script and no network.

    Its Content-Security-Policy forbids both.
    """
    layers = explanation.layers
    style = _style(layers)
    policy = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    measured = f"{len(explanation.tokens):,} tokens, {explanation.dtype} on {explanation.device}"
    facts = (("Run", explanation.run), ("Model", explanation.model), ("Measured", measured))
    switch = "".join(
        f'<input type="radio" name="layer" id="show-{k}"{" checked" if k == layers[-1] else ""}>'
        f'<label for="show-{k}">{_layer_name(k)}</label>\n'
        for k in layers
    )
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta http-equiv="Content-Security-Policy" content="'
            f"default-src 'none'; style-src 'sha256-{policy}'; base-uri 'none'; form-action "
            "'none'\">",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">\n<title>Token Activation Strength of a text</title>',
            f"<style>{style}</style>\n</head>\n<body>\n<main>\n<h1>Token Activation Strength of a "
            "text</h1>\n<dl>",
            *(f"<dt>{name}</dt><dd>{_html(value)}</dd>" for name, value in facts),
            "</dl>",
            f"<fieldset><legend>Show</legend>\n{switch}</fieldset>" if len(layers) > 1 else "",
            *(_html_layer(explanation, at) for at in range(len(layers))),
            _html_sweep(explanation) if explanation.sweep else "",
            _html_decision(explanation, explanation.decision)
            if explanation.decision is not None
            else "",
            *(f"<p>{_html(note)}</p>" for note in _legends(explanation, len(layers) - 1)),
            "</main>\n</body>\n</html>\n",
        ]
    )


def _style(layers: tuple[int, ...]) -> str:
    light, dark = (
        " ".join(
            [
                *(
                    f"--text-{k}: {text}; --page-{k}: {page};"
                    for k, (text, page) in colours.items()
                ),
                *(f"--ink-{k}: {ink}; --heat-{k}: {page};" for k, (ink, page) in enumerate(heat)),
            ]
        )
        for colours, heat in ((LIGHT, LIGHT_HEAT), (DARK, DARK_HEAT))
    )
    shown = " ".join(
        f"body:has(#show-{k}:checked) #layer-{k} {{ display: block; }}" for k in layers
    )
    switch = (
        f"@supports selector(:has(a)) {{ section {{ display: none; }} {shown} }}\n"
        if len(layers) > 1
        else ""
    )
    return (
        f"\n:root {{ color-scheme: light dark; {light} }}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}{STYLE}{switch}"
    )


def _html_layer(explanation: Explanation, at: int) -> str:
    layer = explanation.layers[at]
    running = "".join(
        f'<span class="q{token.readings[at].quartile}" title="{_title(token, at)}">{_html(text)}</span>'
        if token
        else _html(text)
        for text, token in _running(explanation)
    )
    limits = _limits(explanation.thresholds[at])
    legend = "".join(
        f'<li><span class="q{quartile}">{_html(text)}</span></li>'
        for quartile, text in limits.items()
    )
    rows = "\n".join(
        f'<tr><td><span class="q{token.readings[at].quartile or 0}"><bdi>{_html(_token_name(token))}</bdi></span></td>'
        + "".join(f"<td>{cell}</td>" for cell in _cells(token, token.readings[at]))
        + "</tr>"
        for token in explanation.tokens
    )
    heads = "".join(f'<th scope="col">{head}</th>' for head in HEADS)
    return (
        f'<section id="layer-{layer}">\n<h2>{_layer_name(layer)}</h2>\n<p class="text" dir="auto">{running}</p>\n'
        f'<ul class="legend" aria-label="Quartiles of {explanation.thresholds[at].n:,} tokens">{legend}</ul>\n'
        f'<div class="table"><table>\n<caption>Tokens at layer {layer}</caption>\n'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>\n"
        f"{_html_signals(explanation, at)}</section>"
    )


def _html_signals(explanation: Explanation, at: int) -> str:
    names, rows = _value_rows(explanation, at)
    if not names:
        return ""
    body = (
        [
            f"<bdi>{_html(_token_name(token))}</bdi>",
            *(f'<span class="q{quartile}">{text}</span>' for text, quartile in row),
        ]
        for token, row in zip(explanation.tokens, rows, strict=True)
    )
    return _html_table(
        "values", f"Signals at layer {explanation.layers[at]}", ["token", *names], body
    )


def _html_table(
    kind: str, caption: str, heads: Iterable[str], rows: Iterable[Iterable[str]]
) -> str:
    """A table of ``rows`` whose cells are HTML already."""
    head = "".join(f'<th scope="col"{_aligned(name)}>{_html(name)}</th>' for name in heads)
    names = list(heads)
    body = "\n".join(
        "<tr>"
        + "".join(f"<td{_aligned(name)}>{cell}</td>" for name, cell in zip(names, row, strict=True))
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="table"><table class="{kind}">\n<caption>{caption}</caption>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>\n"
    )


def _aligned(name: str) -> str:
    return ' class="name"' if name in TEXTS else ""


def _html_sweep(explanation: Explanation) -> str:
    heads = "".join(f'<th scope="col">{k}</th>' for k in explanation.sweep)
    rows = "\n".join(
        f'<tr><th scope="row"><bdi>{_html(_token_name(token))}</bdi></th>'
        + "".join(
            f'<td class="h{"" if c.decile is None else c.decile}" '
            f'title="layer {c.layer}: strength {c.strength:.4f}">{_cell(c)}</td>'
            for c in token.cells
        )
        + "</tr>"
        for token in explanation.tokens
    )
    return (
        f'<div>\n<h2>Layers</h2>\n<div class="table"><table class="heat">\n<caption>Rank of strength by token and layer'
        f'</caption>\n<thead><tr><th scope="col">token</th>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n'
        "</table></div>\n</div>"
    )


def _html_decision(explanation: Explanation, decision: Decision) -> str:
    tables = (
        ("Tokens that rank highest", DECISION_HEADS, _decision_rows(explanation, decision)),
        ("Neurons that rank highest", NEURON_HEADS, _neuron_rows(explanation, decision)),
    )
    shown = "".join(
        _html_table(
            "decision",
            caption,
            heads,
            [[f"<bdi>{_html(cell)}</bdi>" for cell in row] for row in rows],
        )
        for caption, heads, rows in tables
        if rows
    )
    return (
        f"<div>\n<h2>Decision</h2>\n<p><strong>{_html(_answer(decision))}</strong></p>\n"
        f"<p>{_html(_behind(explanation, decision))}</p>\n{shown}</div>"
    )


def _layer_name(layer: int) -> str:
    return f"Layer {layer}" + (" (embeddings)" if layer == 0 else "")


def _title(token: Token, at: int) -> str:
    """Tooltip of a token."""
    strength, quartile, rank, median, _, n = _cells(token, token.readings[at])
    usual = f"its type has median {median}, n {n}" if token.readings[at].usual else median
    return _html(
        f"{_token_name(token)}: strength {strength}, quartile {quartile}, rank {rank}; {usual}"
    )


def _html(text: str) -> str:
    return escape(visible(text, keep="\n\t"), quote=True)
