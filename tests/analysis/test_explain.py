"""explain: a text's figures are the run's own, and no text can do anything to a terminal or a
page.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
import sys
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from rich.console import Console

import afn_ray
from afn_ray import model
from afn_ray.analysis import explain as module
from afn_ray.analysis.explain import explain
from afn_ray.analysis.explanation import TOP, Explanation, Question, running_text, to_json
from afn_ray.analysis.local_model import LocalModel
from afn_ray.analysis.remeasure import notes_on
from afn_ray.cli import commands
from afn_ray.config import RunConfig
from afn_ray.errors import ConfigError, ModelError, StoreError
from afn_ray.model import VERSIONS
from afn_ray.runs import job, worker
from afn_ray.schema import SPECIAL, TOKEN_CHARS
from afn_ray.show import explanation_terminal
from afn_ray.show.colours import DARK, DARK_HEAT, LIGHT, LIGHT_HEAT
from afn_ray.show.explanation import QUARTILES, decision_rows
from afn_ray.show.explanation_page import render_html
from afn_ray.show.explanation_terminal import render_terminal
from afn_ray.store import label_thresholds, manifest
from conftest import find_model, write_jsonl

HOSTILE = (
    "In the [bold]beginning[/bold] \x1b[31mred\x1b[0m \x9b2J \u202egnp.exe "
    "<script>alert(\"1\")</script> & 'quoted' zeppelin\r\nGod 日本 😀"
)


@dataclass(frozen=True)
class Corpus:
    """A complete run and what it recorded."""

    folder: manifest.RunFolder
    texts: list[str]
    tokens: pa.Table  # ``doc`` is run-wide

    def strengths(self, layer: int) -> Any:
        """All recorded strengths but those of special tokens."""
        return self.tokens.filter(pc.bit_wise_and(pc.field("flags"), SPECIAL) == 0)[
            f"strength_{layer}"
        ].to_numpy()


def measure(folder: Path, texts: list[str], **options: Any) -> Corpus:
    write_jsonl(folder / "corpus.jsonl", [{"text": t} for t in texts])
    config = RunConfig(
        corpus=(str(folder / "corpus.jsonl"),),
        store=str(folder / "store"),
        executor="inline",
        shard_bytes=8192,
        **options,
    )
    job.run(config).close()
    run = manifest.find_run(config.store)
    tables = []
    for shard in manifest.read_table(run, "shards").to_pylist():
        table = pq.read_table(Path(run.store) / shard["tokens_file"])
        doc = pc.add(table["doc_in_shard"], shard["doc_offset"])
        tables.append(table.set_column(0, "doc", doc.cast(pa.int64())))
    return Corpus(run, texts, pa.concat_tables(tables, promote_options="permissive"))


@pytest.fixture(scope="module")
def corpus(
    tmp_path_factory: pytest.TempPathFactory,
    minilm: Path,
    verses: list[str],
    short_calibrations: None,
) -> Corpus:
    """250 verses in several shards, and one document of more than one window."""
    texts = [*verses[:250], " ".join(verses[300:330])]
    return measure(tmp_path_factory.mktemp("explain"), texts, model=str(minilm), layers="0,2/3")


@pytest.fixture(scope="module")
def hostile(corpus: Corpus) -> Explanation:
    return explain(corpus.folder.uri, HOSTILE)


def printed(
    explanation: Explanation, layer: int | None = None, *, show_all: bool = False, **options: Any
) -> str:
    console = Console(file=io.StringIO(), highlight=False, **{"width": 100, **options})
    render_terminal(explanation, layer, console, show_all=show_all)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# --- figures
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("doc", [0, 17, 250])
def test_tokens_and_strengths_are_those_that_the_run_recorded(corpus: Corpus, doc: int) -> None:
    explanation = explain(corpus.folder.store, corpus.texts[doc])
    recorded = corpus.tokens.filter(pc.field("doc") == doc).to_pydict()
    assert len(recorded["doc"]) > (600 if doc == 250 else 8)  # 250 has windows
    assert [t.token_id for t in explanation.tokens] == recorded["token_id"]
    ahead = [t.start - TOKEN_CHARS * i for i, t in enumerate(explanation.tokens)]
    assert ahead == recorded["start_ahead"]
    assert [t.end - t.start for t in explanation.tokens] == recorded["length"]
    assert [t.special for t in explanation.tokens] == [bool(f & SPECIAL) for f in recorded["flags"]]
    assert explanation.layers == (0, 4)
    for at, layer in enumerate(explanation.layers):
        got = [t.readings[at].strength for t in explanation.tokens]
        # another batch has other shapes: the last recorded bit (2^-15) may round the other way
        np.testing.assert_allclose(got, recorded[f"strength_{layer}"], rtol=2**-14)
        assert np.mean(np.array(got) == recorded[f"strength_{layer}"]) > 0.8
    for token in explanation.tokens:
        assert token.text == ("" if token.special else corpus.texts[doc][token.start : token.end])


def test_ranks_quartiles_and_the_usual_are_brute_force_counts(corpus: Corpus) -> None:
    explanation = explain(corpus.folder.uri, corpus.texts[3] + " A zeppelin appeared.")
    rows = corpus.tokens.to_pydict()
    ids, special = np.array(rows["token_id"]), (np.array(rows["flags"]) & SPECIAL) > 0
    unknown = 0
    for at, layer in enumerate(explanation.layers):
        values = corpus.strengths(layer)
        q1, q2, q3 = np.quantile(values, [0.25, 0.5, 0.75], method="inverted_cdf")
        assert (explanation.thresholds[at].q1, explanation.thresholds[at].q3) == (q1, q3)
        for token in explanation.tokens:
            reading = token.readings[at]
            same = np.array(rows[f"strength_{layer}"], np.float32)[
                (ids == token.token_id) & (special == token.special)
            ]
            if token.special:
                assert (reading.quartile, reading.high, reading.rank) == (None, None, None)
            else:
                assert reading.rank == np.mean(values <= np.float32(reading.strength))
                assert reading.quartile == 1 + sum(reading.strength >= q for q in (q1, q2, q3))
                assert reading.high == (reading.strength >= q3)
            if reading.usual is None:
                unknown += 1
                assert not len(same)
            else:
                assert reading.usual.n == len(same)
                assert reading.usual.median == np.quantile(same, 0.5, method="inverted_cdf")
                share_high = None if token.special else np.mean(same >= q3)
                assert reading.usual.share_high == share_high
    assert unknown >= 2  # the zeppelin, at both layers


def test_words_of_several_tokens_stand_beside_the_same_words_of_the_run(corpus: Corpus) -> None:
    doc = 250
    text = corpus.texts[doc] + " Qwxzjk LAMECH."
    explanation = explain(corpus.folder.uri, text)
    with afn_ray.open_run(corpus.folder.uri) as run:
        words = run.sql("FROM words").to_dicts()
    written = [w for w in words if w["doc"] == doc and w["n_tokens"] > 1]
    *found, unknown, named = explanation.words
    assert [(w.text, w.n_tokens) for w in found] == [(w["text"], w["n_tokens"]) for w in written]
    assert found and unknown.text == "Qwxzjk" and unknown.readings[0].usual is None
    rare = 0
    for word in (*found, named):
        same = [w for w in words if w["text"].lower() == word.text.lower()]
        pieces = explanation.tokens[word.first : word.first + word.n_tokens]
        for at, layer in enumerate(explanation.layers):
            reading, q3 = word.readings[at], explanation.thresholds[at].q3
            assert reading.strength == max(piece.readings[at].strength for piece in pieces)
            assert reading.high == (reading.strength >= q3)
            if len(same) < 5:
                rare += 1
                assert reading.usual is None
                continue
            strongest = [w[f"max_strength_{layer}"] for w in same]
            median = np.quantile(strongest, 0.5, method="inverted_cdf")
            assert reading.usual is not None
            assert (reading.usual.n, reading.usual.median) == (len(same), median)
            assert reading.usual.share_high == np.mean([w[f"high_{layer}"] for w in same])
    assert rare < 2 * len(explanation.words) - 2
    assert explanation.words[-1].readings[0].usual is not None  # Lamech, in capitals
    output = printed(explanation, show_all=True, width=80)
    table = output.partition("Words of several tokens at layer 4")[2]
    assert "LAMECH" in table and "rare" in table and max(map(len, table.splitlines())) <= 80
    without = replace(explanation, words=())
    assert "several tokens" not in printed(without) + render_html(without)
    assert render_html(explanation).count("Words of several tokens at layer") == 2


def test_explain_reads_only_the_rows_of_the_text_s_types_and_words(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large run has millions of words, which would take gigabytes."""
    read: dict[str, pa.Table] = {}
    read_table = manifest.read_table

    def kept(run: manifest.RunFolder, name: str, *selected: Any) -> pa.Table:
        read[name] = read_table(run, name, *selected)
        return read[name]

    monkeypatch.setattr(manifest, "read_table", kept)
    explanation = explain(corpus.folder.uri, "Lamech begat Lamech")
    layers, words = len(explanation.layers), {word.text.lower() for word in explanation.words}
    assert words == {"begat", "lamech"}
    assert set(read["word_vocabulary"]["word"].to_pylist()) == words
    assert len(read["word_vocabulary"]) == 2 * layers
    ids = {token.token_id for token in explanation.tokens}
    assert set(read["vocabulary"]["token_id"].to_pylist()) == ids
    assert {*read["word_vocabulary"].column_names} == {"word", "layer", "n", "q2", "share_high"}


def test_a_word_has_the_combining_mark_that_no_token_covers(
    tmp_path: Path, tiny_bert: Path
) -> None:
    """The tokenizer drops accents, and its offsets end before the last one."""
    word = "Qwxzje\u0301"
    texts = [f"{word} said" for _ in range(6)] + ["qwxzje said"] * 7
    corpus = measure(tmp_path, texts, model=str(tiny_bert), layers="2")
    explanation = explain(corpus.folder.uri, f"the {word} said")
    (found,) = explanation.words
    assert found.text == word
    assert explanation.tokens[found.first + found.n_tokens - 1].end == len("the Qwxzje")
    assert found.readings[0].usual is not None and found.readings[0].usual.n == 6


def test_a_strength_that_equals_a_threshold_lies_above_it(corpus: Corpus) -> None:
    values = corpus.strengths(4)
    quantiles = np.quantile(values, [0.25, 0.5, 0.75], method="inverted_cdf").astype(np.float32)
    below = np.nextafter(quantiles, np.float32(0))
    strengths = np.concatenate(
        [quantiles, below, [values.min(), values.max(), values.max() * 2, 0]]
    ).astype(np.float32)
    zeros = np.zeros(len(strengths), np.int32)
    tables = {
        name: manifest.read_table(corpus.folder, name) for name in ("histogram", "vocabulary")
    }
    tables["labels"] = label_thresholds.labels(corpus.folder)
    limits, readings = module._read_layer(tables, 4, zeros, zeros > 0, strengths)
    assert [r.quartile for r in readings] == [2, 3, 4, 1, 2, 3, 1, 4, 4, 1]
    assert [r.high for r in readings] == [r.quartile == 4 for r in readings]
    ranks = [r.rank for r in readings]
    for share, at, under in zip((0.25, 0.5, 0.75), ranks[:3], ranks[3:6], strict=True):
        assert at is not None and under is not None and under < share <= at
    assert ranks[6:] == [np.mean(values == values.min()), 1.0, 1.0, 0.0]
    assert limits.n == len(values)


def test_the_json_is_plain_and_complete(hostile: Explanation) -> None:
    value: Any = to_json(hostile)
    assert json.loads(json.dumps(value, allow_nan=False)) == value
    assert value["text"] == HOSTILE and len(value["tokens"]) == len(hostile.tokens)
    assert [r["layer"] for r in value["tokens"][1]["readings"]] == [0, 4]


def test_the_run_s_dtype_is_kept_and_ray_is_not_needed(
    tmp_path: Path, tiny_bert: Path, verses: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = measure(tmp_path, verses[:30], model=str(tiny_bert), dtype="bfloat16")
    monkeypatch.setitem(sys.modules, "ray", None)
    explanation = explain(small.folder.uri, verses[0])
    assert explanation.dtype == "bfloat16" and explanation.notes == ()
    recorded = small.tokens.filter(pc.field("doc") == 0)["strength_2"].to_numpy()
    got = [t.readings[-1].strength for t in explanation.tokens]
    np.testing.assert_allclose(got, recorded, rtol=1e-2)
    with pytest.raises(StoreError, match="neither a store nor a run"):
        explain(str(tmp_path), "word")


def test_byte_level_tokens_show_every_character_once(
    tmp_path: Path, tiny_gpt: Path, verses: list[str]
) -> None:
    small = measure(tmp_path, verses[:30], model=str(tiny_gpt))
    text = "  In the 😀😀 beginning\n\n日本 \t God made.  "
    explanation = explain(small.folder.uri, text)
    assert len({(t.start, t.end) for t in explanation.tokens}) < len(
        explanation.tokens
    )  # one emoji, many tokens
    assert "".join(part for part, _ in running_text(explanation)) == text
    assert not any(
        part[0].isspace() and part.strip() for part, token in running_text(explanation) if token
    )


@pytest.mark.parametrize("text", ["", "  \n\t "])
def test_a_text_without_tokens_is_refused(classified: Corpus, text: str) -> None:
    with pytest.raises(ConfigError, match="no tokens"):
        explain(classified.folder.uri, text)


# --- the model
# -------------------------------------------------------------------------------------------


def test_another_model_is_refused_and_the_same_one_elsewhere_is_not(
    corpus: Corpus, minilm: Path, tmp_path: Path
) -> None:
    for file in minilm.iterdir():
        (tmp_path / file.name).symlink_to(file)
    moved = explain(corpus.folder.uri, "In the beginning", local=LocalModel(str(tmp_path)))
    assert moved.model == str(tmp_path)
    assert moved.tokens == explain(corpus.folder.uri, "In the beginning").tokens
    config = json.loads((minilm / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-3}))
    with pytest.raises(
        ModelError, match=r"is not the one of run .*these parts of it differ: config\.json"
    ):
        explain(corpus.folder.uri, "In the beginning", local=LocalModel(str(tmp_path)))
    with pytest.raises(ModelError, match="no model at"):
        explain(corpus.folder.uri, "In the beginning", local=LocalModel(str(tmp_path / "gone")))


def test_a_run_of_another_version_of_transformers_is_not_compared(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = model.MAKERS["transformers"]
    monkeypatch.setitem(model.MAKERS, "transformers", "5.99")
    with pytest.raises(
        ModelError, match=rf"parts of it differ: transformers \({ours} in the run, 5\.99 here\)"
    ):
        explain(corpus.folder.uri, "In the beginning")


@pytest.mark.parametrize("flag", ["trust_remote_code", "allow_pickle"])
def test_a_run_cannot_make_its_reader_run_code(
    corpus: Corpus, flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = corpus.folder.info.copy()
    info["config"] = info["config"] | {flag: True, "model": "/evil"}
    monkeypatch.setattr(manifest, "find_run", lambda uri: replace(corpus.folder, info=info))
    monkeypatch.setattr(worker, "prepare", lambda *_: pytest.fail("looked at the model"))
    with pytest.raises(ModelError, match=f"give --{flag.replace('_', '-')}"):
        explain(corpus.folder.uri, "word")


def test_notes_say_what_may_move_the_last_digits() -> None:
    assert notes_on({"device": "cpu", **VERSIONS}, "cpu", "float32") == ()
    device, libraries = notes_on(
        {"device": "cuda", **VERSIONS, "torch": "2.0.0"}, "cpu", "bfloat16"
    )
    assert "measured on cuda, this text on cpu" in device and "bfloat16" in device
    assert f"torch 2.0.0 then, {VERSIONS['torch']} here" in libraries


# --- terminal
# --------------------------------------------------------------------------------------------


def test_control_characters_and_markup_reach_no_terminal(hostile: Explanation) -> None:
    plain = printed(hostile, show_all=True)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", plain)
    for literal in ("[bold]beginning[/bold]", r"\x1b[31mred", r"\x9b2J", r"\u202egnp"):
        assert literal in plain
    coloured = printed(hostile, show_all=True, force_terminal=True, color_system="truecolor")
    assert "\x1b[31m" not in coloured and "\x1b" not in re.sub(r"\x1b\[[0-9;]*m", "", coloured)


def test_high_tokens_are_marked_without_colour(hostile: Explanation) -> None:
    output = printed(hostile, force_terminal=True, no_color=True).split("quartile")[0]
    assert not re.search(r"\x1b\[[0-9;]*[34]8;", output)
    marked = re.findall(r"\x1b\[1;4m(.+?)\x1b\[0m", output)
    assert marked == [t for t, token in running_text(hostile) if token and token.readings[-1].high]
    assert marked


def test_the_quartiles_look_different_and_can_be_read(hostile: Explanation) -> None:
    coloured = printed(hostile, force_terminal=True, color_system="truecolor")
    styles = {
        quartile: set(re.findall(rf"\x1b\[([0-9;]+)m {quartile} ", coloured))
        for quartile in (2, 3, 4)
    }
    assert all(len(s) == 1 for s in styles.values()) and len(set.union(*styles.values())) == 3
    pairs = [*LIGHT.values(), *DARK.values()]
    for style in explanation_terminal.TERMINAL.values():
        if colours := re.findall("#[0-9a-f]{6}", style):
            pairs.append((colours[0], colours[1]))
    assert all(contrast(*pair) >= 4.5 for pair in pairs)  # WCAG 2.2, AA


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_a_long_text_s_table_says_what_it_leaves_out(classified: Corpus) -> None:
    explanation = explain(classified.folder.uri, " ".join(["word"] * 98))
    assert len(explanation.tokens) == 100
    rows = [line for line in printed(explanation, 0).splitlines() if line.startswith("  word  ")]
    assert len(
        rows
    ) == explanation_terminal.TABLE_ROWS - 1 and "60 more tokens are not listed" in printed(
        explanation, 0
    )
    everything = printed(explanation, 0, show_all=True)
    assert everything.count("\n  word  ") == 98 and "more tokens" not in everything


def test_the_table_holds_the_figures(hostile: Explanation) -> None:
    token = next(t for t in hostile.tokens if t.text == "God")
    reading = token.readings[1]
    assert reading.usual is not None and reading.rank is not None
    assert reading.usual.share_high is not None
    lines = [line.split() for line in printed(hostile, 4, show_all=True).splitlines()]
    rows = {line[0]: line[1:] for line in lines if line}
    shown = [
        f"{reading.strength:.4f}",
        *QUARTILES[reading.quartile or 0].split(),
        f"{reading.rank:.1%}",
        f"{reading.usual.median:.4f}",
        f"{reading.usual.share_high:.0%}",
        str(reading.usual.n),
    ]
    assert rows["God"] == shown
    unseen = next(t for t in hostile.tokens if t.readings[1].usual is None and t.word_start)
    assert rows[unseen.text][-4:] == ["not", "in", "run", "0"]
    assert rows["[CLS]"][1] == "special" and rows["[CLS]"][-1] == "251"


def test_a_layer_that_was_not_recorded_is_refused(hostile: Explanation) -> None:
    with pytest.raises(ConfigError, match="layer 3 was not recorded; the run has 0, 4"):
        printed(hostile, 3)


# --- page
# ------------------------------------------------------------------------------------------------

VOID = {"meta", "input", "br"}


class Page(HTMLParser):
    """Checks that every element ends where it should; keeps elements, and the texts of paragraphs
    and style.
    """

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.running: list[str] = []
        self.style = ""
        self._in_text = False
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if dict(attrs).get("class") == "text":
            self._in_text = True
            self.running.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self._in_text = self._in_text and tag != "p"

    def handle_data(self, data: str) -> None:
        if self._in_text:
            self.running[-1] += data
        elif self.open[-1:] == ["style"]:
            self.style += data


def test_the_page_is_well_formed_escaped_and_alone(hostile: Explanation) -> None:
    source = render_html(hostile)
    page = Page(source)
    visible = HOSTILE.replace("\r\n", "\n").replace("\x1b", r"\x1b").replace("\x9b", r"\x9b")
    visible = visible.replace("\u202e", r"\u202e")
    assert page.running == [visible, visible]  # once a layer, to the letter
    allowed = {
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "main",
        "h1",
        "h2",
        "dl",
        "dt",
        "dd",
        "fieldset",
        "legend",
        "input",
        "label",
        "section",
        "p",
        "span",
        "bdi",
        "ul",
        "li",
        "div",
        "table",
        "caption",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
    }
    assert {tag for tag, _ in page.elements} == allowed
    attributes = {name for _, attrs in page.elements for name in attrs}
    assert attributes <= {
        "lang",
        "charset",
        "http-equiv",
        "content",
        "name",
        "type",
        "id",
        "checked",
        "for",
        "class",
        "dir",
        "title",
        "aria-label",
        "scope",
    }
    assert not re.search(r"https?:|//|url\(|@import|<script|javascript:", source.replace("</", ""))
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", source)
    titles = [attrs["title"] for _, attrs in page.elements if "title" in attrs]
    assert any(t is not None and t.startswith('": strength ') for t in titles)
    assert len(titles) == 2 * sum(not t.special for t in hostile.tokens)


def test_the_page_s_policy_forbids_everything_but_its_own_style(hostile: Explanation) -> None:
    page = Page(render_html(hostile))
    policy = next(
        a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"
    )
    digest = base64.b64encode(hashlib.sha256(page.style.encode()).digest()).decode()
    assert (
        policy
        == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )


def test_the_page_switches_layers_and_lists_every_token(hostile: Explanation) -> None:
    page = Page(render_html(hostile))
    switches = [a for tag, a in page.elements if tag == "input"]
    assert [s["id"] for s in switches] == ["show-0", "show-4"] and [
        "checked" in s for s in switches
    ] == [False, True]
    for layer in (0, 4):
        assert f"body:has(#show-{layer}:checked) #layer-{layer} {{ display: block; }}" in page.style
        assert ("section", {"id": f"layer-{layer}"}) in page.elements
    assert sum(tag == "tr" for tag, _ in page.elements) == 2 * (
        2 + len(hostile.tokens) + len(hostile.words)
    )
    one = replace(
        hostile,
        layers=(4,),
        thresholds=hostile.thresholds[1:],
        tokens=tuple(replace(t, readings=t.readings[1:]) for t in hostile.tokens),
    )
    assert not any(tag == "input" for tag, _ in Page(render_html(one)).elements)


# --- signals, layers and decisions
# ----------------------------------------------------------------------

LABELS = {0: "old", 1: "<b>new</b>\x1b[31m", 2: "neither"}
TEXT = "In the beginning God created the heaven, and the zeppelin."


def save_classifier(folder: Path, config: Any, tokenizer: Path) -> Path:
    """A classifier of random weights whose answers differ between texts."""
    import torch
    import transformers

    torch.manual_seed(5)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.2 * torch.randn_like(value))
    model.save_pretrained(folder)
    for file in tokenizer.iterdir():
        shutil.copy(file, folder / file.name)
    return folder


@pytest.fixture(scope="module")
def classified(
    tmp_path_factory: pytest.TempPathFactory, wordpiece: Path, verses: list[str]
) -> Corpus:
    """A run of a BERT with a head for three labels, of which layers 0 and 2 and the shift were
    recorded.
    """
    import transformers

    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        id2label=LABELS,
    )
    folder = tmp_path_factory.mktemp("classifier")
    save_classifier(folder / "model", config, wordpiece)
    return measure(
        folder,
        verses[:60],
        model=str(folder / "model"),
        layers="0,2",
        dtype="float32",
        signals="shift",
    )


@pytest.fixture(scope="module")
def whole(classified: Corpus) -> Explanation:
    """All that explain can say of a text."""
    return explain(
        classified.folder.uri, TEXT, Question(signals="shift,attention", layers="all", task=True)
    )


def plain(corpus: Corpus, explanation: Explanation) -> tuple[Any, Any]:
    """The plain classifier, and its output for the tokens of ``explanation``."""
    import torch
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        corpus.folder.info["config"]["model"], attn_implementation="eager"
    ).eval()
    ids = torch.tensor([[t.token_id for t in explanation.tokens]])
    return model, model(ids, output_hidden_states=True, output_attentions=True)


def test_signals_stand_beside_strength_with_quartiles_where_the_run_has_them(
    classified: Corpus, whole: Explanation
) -> None:
    _, out = plain(classified, whole)
    limits = np.quantile(
        classified.tokens.filter(pc.bit_wise_and(pc.field("flags"), SPECIAL) == 0)[
            "shift_2"
        ].to_numpy(),
        [0.25, 0.5, 0.75],
        method="inverted_cdf",
    )
    shift = (out.hidden_states[2] - out.hidden_states[1])[0].norm(dim=-1).detach().numpy()
    own = out.attentions[1][0].diagonal(dim1=1, dim2=2).mean(0).detach().numpy()
    for i, token in enumerate(whole.tokens):
        assert token.readings[0].signals == ()  # the embeddings have none of these
        by_name = {v.signal: v for v in token.readings[1].signals}
        assert sorted(by_name) == ["attention", "attention_norm", "attention_self", "shift"]
        assert by_name["shift"].value == pytest.approx(shift[i], rel=1e-4)
        assert by_name["attention_self"].value == pytest.approx(own[i], rel=1e-4)
        expected = None if token.special else 1 + sum(by_name["shift"].value >= limits)
        assert by_name["shift"].quartile == expected and by_name["attention"].quartile is None
    alone = explain(classified.folder.uri, TEXT)
    assert alone.sweep == () and alone.decision is None
    assert [replace(r, signals=()) for t in whole.tokens for r in t.readings] == [
        r for t in alone.tokens for r in t.readings
    ]


def test_the_heat_map_ranks_within_each_layer_of_the_text(
    classified: Corpus, whole: Explanation
) -> None:
    _, out = plain(classified, whole)
    special = np.array([t.special for t in whole.tokens])
    assert whole.sweep == (0, 1, 2, 3) and special.sum() == 2
    for layer in whole.sweep:
        cells = [t.cells[layer] for t in whole.tokens]
        norms = out.hidden_states[layer][0].norm(dim=-1).detach().numpy()
        np.testing.assert_allclose([c.strength for c in cells], norms, rtol=1e-4)
        values = np.array([c.strength for c in cells])[~special]
        for cell, token in zip(cells, whole.tokens, strict=True):
            share = np.mean(values <= cell.strength)
            assert cell.layer == layer and cell.rank == (None if token.special else share)
            if not token.special:
                assert (
                    cell.decile is not None and cell.decile < 10 * share <= cell.decile + 1 + 1e-9
                )
            recorded = {0: 0, 2: 1}.get(layer)
            assert cell.quartile == (
                None if recorded is None else token.readings[recorded].quartile
            )


@pytest.mark.parametrize("layer", [0, 2])
def test_a_decision_s_attributions_are_plain_autograd_s(
    classified: Corpus, whole: Explanation, layer: int
) -> None:
    import torch

    explanation = whole
    if layer == 0:
        explanation = explain(
            classified.folder.uri, TEXT, Question(layers="1/3,2", task=True, layer=0)
        )
        assert explanation.sweep == (1, 2)
    decision = explanation.decision
    assert decision is not None and decision.layer == layer and decision.kind == "one"
    model, _ = plain(classified, explanation)
    inner: list[torch.Tensor] = []
    model.bert.encoder.layer[max(layer, 1) - 1].output.dense.register_forward_hook(
        lambda m, args, _: inner.append(*args)
    )
    _, out = (
        model,
        model(torch.tensor([[t.token_id for t in explanation.tokens]]), output_hidden_states=True),
    )
    np.testing.assert_allclose(
        [x.value for x in decision.labels], out.logits[0].softmax(-1).detach(), rtol=1e-5
    )
    assert [x.name for x in decision.labels] == list(LABELS.values())
    assert decision.chosen == int(out.logits[0].argmax())
    of = [out.hidden_states[layer], inner[0]]
    for_tokens, for_neurons = (
        (x * g)[0].detach()
        for x, g in zip(of, torch.autograd.grad(out.logits[0].max(), of), strict=True)
    )
    np.testing.assert_allclose(decision.attributions, for_tokens.sum(-1), rtol=1e-3, atol=1e-6)
    if layer == 0:
        assert decision.neurons == ()
        return
    total = for_neurons.sum(0).numpy()
    order = np.argsort(-np.abs(total))[:TOP]
    assert [n.neuron for n in decision.neurons] == order.tolist()
    np.testing.assert_allclose(
        [n.attribution for n in decision.neurons], total[order], rtol=1e-3, atol=1e-6
    )
    assert [n.token for n in decision.neurons] == for_neurons.abs().argmax(0)[order].tolist()


def test_the_two_rankings_and_their_correlation(whole: Explanation) -> None:
    from scipy.stats import spearmanr

    decision = whole.decision
    assert decision is not None
    plain_ones = [
        (t.readings[1].strength, abs(a))
        for t, a in zip(whole.tokens, decision.attributions, strict=True)
        if not t.special
    ]
    assert decision.spearman == pytest.approx(spearmanr(*zip(*plain_ones, strict=True)).statistic)
    rows = decision_rows(whole, decision)
    assert len(rows) == TOP < len(plain_ones)
    assert [r[2] for r in rows] == [f"{s:.4f}" for s, _ in sorted(plain_ones, reverse=True)[:TOP]]
    sizes = [abs(float(r[4])) for r in rows]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == pytest.approx(
        max(a for _, a in plain_ones), abs=1e-4
    )


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "distilbert": ("DistilBertConfig", {"dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 48,
                                        "problem_type": "multi_label_classification"}),
    "albert": ("AlbertConfig", {"embedding_size": 16, "num_labels": 1}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 3, "n_head": 2, "n_inner": 48,
                            "pad_token_id": 0}),
    "llama": ("LlamaConfig", {"num_key_value_heads": 1, "pad_token_id": 0}),
    "mpnet": ("MPNetConfig", {"pad_token_id": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_families_decide_as_transformers_has_them(
    name: str, wordpiece: Path, tmp_path: Path
) -> None:
    import torch
    import transformers

    kind, options = FAMILIES[name]
    small = {
        "vocab_size": 30522,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 66,
    }
    common = {
        k: v for k, v in small.items() if k == "vocab_size" or name not in ("distilbert", "gpt2")
    }
    save_classifier(tmp_path, getattr(transformers, kind)(**common | options), wordpiece)
    files = find_model(tmp_path)
    ids = [101, 2003, 2019, 3899, 2040, 102]
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    out = theirs(torch.tensor([ids]), output_hidden_states=True)
    hidden, logits = out.hidden_states[2], out.logits[0]
    strengths = hidden[0].norm(dim=-1).detach().numpy()
    found = model.decide(files, ids, 2, strengths, "float32", "cpu")
    (gradient,) = torch.autograd.grad(logits.max(), hidden)
    np.testing.assert_allclose(
        found.tokens, (hidden * gradient)[0].sum(-1).detach(), rtol=1e-3, atol=1e-6
    )
    assert found.neurons.shape == (6, 48) and found.neurons.any()
    answer = {"any": logits.sigmoid(), "value": logits, "one": logits.softmax(-1)}[
        found.kind
    ].detach()
    assert found.kind == {"distilbert": "any", "albert": "value"}.get(name, "one")
    np.testing.assert_allclose(found.values, answer, rtol=1e-5)
    with pytest.raises(ModelError, match=r"layer 2 of the classifier .* differs by 1\..*tolerance"):
        model.decide(files, ids, 2, strengths / 2, "float32", "cpu")


def test_what_cannot_be_shown_is_refused_with_the_reason(
    classified: Corpus, tiny_bert: Path, tmp_path: Path, tiny_mpnet: Path, verses: list[str]
) -> None:
    files = find_model(tiny_bert)
    for changed, why in (
        (
            files,
            r"holds no sequence classifier .*classifier\.bias, .* The model has no such head: ",
        ),
        (replace(files, gguf="a.gguf"), "is a GGUF file, which holds no classifier"),
    ):
        with pytest.raises(ModelError, match=why):
            model.decide(changed, [101, 102], 1, np.ones(2, np.float32), "float32", "cpu")
    with pytest.raises(
        ConfigError, match="122 tokens, and a classifier decides about one window, which has 64"
    ):
        explain(classified.folder.uri, " ".join(["word"] * 120), Question(task=True))
    with pytest.raises(ConfigError, match="layer 1 was not recorded; the run has 0, 2"):
        explain(classified.folder.uri, "word", Question(task=True, layer=1))
    with pytest.raises(
        ConfigError, match=r"layer 4 does not exist; the model has layers 0 \(embeddings\) to 3"
    ):
        explain(classified.folder.uri, "word", Question(layers="4"))
    with pytest.raises(ConfigError, match="there is no signal 'strenght'"):
        explain(classified.folder.uri, "word", Question(signals="strenght"))
    with pytest.raises(
        ConfigError, match=r"signals trimmed leave out dimensions .* looked for none"
    ):
        explain(classified.folder.uri, "word", Question(signals="trimmed"))
    with pytest.raises(
        ConfigError, match=r"signals centred_mean subtract a mean state .* looked for none"
    ):
        explain(classified.folder.uri, "word", Question(signals="centred_mean"))
    padded = measure(tmp_path, verses[:5], model=str(tiny_mpnet), dtype="float32")
    with pytest.raises(
        ModelError, match="gives no attention weights to read: its batches are padded"
    ):
        explain(padded.folder.uri, "word", Question(signals="attention"))


def test_the_command_asks_for_them(classified: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        commands.main(
            [
                "explain",
                classified.folder.uri,
                TEXT,
                "--task",
                "--layer",
                "0",
                "--layers",
                "1",
                "--json",
            ]
        )
    assert end.value.code == 0
    value = json.loads(capsys.readouterr().out)
    assert (value["decision"]["layer"], value["decision"]["neurons"], value["sweep"]) == (
        0,
        [],
        [1],
    )
    assert len(value["decision"]["attributions"]) == len(value["tokens"])


def row_of(word: str, table: str) -> list[str]:
    """Cells of the first row of a printed table that begins with ``word``."""
    for line in table.splitlines():
        cells = line.split()
        if cells and cells[0] == word:
            return cells
    raise AssertionError(f"no row of {word!r} in:\n{table}")


def test_the_terminal_shows_them_and_obeys_none(whole: Explanation) -> None:
    output = printed(whole, width=200, force_terminal=True, no_color=True)
    assert "\x1b" not in re.sub(r"\x1b\[[0-9;]*m", "", output) and r"<b>new</b>\x1b[31m" in output
    output = re.sub(r"\x1b\[[0-9;]*m", "", output)
    signals, heat, decision = (
        output.index(x) for x in ("Signals at layer 2", "\n  layer ", "Decision: ")
    )
    god = next(t for t in whole.tokens if t.text == "God")
    row = row_of("God", output[signals:])
    assert (
        row[1:3] == [f"{god.readings[1].strength:.4f}", f"({god.readings[1].quartile})"]
        and len(row) == 8
    )
    row = row_of("God", output[heat:])
    assert row[1:] == [
        f"{c.decile}/{c.quartile}" if c.quartile else f"{c.decile}" for c in god.cells
    ]
    assert whole.decision is not None
    for neuron in whole.decision.neurons:
        assert re.search(
            rf"\b{neuron.neuron} +[+-]{abs(neuron.attribution):.4f}", output[decision:]
        )
    narrow = printed(whole, width=40)
    assert (
        max(len(line) for line in narrow.splitlines() if re.match(r"  \S+ +\d(/\d)? ", line)) <= 40
    )


def test_the_page_shows_them_and_can_be_read(whole: Explanation) -> None:
    page = Page(render_html(whole))
    html = render_html(whole)
    assert r"&lt;b&gt;new&lt;/b&gt;\x1b[31m" in html and "<b>" not in html
    cells = [a.get("class") or "" for tag, a in page.elements if tag == "td"]
    deciles = [int(name[1:]) for name in cells if re.fullmatch(r"h\d", name)]
    assert deciles == [c.decile for t in whole.tokens if not t.special for c in t.cells]
    assert all(f".h{d} {{ color: var(--ink-{d})" in page.style for d in range(10))
    ramps = [*LIGHT_HEAT, *DARK_HEAT]
    assert len(set(ramps)) == 20 and all(contrast(*pair) >= 4.5 for pair in ramps)
    value: Any = to_json(whole)
    assert value["decision"]["labels"][0]["name"] == "old"


def test_a_text_with_half_a_character_is_measured(corpus: Corpus) -> None:
    explanation = explain(corpus.folder.uri, "word \udcff word")
    assert explanation.text == "word \ufffd word"
    render_html(explanation).encode()
    printed(explanation).encode()
