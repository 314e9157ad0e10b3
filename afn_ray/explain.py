"""One text against a run: its tokens coloured by quartile, with strengths and ranks."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from html import escape
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich import box
from rich.console import Console, JustifyMethod
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from afn_ray import cluster, manifest, model, pipeline
from afn_ray.config import config_from
from afn_ray.errors import ConfigError, ModelError
from afn_ray.schema import SPECIAL, WORD_START

TABLE_ROWS = 40
"""Rows of the terminal's table, unless all are asked for."""

QUARTILES = {1: "1", 2: "2", 3: "3", 4: "4 HIGH"}
SURROGATES = re.compile("[\ud800-\udfff]")
JOINERS = "\u200c\u200d"
"""Format characters that spelling needs: zero-width non-joiner and joiner."""


@dataclass(frozen=True, slots=True)
class Usual:
    """What the run knows of a token's type at one layer."""

    n: int  # occurrences
    median: float
    share_high: float


@dataclass(frozen=True, slots=True)
class Reading:
    """One token at one layer, against the run."""

    layer: int
    strength: float
    quartile: int | None  # 1 to 4 by the run's thresholds; None for special tokens, which have none
    high: bool | None  # at or above Q3
    rank: float | None  # share of the run's tokens, special ones apart, at or below ``strength``
    usual: Usual | None  # None: the type is not in the run


@dataclass(frozen=True, slots=True)
class Token:
    """One token of the text."""

    text: str  # as written; empty for special tokens
    piece: str  # as the tokenizer writes it
    token_id: int
    start: int  # character offsets into the text
    end: int
    special: bool
    word_start: bool
    readings: tuple[Reading, ...]  # in the order of ``Explanation.layers``


@dataclass(frozen=True, slots=True)
class Thresholds:
    """The run's quartiles of one layer, over all its tokens but the special ones."""

    layer: int
    n: int
    q1: float
    q2: float
    q3: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """A text's tokens against a run."""

    run: str  # URI
    model: str
    dtype: str
    device: str  # on which the text was measured
    text: str
    layers: tuple[int, ...]  # ascending
    thresholds: tuple[Thresholds, ...]  # in the order of ``layers``
    tokens: tuple[Token, ...]
    notes: tuple[str, ...]  # why figures may differ from the run's in their last digits


def explain(
    run_uri: str, text: str, *, model_name: str | None = None, trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> Explanation:  # fmt: skip
    """Measure ``text`` as the run at ``run_uri`` measured its corpus, in this process, and compare.

    ``model_name``: where the run's model is on this machine, if elsewhere than it was for the run. A store may be
    somebody else's: code and pickles that its run names are used only where the caller says so as well.
    Raises ``StoreError`` without such a run, ``ConfigError`` for a text without tokens, and ``ModelError``
    when the model here is not the run's: it says in what they differ.
    """
    run = manifest.find_run(run_uri)
    recorded = run.info["measure"]
    config = config_from(run.info["config"])
    for flag, asked, given in (("trust_remote_code", config.trust_remote_code, trust_remote_code),
                               ("allow_pickle", config.allow_pickle, allow_pickle)):  # fmt: skip
        if asked and not given:
            raise ModelError(f"run {run.uri} was made with {flag}, which lets its model run code here; "
                             f"if you trust {model_name or config.model}, give --{flag.replace('_', '-')}")  # fmt: skip
    config = replace(config, dtype=recorded["dtype"], model=model_name or config.model)
    device = cluster.local_device(run.info["made_by"]["device"])
    task, measure = pipeline.prepare(config, pipeline.find_model(config), device, config.dtype)
    if "outliers" in recorded:
        task, measure = pipeline.with_outliers(task, measure, recorded["outliers"])
    if task.measure_id != recorded["id"]:
        raise ModelError(_not_the_same(config.model, run.uri, recorded, measure))
    cleaned = SURROGATES.sub("\ufffd", text)  # what is no character, as in the corpus
    processor = pipeline.Processor(task)
    measured = processor.measure([cleaned], [cleaned != text])
    processor.close()
    encoded, strengths = measured.encoded, measured.strengths
    if not len(encoded.token_ids):
        raise ConfigError("the text has no tokens; give one with at least a word")
    if not np.isfinite(strengths).all():
        raise ModelError(f"{config.model} gave a strength that is not finite for this text; a run would quarantine it")
    special = (encoded.flags & SPECIAL) > 0
    tables = {name: manifest.read_table(run, name) for name in ("histogram", "vocabulary")}
    tables["labels"] = manifest.labels(run)
    thresholds, columns = [], []
    for at, layer in enumerate(task.layers):
        limits, readings = _read_layer(tables, layer, encoded.token_ids, special, strengths[at])
        thresholds.append(limits)
        columns.append(readings)
    spans = zip(encoded.start.tolist(), encoded.end.tolist(), strict=True)
    tokens = tuple(
        Token(
            "" if special[i] else cleaned[start:end], processor.preparer.pieces[token_id], token_id, start, end,
            bool(special[i]), bool(encoded.flags[i] & WORD_START), tuple(readings[i] for readings in columns),
        )
        for i, ((start, end), token_id) in enumerate(zip(spans, encoded.token_ids.tolist(), strict=True))
    )  # fmt: skip
    return Explanation(
        run.uri, config.model, task.dtype, device, cleaned, task.layers, tuple(thresholds), tokens,
        _notes(run.info["made_by"], device, task.dtype),
    )  # fmt: skip


def _read_layer(
    tables: Mapping[str, pa.Table], layer: int, token_ids: Any, special: Any, strengths: Any
) -> tuple[Thresholds, list[Reading]]:
    """Thresholds of ``layer`` and one reading per token, from the run's tables; the arrays are [n_tokens]."""
    here = pc.field("layer") == layer
    row = tables["labels"].filter(here & (pc.field("population") == "tokens")).to_pylist()[0]
    limits = Thresholds(layer, row["n"], row["q1"], row["q2"], row["q3"])
    histogram = tables["histogram"].filter(here & ~pc.field("special"))
    at_or_below = np.append(0, np.cumsum(histogram["n"].to_numpy()))
    ranks = at_or_below[np.searchsorted(histogram["strength"].to_numpy(), strengths, side="right")] / limits.n
    quartiles = 1 + np.searchsorted(np.array([limits.q1, limits.q2, limits.q3]), strengths, side="right")
    ours = pc.field("token_id").isin(np.unique(token_ids).tolist())
    usual = {
        (r["token_id"], r["class"] == "special"): Usual(r["n"], r["q2"], r["share_high"])
        for r in tables["vocabulary"].filter(here & ours).to_pylist()
    }
    return limits, [
        Reading(layer, strength, None, None, None, usual.get((i, s))) if s
        else Reading(layer, strength, quartile, quartile == 4, rank, usual.get((i, s)))
        for i, s, strength, quartile, rank in zip(
            token_ids.tolist(), special.tolist(), strengths.tolist(), quartiles.tolist(), ranks.tolist(), strict=True
        )
    ]  # fmt: skip


def _not_the_same(name: str, run: str, theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    differs = []
    for key in sorted({*theirs, *ours} - {"id"}):
        if key == "model" and theirs.get(key) != ours[key]:
            a, b = theirs.get(key) or {}, ours[key]
            files = sorted(f for f in {*a, *b} if a.get(f) != b.get(f))
            differs.append(f"these files differ: {', '.join(files)}")
        elif theirs.get(key) != ours.get(key):
            differs.append(f"{key} is {json.dumps(theirs.get(key))} in the run, {json.dumps(ours.get(key))} here")
    return (
        f"the model at {name} is not the one of run {run}: {'; '.join(differs) or 'its run.json was edited'}. "
        "Strengths of two measures cannot be compared; give the run's model"
    )


def _notes(made_by: dict[str, str], device: str, dtype: str) -> tuple[str, ...]:
    notes = []
    if made_by["device"] != device:
        digits = "fifth or a later" if dtype == "float32" else "third or fourth"
        notes.append(
            f"The run was measured on {made_by['device']}, this text on {device} (both {dtype}): strengths differ in "
            f"their {digits} digit, and a token close to a threshold can lie on its other side."
        )
    changed = [f"{k} {made_by.get(k)} then, {v} here" for k, v in model.VERSIONS.items() if made_by.get(k) != v]
    if changed:
        notes.append(f"Libraries differ from the run's ({'; '.join(changed)}): last digits of strengths may, too.")
    return tuple(notes)


def to_json(explanation: Explanation) -> dict[str, Any]:
    """``explanation`` as plain values: what ``json.loads`` gives back."""
    value: dict[str, Any] = json.loads(json.dumps(asdict(explanation), allow_nan=False))
    return value


# --- the text as people read it --------------------------------------------------------------------------


def _visible(text: str, keep: str = "") -> str:
    """``text`` with its control and invisible format characters, but those of ``keep``, written as escapes.

    A terminal obeys some of them, and bidirectional ones reorder what stands beside them, on any page.
    """
    keep += JOINERS
    return "".join(
        c if c in keep or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
        else f"\\x{ord(c):02x}" if ord(c) < 256 else f"\\u{ord(c):04x}" if ord(c) < 65536 else f"\\U{ord(c):08x}"
        for c in text
    )  # fmt: skip


def _running(explanation: Explanation) -> Iterator[tuple[str, Token | None]]:
    """The text in order, cut into tokens and what lies between them (None); every character once.

    White space before a token's first letter counts as between; of tokens that share a character (byte-level
    pieces) the first shows it.
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
    return _visible(text.replace("\r\n", "\n"), keep="\n\t")


def _label(token: Token) -> str:
    """A token on its own, as a table shows it; one that continues a word begins with an ellipsis."""
    if token.special:
        return _visible(token.piece)
    text = _visible(token.text.strip()) or _visible(token.text).replace(" ", "␣")
    return text if token.word_start else f"…{text}"


def _cells(token: Token, reading: Reading) -> list[str]:
    """Strength, quartile, rank, and the type's median, HIGH share and n, as the tables show them."""
    usual = reading.usual
    return [
        f"{reading.strength:.4f}",
        "special" if reading.quartile is None else QUARTILES[reading.quartile],
        "" if reading.rank is None else f"{reading.rank:.1%}",
        *(("not in run", "", "0") if usual is None else
          (f"{usual.median:.4f}", "" if token.special else f"{usual.share_high:.0%}", f"{usual.n:,}")),
    ]  # fmt: skip


HEADS = ("token", "strength", "quartile", "rank", "median", "HIGH", "n")
LEGEND = (
    "rank: share of the run's tokens at or below this strength. median, HIGH, n: of the same type in the run "
    "(median strength, share that is HIGH, occurrences). Special tokens are apart. Compare strengths within one "
    "layer of one model only."
)


def _limits(t: Thresholds) -> dict[int, str]:
    return {1: f"1 < {t.q1:.4f}", 2: f"2 < {t.q2:.4f}", 3: f"3 < {t.q3:.4f}", 4: f"4 HIGH ≥ {t.q3:.4f}"}


# --- terminal --------------------------------------------------------------------------------------------

TERMINAL = {1: "", 2: "#10202c on #9cc3dc", 3: "#241a00 on #f2b84b", 4: "bold underline #ffffff on #b23a0e"}
"""Styles of the quartiles. The first is the terminal's own, the others bring their own background, so that all four
are legible on dark and light; bold and underline tell HIGH without colour."""


def render_terminal(explanation: Explanation, layer: int | None, console: Console, *, show_all: bool = False) -> None:
    """Print the text coloured by quartile at ``layer`` (None: the deepest recorded), then a table of its tokens.

    The table stops after ``TABLE_ROWS`` unless ``show_all``. Raises ``ConfigError`` for a layer not recorded.
    """
    at = _index(explanation, layer)
    n = f"{explanation.thresholds[at].n:,}"
    head = f"{_layer_name(explanation.layers[at])}, against {n} tokens of {_visible(explanation.run)}"
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
        label = Text.assemble((_label(token), TERMINAL[reading.quartile or 1]))  # colours no more than its letters
        table.add_row(label, *_cells(token, reading), style="dim" if token.special else "")
    console.print(table)
    if hidden := len(explanation.tokens) - len(shown):
        console.print(Text(f"  {hidden:,} more tokens are not listed; --all lists them"))
    for note in (LEGEND, *explanation.notes):
        console.print(Padding(Text(_visible(note), "dim"), (0, 2)))


def _index(explanation: Explanation, layer: int | None) -> int:
    if layer is None:
        return len(explanation.layers) - 1
    if layer not in explanation.layers:
        recorded = ", ".join(map(str, explanation.layers))
        raise ConfigError(f"layer {layer} was not recorded; the run has {recorded}")
    return explanation.layers.index(layer)


# --- page ------------------------------------------------------------------------------------------------

LIGHT = {0: ("#1c2024", "#ffffff"), 2: ("#10202c", "#cfe3f1"), 3: ("#241a00", "#f8ce7c"), 4: ("#ffffff", "#b23a0e")}
DARK = {0: ("#e4e7ea", "#15181c"), 2: ("#eaf3fa", "#27485f"), 3: ("#fff8e8", "#7a5200"), 4: ("#2a0c00", "#ff9d66")}
"""Text and background of the page (0) and of quartiles 2 to 4; the first quartile looks like the page."""

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
@media print {
  body { max-width: none; margin: 0; } fieldset { display: none; }
  .q2, .q3, .q4 { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  thead { display: table-header-group; } tr { break-inside: avoid; }
}
"""


def render_html(explanation: Explanation) -> str:
    """One page with everything in it: no script, no network (its policy forbids both), light and dark, printable."""
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
            f"default-src 'none'; style-src 'sha256-{policy}'; base-uri 'none'; form-action 'none'\">",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">\n<title>Token Activation Strength of a text</title>',
            f"<style>{style}</style>\n</head>\n<body>\n<main>\n<h1>Token Activation Strength of a text</h1>\n<dl>",
            *(f"<dt>{name}</dt><dd>{_html(value)}</dd>" for name, value in facts),
            "</dl>",
            f"<fieldset><legend>Show</legend>\n{switch}</fieldset>" if len(layers) > 1 else "",
            *(_html_layer(explanation, at) for at in range(len(layers))),
            *(f"<p>{_html(note)}</p>" for note in (LEGEND, *explanation.notes)),
            "</main>\n</body>\n</html>\n",
        ]
    )


def _style(layers: tuple[int, ...]) -> str:
    light, dark = (
        " ".join(f"--text-{k}: {text}; --page-{k}: {page};" for k, (text, page) in colours.items())
        for colours in (LIGHT, DARK)
    )
    shown = " ".join(f"body:has(#show-{k}:checked) #layer-{k} {{ display: block; }}" for k in layers)
    switch = f"@supports selector(:has(a)) {{ section {{ display: none; }} {shown} }}\n" if len(layers) > 1 else ""
    return (
        f"\n:root {{ color-scheme: light dark; {light} }}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}{STYLE}{switch}"
    )


def _html_layer(explanation: Explanation, at: int) -> str:
    layer = explanation.layers[at]
    running = "".join(
        f'<span class="q{token.readings[at].quartile}" title="{_title(token, at)}">{_html(text)}</span>' if token
        else _html(text)
        for text, token in _running(explanation)
    )  # fmt: skip
    limits = _limits(explanation.thresholds[at])
    legend = "".join(f'<li><span class="q{quartile}">{_html(text)}</span></li>' for quartile, text in limits.items())
    rows = "\n".join(
        f'<tr><td><span class="q{token.readings[at].quartile or 0}"><bdi>{_html(_label(token))}</bdi></span></td>'
        + "".join(f"<td>{cell}</td>" for cell in _cells(token, token.readings[at]))
        + "</tr>"
        for token in explanation.tokens
    )
    heads = "".join(f'<th scope="col">{head}</th>' for head in HEADS)
    return (
        f'<section id="layer-{layer}">\n<h2>{_layer_name(layer)}</h2>\n<p class="text" dir="auto">{running}</p>\n'
        f'<ul class="legend" aria-label="Quartiles of {explanation.thresholds[at].n:,} tokens">{legend}</ul>\n'
        f'<div class="table"><table>\n<caption>Tokens at layer {layer}</caption>\n'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>\n</section>"
    )


def _layer_name(layer: int) -> str:
    return f"Layer {layer}" + (" (embeddings)" if layer == 0 else "")


def _title(token: Token, at: int) -> str:
    """What a pointer over a token shows."""
    strength, quartile, rank, median, _, n = _cells(token, token.readings[at])
    usual = f"its type has median {median}, n {n}" if token.readings[at].usual else median
    return _html(f"{_label(token)}: strength {strength}, quartile {quartile}, rank {rank}; {usual}")


def _html(text: str) -> str:
    return escape(_visible(text, keep="\n\t"), quote=True)
