"""The summary says what the tables hold, and every terminal shows all of it."""

from __future__ import annotations

import io
import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from afn_ray.run_info import RunInfo
from afn_ray.schema import (
    FILES_SCHEMA,
    HISTOGRAM_SCHEMA,
    PLAN_SCHEMA,
    SHARDS_SCHEMA,
    THRESHOLDS_SCHEMA,
    VOCABULARY_SCHEMA,
)
from afn_ray.show import overview, run_facts
from afn_ray.show.summary import _idf_auc, summarise, to_json
from afn_ray.store import manifest
from afn_ray.store.manifest import RunFolder
from conftest import RUN_INFO

CLASSES = ("content", "function", "fragment", "number", "punctuation")
COUNTS = {"documents": 31_103, "empty": 2, "quarantined": 1, "tokens": 1_000_000, "special": 62_200,
          "windows": 31_100,
          "forward_tokens": 1_250_000, "chars": 9, "shards": 9, "shards_reused": 4}  # fmt: skip
FILES = [
    dict.fromkeys(FILES_SCHEMA.names, 0)
    | {"source": source, "is_skipped": False, "bytes": size, "num_bytes": size, "share_read": 1.0}
    for source, size in (("/data/a.jsonl", 900_000), ("/data/[b]b\x1b.gz", 100_000))
]
FILES[1] |= {
    "lost_bytes": 40_000,
    "share_read": 0.6,
    "n_quarantined": 2,
    "lost_documents": 1,
    "lost_unknown": 1,
    "n_replaced": 37,
}
FILES.append(
    FILES[0] | {"source": "/data/x.pdf", "is_skipped": True, "num_bytes": 0, "share_read": 0.0}
)


def _type(
    layer: int, token_id: int, text: str, name: str, n: int, n_high: int, idf: float
) -> dict[str, Any]:
    share = n_high / n
    row: dict[str, Any] = dict.fromkeys(VOCABULARY_SCHEMA.names, 1.0)
    return row | {
        "layer": layer,
        "token_id": token_id,
        "token": text,
        "text": text,
        "class": name,
        "n": n,
        "n_docs": n,
        "n_high": n_high,
        "share_high": share,
        "share_high_low": share * 0.9,
        "share_high_high": min(1, share * 1.1),
        "idf": idf,
        "is_ambiguous": False,
    }


def _types(layer: int, seed: int = 0) -> list[dict[str, Any]]:
    random = np.random.default_rng([seed, layer])
    rows = [_type(layer, 101, "[CLS]", "special", 900, 0, 0.0)]
    for i in range(60):
        n = int(random.integers(1, 200))
        rows.append(
            _type(
                layer,
                i,
                f"word{i}",
                CLASSES[i % 5],
                n,
                int(random.integers(0, n + 1)),
                float(i % 7),
            )
        )
    return rows


def _threshold(layer: int, population: str, scale: float, n_sinks: int) -> dict[str, Any]:
    return {
        "layer": layer,
        "population": population,
        "n": 937_800,
        "mean": 4.0 * scale,
        "sd": 0.5 * scale,
        "min": 1.0 * scale,
        "q1": 3.5 * scale,
        "q2": 4.0 * scale,
        "q3": 4.25 * scale,
        "max": 6.0 * scale,
        "n_high": 234_450,
        "n_sinks": n_sinks,
        "n_special": 62_200,
        "sink_factor": 10.0,
        "definition": "x",
    }


def _run(
    folder: Path,
    layers: tuple[int, ...] = (0, 8),
    types: list[dict[str, Any]] | None = None,
    n_sinks: int = 0,
    scale: float = 1.0,
    thresholds: list[dict[str, Any]] | None = None,
) -> RunFolder:
    """A complete run of small tables; every layer has mean 4, Q2 4 and Q3 4.25, times ``scale``."""
    name = "20261122T010203.004Z-abcdef012345"
    run = RunFolder(f"{folder}/runs/{name}", str(folder), name, {})
    populations = ("tokens", "tokens_without_sinks")
    thresholds = thresholds or [
        _threshold(k, p, scale, n_sinks) for k in layers for p in populations
    ]
    rows = types if types is not None else [r for k in layers for r in _types(k)]
    histogram = [
        {"layer": k, "special": s, "strength": v * scale, "n": n}
        for k in layers
        for s, v, n in ((False, 4.0, 9), (True, 2.0, 1), (True, 3.0, 3))
    ]
    shard = dict.fromkeys(SHARDS_SCHEMA.names, 1) | dict.fromkeys(
        ("shard", "tokens_file", "documents_file", "summary_file", "neurons_file"), "x"
    )
    shards = [
        shard
        | {
            "n_tokens": n,
            "token_bytes": 6 * n,
            "document_bytes": n,
            "summary_bytes": 100,
            "neurons_bytes": 0,
            "pairs_bytes": 0,
            "vectors_bytes": 0,
        }
        for n in (600_000, 400_000)
    ]
    tables = {"plan": manifest.write_table(run, "plan", PLAN_SCHEMA.empty_table())}
    for table, content, schema in (
        ("thresholds", thresholds, THRESHOLDS_SCHEMA),
        ("vocabulary", rows, VOCABULARY_SCHEMA),
        ("histogram", histogram, HISTOGRAM_SCHEMA),
        ("shards", shards, SHARDS_SCHEMA),
        ("files", FILES, FILES_SCHEMA),
    ):
        tables[table] = manifest.write_table(run, table, pa.Table.from_pylist(content, schema))
    info: RunInfo = {
        "layers": list(layers),
        "counts": COUNTS,
        "tables": tables,
        "config": {"corpus": ["/data/[bold]news[/bold]/*.jsonl"]},
        "model": {"name": "/models/[red]bert", "type": "bert", "depth": 12, "hidden_size": 768},
        "measure": {"dtype": "float32", "signals": ["strength"]},
        "precision": RUN_INFO["precision"],
        "corpus": {"files": 12, "skipped": 1, "skipped_bytes": 900_000, "bytes": 5},
        "finished_at": "2026-11-22T01:02:03+00:00",
        "seconds": 12.3,
    }
    return manifest.finish_run(run, info)


def _shown(run: RunFolder, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    overview.render(summarise(run), console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_quarantined_shards_are_named(tmp_path: Path) -> None:
    run = _run(tmp_path)
    assert " missing " not in _shown(run, 200)
    run.info["quarantined"] = [
        {"shard": "a", "uri": f"/data/[b]{i}", "reason": "bad"} for i in range(4)
    ]
    assert f"4 of {4 + COUNTS['shards']} shards: /data/[b]0, /data/[b]1, /data/[b]2, ..." in _shown(
        run, 200
    )


def test_what_was_lost_replaced_and_skipped_is_named_with_its_size(tmp_path: Path) -> None:
    shown = _shown(_run(tmp_path), 200)
    lost = "40 kB of 1.0 MB (4%) in 1 file: [b]b\\x1b.gz (60% read); 1 document or more"
    for name, text in (
        ("lost", lost),
        ("replaced", "37 characters in 1 file: [b]b\\x1b.gz"),
        ("skipped", "1 file (900 kB) with an ending that is no known format: x.pdf"),
    ):
        assert re.search(rf"^\s*{name}\s+{re.escape(text)}\s*$", shown, re.M), shown


# --- the data
# --------------------------------------------------------------------------------------------


def test_shares_and_spreads_are_those_of_the_tables(tmp_path: Path) -> None:
    run = _run(tmp_path)
    summary = summarise(run)
    assert [f.layer for f in summary.layers] == [0, 8]
    for facts in summary.layers:
        assert (facts.cv, facts.q3_over_q2) == (0.125, 1.0625)
        assert facts.special_mean == (2 * 1 + 3 * 3) / 4
        assert facts.thresholds["tokens_without_sinks"]["n"] == 937_800
        rows = _types(facts.layer)
        assert [c.name for c in facts.classes] == list(CLASSES)  # in one order, special ones apart
        for share in facts.classes:
            n = sum(r["n"] for r in rows if r["class"] == share.name)
            n_high = sum(r["n_high"] for r in rows if r["class"] == share.name)
            assert (share.n, share.n_high, share.share) == (n, n_high, n_high / n)
            assert 0 <= share.low < share.share < share.high <= 1
    assert summary.bytes_per_token == {
        "tokens": 6.0,
        "documents": 1.0,
        "summary": 0.0002,
        "neurons": 0,
        "pairs": 0,
        "vectors": 0,
        "all": 7.0002,
    }
    assert summary.padding_share == pytest.approx(0.2)
    assert json.loads(json.dumps(to_json(summary)))["layers"][1]["classes"][0]["name"] == "content"


TYPES = st.lists(
    st.tuples(
        st.integers(1, 6), st.integers(0, 6), st.sampled_from([0.0, 0.5, 1.5, 2.0]), st.booleans()
    ),
    max_size=8,
)


@given(TYPES)
def test_idf_auc_is_that_of_all_pairs_of_tokens(types: list[tuple[int, int, float, bool]]) -> None:
    rows = [
        _type(8, i, "x", "special" if special else "content", n, min(n, high), idf)
        for i, (n, high, idf, special) in enumerate(types)
    ]
    high = [r["idf"] for r in rows if r["class"] != "special" for _ in range(r["n_high"])]
    low = [r["idf"] for r in rows if r["class"] != "special" for _ in range(r["n"] - r["n_high"])]
    got = _idf_auc(pa.Table.from_pylist(rows, VOCABULARY_SCHEMA))
    if high and low:
        wins = sum((a > b) + (a == b) / 2 for a, b in itertools.product(high, low))
        assert got == pytest.approx(wins / len(high) / len(low))
    else:
        assert got is None


def test_a_layer_of_zeros_has_facts_and_can_be_shown(tmp_path: Path) -> None:
    run = _run(tmp_path, (0,), scale=0.0)
    (facts,) = summarise(run).layers
    assert (facts.cv, facts.q3_over_q2) == (0.0, 0.0)
    assert "0.0000" in _shown(run, 100)


# --- the tables
# ------------------------------------------------------------------------------------------

HEADS = ("layer", "of", "tokens", "Q1", "Q2", "Q3", "max", "CV", "Q3/Q2", "sinks")


def _table(text: str, title: str) -> list[str]:
    """Lines of the table under ``title``, its head first."""
    lines = itertools.takewhile(
        str.rstrip, itertools.islice(text[text.index(title) :].splitlines(), 2, None)
    )
    head, rule, *rows = lines
    assert set(rule) == {" ", "─"}
    return [head, *rows]


@pytest.mark.parametrize("width", [80, 140])
@pytest.mark.parametrize("layers", [(8,), (0, 8), (0, 4, 8, 12), tuple(range(13))])
@pytest.mark.parametrize(("n_sinks", "scale"), [(0, 1.0), (12_345, 3000.0)])
def test_no_terminal_loses_a_head_or_a_figure(
    tmp_path: Path, width: int, layers: tuple[int, ...], n_sinks: int, scale: float
) -> None:
    text = _shown(_run(tmp_path, layers, n_sinks=n_sinks, scale=scale), width)
    assert "…" not in text
    tables = text[: text.index("To be careful about")]
    assert max(map(len, tables.splitlines())) <= width
    thresholds = _table(text, "Thresholds")
    assert tuple(thresholds[0].split()) == HEADS
    for layer in layers:
        (row,) = [line.split() for line in thresholds if re.match(rf" *{layer} +all ", line)]
        assert row[2] == "937,800" and float(row[3].replace(",", "")) == pytest.approx(3.5 * scale)
        assert row[7:9] == ["0.125", "1.062"]
    assert sum("no sinks" in line for line in thresholds) == (len(layers) if n_sinks else 0)


def test_what_is_wider_than_the_terminal_is_not_cut_short(tmp_path: Path) -> None:
    rows = [
        _threshold(8, p, 1.0, 123_456_789) | {"n": 12_345_678_901}
        for p in ("tokens", "tokens_without_sinks")
    ]
    text = _shown(_run(tmp_path, (8,), thresholds=rows), 60)
    assert "…" not in text and tuple(_table(text, "Thresholds")[0].split()) == HEADS
    assert "12,345,678,901" in text and "123,456,789" in text


@pytest.mark.parametrize("width", [80, 140])
@pytest.mark.parametrize("layers", [(8,), (0, 8), (0, 4, 8, 12), tuple(range(13)), (1, 2, 3, 4, 5)])
def test_class_shares_stand_beside_their_control(
    tmp_path: Path, width: int, layers: tuple[int, ...]
) -> None:
    run = _run(tmp_path, layers)
    text = _shown(run, width)
    lines = _table(text, "Which classes")
    shown = [int(k) for k in re.findall(r"layer (\d+)", lines[0])]
    assert layers[-1] in shown and (0 in shown) == (
        0 in layers
    )  # the deepest, and the control if there is one
    assert len(shown) >= min(len(layers), 2 if width == 80 else 4)
    assert text.count("control") == (0 in layers)
    facts = {f.layer: f for f in summarise(run).layers}
    for at, name in enumerate(CLASSES):
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        shares = [
            f"{facts[k].classes[at].share:.3f} ({facts[k].classes[at].low:.3f}-" for k in shown
        ]
        assert all(share in line for share in shares)
    if layers[0] != 0:
        assert f"command with --layers 0,{layers[0]}" in " ".join(text.split())


def test_the_summary_names_the_run_its_model_and_what_to_be_careful_about(tmp_path: Path) -> None:
    text = _shown(_run(tmp_path, n_sinks=12), 200)
    for part in (
        "Run 20261122T010203.004Z-abcdef012345",
        "31,103 = 31,100 measured + 2 empty + 1 quarantined, in 12 files",
        "1,000,000, of them 62,200 special",
        "(bert, 12 layers, float32)",
        "0, 8  (0 = embeddings)",
        "6.00 bytes a token in the tokens table, 7.00 in all",
        "20.0%",
        "5 of 9 shards new",
        "1 file (900 kB) with an ending that is no known format: x.pdf",
        "Layer 8: Q3 lies 6.2% above the median (CV 0.12)",
        "special tokens have mean 2.7500, the others 4.0000",
        "12 sinks over 10 medians: compare medians, not means.",
        "Never compare raw strengths across layers",
    ):
        assert part in text, part


def test_markup_in_texts_and_names_is_shown_as_it_is(tmp_path: Path) -> None:
    texts = ["[bold]x[/bold]", "[/nothing]", "[link=x]", "\\[", "[", "a\\", "日本"]
    types = [_type(8, i, t, "content", 50, 10 * i, 1.0) for i, t in enumerate(texts)]
    run = _run(tmp_path, (8,), types)
    text = _shown(run, 100)
    summary = summarise(run)
    facts = replace(
        summary.layers[0], labels={"tokens": summary.layers[0].thresholds["tokens"] | {"q3": 9.0}}
    )
    hostile = summary.info.copy()
    hostile["config"] = hostile["config"] | {"thresholds": "\x1b]0;x\x1b[2J"}
    console = Console(file=io.StringIO(), width=100, highlight=False)
    overview.render(replace(summary, info=hostile, layers=(facts,)), console)
    assert isinstance(console.file, io.StringIO) and "frozen thresholds" in console.file.getvalue()
    assert "\x1b" not in console.file.getvalue()
    assert "/data/[bold]news[/bold]/*.jsonl" in text and " [red]bert" in text


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("sentence-transformers/all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2"),
        ("bert-base-uncased", "bert-base-uncased"),
        ("/srv/secret/models/minilm", "minilm"),
        ("/srv/models/minilm/", "minilm"),
        ("./minilm", "minilm"),
        ("~/lab/gt_minilm/model", "gt_minilm/model"),
        ("/runs/bert-7/checkpoint-1000", "bert-7/checkpoint-1000"),
        ("/srv/quantised/smollm2-135m.Q8_0.gguf", "smollm2-135m.Q8_0.gguf"),
        ("/root/.cache/hub/models--org--name/snapshots/" + "0a" * 20, "org/name"),
        ("C:\\models\\minilm", "minilm"),
        ("/model", "model"),
    ],
)
def test_a_model_is_named_without_where_it_is_on_a_disk(name: str, title: str) -> None:
    assert run_facts.model_title(name) == title
