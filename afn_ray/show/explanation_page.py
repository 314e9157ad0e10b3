"""An explained text as a self-contained HTML page."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from afn_ray.analysis.explanation import (
    Cell,
    Decision,
    ExplainedToken,
    Explanation,
    running_text,
)
from afn_ray.show.colours import DARK, DARK_HEAT, LIGHT, LIGHT_HEAT
from afn_ray.show.explanation import (
    DECISION_HEADS,
    HEADS,
    NEURON_HEADS,
    TEXTS,
    WORD_HEADS,
    answer,
    attribution_note,
    decision_rows,
    heat_cell,
    layer_name,
    legends,
    limits_of,
    neuron_rows,
    reading_cells,
    signal_rows,
    token_name,
    word_cells,
)
from afn_ray.text import count, visible

STYLE = """
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; font: 1rem/1.5 system-ui, sans-serif;
  color: var(--text-0); background: var(--page-0); }
h1 { font-size: 1.4rem; } h2 { font-size: 1.15rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; }
dd { margin: 0; overflow-wrap: anywhere; }
fieldset { border: 0; padding: 0; } legend { font-weight: bold; } label { margin-right: 1rem; }
.text { font-size: 1.2rem; line-height: 2; white-space: pre-wrap; overflow-wrap: anywhere; }
.q2, .q3, .q4 { border-radius: .2em; padding: .05em 0; }
.q2 { color: var(--text-2); background: var(--page-2); }
.q3 { color: var(--text-3); background: var(--page-3); }
.q4 { color: var(--text-4); background: var(--page-4); font-weight: bold;
  text-decoration: underline; }
.legend { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .3rem 1rem; }
.legend span { padding: .1em .4em; border: 1px solid; border-radius: .2em; }
.table { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .3rem 0; }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid var(--page-2); }
th:first-child, td:first-child, th:nth-child(3), td:nth-child(3) { text-align: left; }
td:first-child span { padding: .05em .3em; }
.values :is(th, td):nth-child(3),
.decision :is(th, td):is(:first-child, :nth-child(3)) { text-align: right; }
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
    digest = hashlib.sha256(style.encode()).digest()
    policy = base64.b64encode(digest).decode()
    measured = (
        f"{count(len(explanation.tokens), 'token')}, {explanation.dtype} on {explanation.device}"
    )
    facts = (("Run", explanation.run), ("Model", explanation.model), ("Measured", measured))
    switch = "".join(
        f'<input type="radio" name="layer" id="show-{k}"{" checked" if k == layers[-1] else ""}>'
        f'<label for="show-{k}">{layer_name(k)}</label>\n'
        for k in layers
    )
    sweep = _html_sweep(explanation) if explanation.sweep else ""
    decision = ""
    if explanation.decision is not None:
        decision = _html_decision(explanation, explanation.decision)
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta http-equiv="Content-Security-Policy" content="'
            f"default-src 'none'; style-src 'sha256-{policy}'; base-uri 'none'; form-action "
            "'none'\">",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">\n<title>Token Activation Strength of '
            "a text</title>",
            f"<style>{style}</style>\n</head>\n<body>\n<main>\n<h1>Token Activation Strength of a "
            "text</h1>\n<dl>",
            *(f"<dt>{name}</dt><dd>{_html(value)}</dd>" for name, value in facts),
            "</dl>",
            f"<fieldset><legend>Show</legend>\n{switch}</fieldset>" if len(layers) > 1 else "",
            *(_html_layer(explanation, at) for at in range(len(layers))),
            sweep,
            decision,
            *(f"<p>{_html(note)}</p>" for note in legends(explanation, len(layers) - 1)),
            "</main>\n</body>\n</html>\n",
        ]
    )


def _style(layers: tuple[int, ...]) -> str:
    light = _properties(LIGHT, LIGHT_HEAT)
    dark = _properties(DARK, DARK_HEAT)
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


def _properties(colours: Mapping[int, tuple[str, str]], heat: Sequence[tuple[str, str]]) -> str:
    """CSS properties with the ``colours`` of quartiles and those of deciles, ``heat``."""
    properties = []
    for quartile, (text, page) in colours.items():
        properties.append(f"--text-{quartile}: {text}; --page-{quartile}: {page};")
    for decile, (ink, page) in enumerate(heat):
        properties.append(f"--ink-{decile}: {ink}; --heat-{decile}: {page};")
    return " ".join(properties)


def _html_layer(explanation: Explanation, at: int) -> str:
    layer = explanation.layers[at]
    running = "".join(
        f'<span class="q{token.readings[at].quartile}" '
        f'title="{_title(token, at)}">{_html(text)}</span>'
        if token
        else _html(text)
        for text, token in running_text(explanation)
    )
    limits = limits_of(explanation.thresholds[at])
    legend = "".join(
        f'<li><span class="q{quartile}">{_html(text)}</span></li>'
        for quartile, text in limits.items()
    )
    rows = "\n".join(_html_token_row(token, at) for token in explanation.tokens)
    heads = "".join(f'<th scope="col">{head}</th>' for head in HEADS)
    return (
        f'<section id="layer-{layer}">\n<h2>{layer_name(layer)}</h2>\n<p class="text" '
        f'dir="auto">{running}</p>\n'
        f'<ul class="legend" aria-label="Quartiles of {explanation.thresholds[at].n:,} '
        f'tokens">{legend}</ul>\n'
        f'<div class="table"><table>\n<caption>Tokens at layer {layer}</caption>\n'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>\n"
        f"{_html_words(explanation, at)}{_html_signals(explanation, at)}</section>"
    )


def _html_token_row(token: ExplainedToken, at: int) -> str:
    """The row of ``token`` in the table of a layer."""
    reading = token.readings[at]
    name = f"<bdi>{_html(token_name(token))}</bdi>"
    cells = "".join(f"<td>{cell}</td>" for cell in reading_cells(reading))
    return f'<tr><td><span class="q{reading.quartile or 0}">{name}</span></td>{cells}</tr>'


def _html_words(explanation: Explanation, at: int) -> str:
    rows = word_cells(explanation, at)
    if not rows:
        return ""
    caption = f"Words of several tokens at layer {explanation.layers[at]}"
    body = ([f"<bdi>{_html(word)}</bdi>", *cells] for word, *cells in rows)
    return _html_table("", caption, WORD_HEADS, body)


def _html_signals(explanation: Explanation, at: int) -> str:
    names, rows = signal_rows(explanation, at)
    if not names:
        return ""
    body = []
    for token, row in zip(explanation.tokens, rows, strict=True):
        cells = [f'<span class="q{quartile}">{text}</span>' for text, quartile in row]
        body.append([f"<bdi>{_html(token_name(token))}</bdi>", *cells])
    return _html_table(
        "values", f"Signals at layer {explanation.layers[at]}", ["token", *names], body
    )


def _html_table(
    kind: str, caption: str, heads: Sequence[str], rows: Iterable[Iterable[str]]
) -> str:
    """A table of ``rows`` whose cells are HTML already."""
    head = "".join(f'<th scope="col"{_aligned(name)}>{_html(name)}</th>' for name in heads)
    lines = []
    for row in rows:
        cells = zip(heads, row, strict=True)
        line = "".join(f"<td{_aligned(name)}>{cell}</td>" for name, cell in cells)
        lines.append(f"<tr>{line}</tr>")
    body = "\n".join(lines)
    return (
        '<div class="table"><table '
        f'class="{kind}">\n<caption>{caption}</caption>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>\n"
    )


def _aligned(name: str) -> str:
    return ' class="name"' if name in TEXTS else ""


def _html_sweep(explanation: Explanation) -> str:
    heads = "".join(f'<th scope="col">{k}</th>' for k in explanation.sweep)
    lines = []
    for token in explanation.tokens:
        name = f'<th scope="row"><bdi>{_html(token_name(token))}</bdi></th>'
        cells = "".join(map(_html_heat_cell, token.cells))
        lines.append(f"<tr>{name}{cells}</tr>")
    rows = "\n".join(lines)
    return (
        '<div>\n<h2>Layers</h2>\n<div class="table"><table class="heat">\n<caption>Rank of '
        "strength by token and layer"
        "</caption>\n<thead><tr><th "
        f'scope="col">token</th>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n'
        "</table></div>\n</div>"
    )


def _html_heat_cell(cell: Cell) -> str:
    decile = "" if cell.decile is None else cell.decile
    title = f"layer {cell.layer}: strength {cell.strength:.4f}"
    return f'<td class="h{decile}" title="{title}">{heat_cell(cell)}</td>'


def _html_decision(explanation: Explanation, decision: Decision) -> str:
    tables = (
        ("Tokens that rank highest", DECISION_HEADS, decision_rows(explanation, decision)),
        ("Neurons that rank highest", NEURON_HEADS, neuron_rows(explanation, decision)),
    )
    shown = ""
    for caption, heads, rows in tables:
        if rows:
            body = [[f"<bdi>{_html(cell)}</bdi>" for cell in row] for row in rows]
            shown += _html_table("decision", caption, heads, body)
    return (
        f"<div>\n<h2>Decision</h2>\n<p><strong>{_html(answer(decision))}</strong></p>\n"
        f"<p>{_html(attribution_note(explanation, decision))}</p>\n{shown}</div>"
    )


def _title(token: ExplainedToken, at: int) -> str:
    """Tooltip of a token."""
    strength, quartile, rank, median, _, n = reading_cells(token.readings[at])
    usual = f"its type has median {median}, n {n}" if token.readings[at].usual else median
    return _html(
        f"{token_name(token)}: strength {strength}, quartile {quartile}, rank {rank}; {usual}"
    )


def _html(text: str) -> str:
    return escape(visible(text, keep="\n\t"), quote=True)
