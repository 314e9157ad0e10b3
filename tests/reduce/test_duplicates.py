"""Copies and repeated ids: what a run leaves out, against a run over the corpus without copies."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import duckdb
import numpy as np
import pyarrow as pa
import pytest

import afn_ray
from afn_ray.analysis import audit, evidence, own_parts, verdict, verify
from afn_ray.analysis.limits import Limit
from afn_ray.analysis.policy import Policy
from afn_ray.config import RunConfig
from afn_ray.query.catalog import write_catalog
from afn_ray.reduce import compare, duplicates, groups, losses
from afn_ray.reduce.duplicates import KEEP, ONCE, WEIGHT
from afn_ray.reduce.shards import CommittedFile
from afn_ray.run_info import RunInfo
from afn_ray.runs import events
from afn_ray.show import run_facts, summary
from afn_ray.store import manifest, storage, uris
from conftest import config_of, write_jsonl

NOT_OF_DOCUMENTS = ("plan", "shards", "files", "copied")
"""Tables of a run that say what was read, copies included."""
OF_FILES = ("bytes", "share_read")
"""Columns of ``sources`` that describe the files."""
FIRST_BANNER = 3
BANNER: dict[str, Any] = {
    "text": "Read the BANNER of this Page",
    "lang": "en",
    "tags": ["V", "D", "N", "P", "D", "N"],
}


def documents(verses: list[str]) -> list[list[dict[str, Any]]]:
    """Three files of documents so short that each fills a batch; copies stand within and across."""
    rows: list[dict[str, Any]] = []
    for at, verse in enumerate(verses[:60]):
        words = [*verse.split()[:5], str(at)]
        lang = "de" if at % 3 else "en"
        rows.append({"text": " ".join(words), "lang": lang, "tags": ["X", "Y"] * 3, "id": f"v{at}"})
    files = [rows[:20], rows[20:40], rows[40:]]
    files[0].insert(FIRST_BANNER, BANNER | {"id": "v1"})  # v1 twice
    files[0].append(BANNER | {"id": "b2"})
    files[1][5:5] = [BANNER | {"id": "b3", "lang": "de"}, {"text": "", "lang": "en", "id": "e"}]
    files[1].append({**rows[0], "lang": "only a copy has this", "id": "v0"})
    files[2] = [{**row, "id": None} for row in files[2][:10]]
    files.append(
        [{**rows[7], "id": "v7"}, {**rows[9], "id": "\x1b[2J" + "long" * 99}]
    )  # copies alone
    return files


def without_copies(files: list[list[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    seen: set[str] = set()
    found = []
    for rows in files:
        first = []
        for row in rows:
            if not row["text"] or row["text"] not in seen:
                seen.add(row["text"])
                first.append(row)
        found.append(first)
    return found


def write(folder: Path, files: list[list[dict[str, Any]]]) -> None:
    folder.mkdir(exist_ok=True)
    for at, rows in enumerate(files):
        write_jsonl(
            folder / f"{at}.jsonl",
            [{k: v for k, v in row.items() if v is not None} for row in rows],
        )


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, verses: list[str]
) -> dict[str, RunConfig | str]:
    """Runs of each choice over one store, and one over the corpus without its copies."""
    folder = tmp_path_factory.mktemp("duplicates")
    files = documents(verses)
    config = config_of(
        tiny_bert,
        folder / "corpus",
        folder / "store",
        batch_tokens=16,
        window_tokens=16,
        layers="1,2",
        signals="strength,shift,neurons",
        top_neurons=2,
        shard_bytes=2048,
        id_column="id",
        keep_columns="lang",
        group_by="lang",
        thresholds_by="group",
        labels="tags",
    )
    write(folder / "corpus", files)
    found: dict[str, Any] = {"config": config, "verses": verses}
    for choice in (KEEP, ONCE, WEIGHT):
        with afn_ray.run(replace(config, duplicates=choice)) as run:
            found[choice] = run.uri
    write(folder / "corpus", without_copies(files))
    with afn_ray.run(replace(config, store=str(folder / "alone"))) as run:
        found["alone"] = run.uri
    write(folder / "corpus", files)
    return found


def tables_of(uri: str) -> dict[str, pa.Table]:
    run = manifest.find_run(uri)
    return {name: manifest.read_table(run, name) for name in run.info["tables"]}


def ask(uri: str, query: str) -> list[dict[str, Any]]:
    with afn_ray.open_run(uri) as run:
        rows: list[dict[str, Any]] = run.sql(query).to_arrow_table().to_pylist()
    return rows


def test_a_run_that_counts_texts_once_has_the_tables_of_a_run_without_the_copies(
    runs: dict[str, Any],
) -> None:
    once, alone = tables_of(runs[ONCE]), tables_of(runs["alone"])
    assert once.keys() == alone.keys() | {"duplicates"}
    ids = {}
    for uri in (runs[ONCE], runs["alone"]):
        ids[uri] = {row["doc"]: row["text_sha256"] for row in ask(uri, "FROM documents")}
    for name in alone.keys() - {*NOT_OF_DOCUMENTS}:
        ours, theirs = once[name], alone[name]
        for uri, table in ((runs[ONCE], ours), (runs["alone"], theirs)):
            for column in {"doc", "example_doc"} & {*table.column_names}:
                hashes = [ids[uri].get(doc) for doc in table[column].to_pylist()]
                table = table.set_column(
                    table.column_names.index(column), column, pa.array(hashes, pa.string())
                )
            table = table.drop_columns([c for c in OF_FILES if c in table.column_names])
            ours, theirs = (table, theirs) if uri == runs[ONCE] else (ours, table)
        assert ours.equals(theirs), name
    counts = [manifest.find_run(uri).info["counts"] for uri in (runs[ONCE], runs["alone"])]
    for name in ("documents", "tokens", "special", "empty"):
        assert counts[0][name] == counts[1][name], name


def test_every_choice_reads_the_same_shards(runs: dict[str, Any]) -> None:
    for choice in (ONCE, WEIGHT):
        counts = manifest.find_run(runs[choice]).info["counts"]
        assert counts["shards_reused"] == counts["shards"] > 2
        kept, others = tables_of(runs[KEEP])["shards"], tables_of(runs[choice])["shards"]
        assert others.equals(kept)
    assert len({runs[choice].rpartition("-")[2] for choice in (KEEP, ONCE, WEIGHT)}) == 3


def test_views_count_no_copy_and_documents_name_the_first(runs: dict[str, Any]) -> None:
    rows = ask(runs[ONCE], "FROM documents ORDER BY doc")
    first: dict[str, int] = {}
    for row in rows:
        expected = (
            first.setdefault(row["text_sha256"], row["doc"]) if row["n_tokens"] else row["doc"]
        )
        assert row["duplicate_of"] == (None if expected == row["doc"] else expected)
    copies = {row["doc"]: row["n_tokens"] for row in rows if row["duplicate_of"] is not None}
    assert len(copies) == 5
    (counted,) = ask(runs[ONCE], "SELECT count(*) AS n, count(DISTINCT doc) AS docs FROM tokens")
    assert counted == {
        "n": sum(row["n_tokens"] for row in rows) - sum(copies.values()),
        "docs": sum(row["n_tokens"] > 0 for row in rows) - len(copies),
    }
    for view in ("words", "token_neurons"):
        docs = {row["doc"] for row in ask(runs[ONCE], f"SELECT DISTINCT doc FROM {view}")}
        assert not docs & copies.keys() and len(docs) == counted["docs"]
    kwic = "SELECT doc FROM kwic('banner', most := 9)"
    assert [row["doc"] for row in ask(runs[ONCE], kwic)] == [FIRST_BANNER]
    assert len(ask(runs[KEEP], kwic)) == 3
    last = max(copies)
    (text,) = ask(runs[ONCE], f"SELECT document_text({last}) AS text")
    assert text["text"], "the text of a copy can be read"
    assert not ask(runs[KEEP], "FROM documents WHERE duplicate_of IS NOT NULL")


def test_tables_without_copies_are_those_of_the_recorded_rows(runs: dict[str, Any]) -> None:
    """Not the reduce, but the tokens as recorded, of a run that keeps copies, without those."""
    left_out = tables_of(runs[ONCE])["duplicates"]["doc"].to_pylist()
    with afn_ray.open_run(runs[KEEP]) as run:
        tokens = run.sql("FROM tokens WHERE NOT is_special").df()
    tokens = tokens[~tokens["doc"].isin(left_out)]
    for row in ask(runs[ONCE], "FROM thresholds WHERE population = 'tokens'"):
        strengths = tokens[f"strength_{row['layer']}"].to_numpy()
        quartiles = np.quantile(strengths, [0.25, 0.5, 0.75], method="inverted_cdf")
        assert [row["q1"], row["q2"], row["q3"]] == quartiles.tolist()
        assert (row["n"], row["min"], row["max"]) == (
            len(strengths),
            strengths.min(),
            strengths.max(),
        )
    n_docs = tokens.groupby("token_id")["doc"].nunique().to_dict()
    vocabulary = ask(runs[ONCE], "FROM vocabulary WHERE layer = 1 AND class <> 'special'")
    assert {row["token_id"]: row["n_docs"] for row in vocabulary} == n_docs


def test_a_drawn_copy_counts_in_place_of_the_first(runs: dict[str, Any]) -> None:
    rows = ask(runs[WEIGHT], "FROM documents WHERE n_tokens > 0 ORDER BY doc")
    copies = [row for row in rows if row["duplicate_of"] is not None]
    of_text = Counter(row["text_sha256"] for row in rows)
    assert Counter(row["text_sha256"] for row in copies) == {
        text: n - 1 for text, n in of_text.items() if n > 1
    }
    by_doc = {row["doc"]: row for row in rows}
    for row in copies:
        counted = by_doc[row["duplicate_of"]]
        assert counted["duplicate_of"] is None and counted["text_sha256"] == row["text_sha256"]
    # The whole is that of the first copies, as texts have the same strengths wherever they are.
    for name in ("thresholds", "vocabulary", "histogram", "neurons", "signals"):
        assert tables_of(runs[WEIGHT])[name].equals(tables_of(runs[ONCE])[name]), name


def test_each_of_n_copies_is_drawn_with_the_same_chance() -> None:
    n_texts, shards = 4000, ["1" * 32, "2" * 32, "9" * 32]
    keys = duplicates._keys([hashlib.sha256(b"%d" % at).digest() for at in range(n_texts)])
    docs = np.arange(n_texts)
    ranks = np.array([duplicates._drawn(keys, docs, shard) for shard in shards])
    shares = np.bincount(ranks.argmin(axis=0), minlength=3) / n_texts
    assert np.abs(shares - 1 / 3).max() < 4 * np.sqrt(2 / 9 / n_texts)


@pytest.mark.parametrize("num_parts", [1, 3, 8])
@pytest.mark.parametrize("choice", [ONCE, WEIGHT])
def test_copies_are_those_of_a_dictionary_of_texts(
    runs: dict[str, Any], monkeypatch: pytest.MonkeyPatch, num_parts: int, choice: str
) -> None:
    """Any number of parts finds the copies that one dictionary of all texts finds."""
    rows = duplicates._Rows
    random = np.random.default_rng(num_parts)
    texts = random.integers(0, 60, 300)
    keys = duplicates._keys([hashlib.sha256(b"%d" % at).digest() for at in texts.tolist()])
    keys[::7, 0] = keys[0, 0]  # texts whose hashes share their first 64 bits
    docs, ranks = np.arange(300), random.integers(0, 9, 300).astype(np.uint64)
    found = rows(
        keys, docs, ranks if choice == WEIGHT else docs.astype(np.uint64), np.ones(300, np.int32)
    )
    pieces = [duplicates._copies(part, choice) for part in found.cut(num_parts)]
    groups: dict[bytes, list[int]] = defaultdict(list)
    for doc in sorted(range(300), key=lambda doc: (found.ranks[doc], doc)):
        groups[keys[doc].tobytes()].append(doc)
    expected = {doc: of_text[0] for of_text in groups.values() for doc in of_text[1:]}
    of_doc = [row for _, table, _ in pieces for row in table.to_pylist()]
    got = {row["doc"]: row["duplicate_of"] for row in of_doc}
    later = sorted(doc for *_, docs in pieces for doc in docs.tolist())
    assert later == sorted(doc for of in groups.values() for doc in sorted(of)[1:])
    assert got == expected
    assert not len(duplicates._copies(found.take(docs[:0]), choice)[1]), "no texts, no copies"
    assert sum(sums[0] for sums, _, _ in pieces) == len(expected)
    assert sum(sums[2] for sums, _, _ in pieces) == sum(len(some) > 1 for some in groups.values())


def test_a_run_says_how_many_copies_and_repeated_ids_it_has(runs: dict[str, Any]) -> None:
    infos = {choice: manifest.find_run(runs[choice]).info for choice in (KEEP, ONCE, WEIGHT)}
    figures = {choice: duplicates.figures_of(info) for choice, info in infos.items()}
    found = figures[KEEP]
    assert found is not None and figures[ONCE] == figures[WEIGHT] == found
    assert (found.documents, found.texts) == (5, 4)
    assert (found.repeated_ids, found.id_documents) == (3, 6)
    assert [(one.id, one.n) for one in found.examples] == [("v0", 2), ("v1", 2), ("v7", 2)]
    for info in infos.values():
        assert duplicates.duplicate_share(info, found) == 5 / 56
    facts = dict(run_facts.facts(summary.summarise(manifest.find_run(runs[ONCE]))))
    assert facts["copies"].startswith("5 documents (") and "the first" in facts["copies"]
    assert facts["repeated ids"].startswith("3 ids of 6 documents: v0 (2 documents), ")
    notes = compare.compare(manifest.find_run(runs[KEEP]), manifest.find_run(runs[ONCE])).notes
    assert any("duplicates is keep in A and once in B" in note for note in notes)


def test_an_id_of_any_content_is_named_printable_and_short(runs: dict[str, Any]) -> None:
    run = manifest.find_run(runs[KEEP])
    (doc,) = ask(runs[KEEP], "SELECT max(doc) AS doc FROM documents")
    offsets = tables_of(runs[KEEP])["shards"].to_pylist()[-1]
    file = CommittedFile(
        run.store,
        run.info["measure"]["id"],
        offsets["shard"],
        offsets["documents_file"].rpartition("/")[2],
        offsets["document_bytes"],
        hashlib.sha256(
            storage.read_bytes(uris.join(run.store, offsets["documents_file"]))
        ).hexdigest(),
    )
    text = duplicates._id_of([duplicates._Place(file, offsets["doc_offset"])], doc["doc"])
    assert text.startswith("\\x1b[2Jlong") and len(text) == duplicates.ID_CHARS + 3


def test_verify_proves_what_is_left_out(runs: dict[str, Any]) -> None:
    store = runs["config"].store
    run = manifest.find_run(runs[ONCE])
    table = manifest.read_table(run, "duplicates")
    info: dict[str, Any] = {**run.info}
    del info["id"], info["schema_version"]
    saved = storage.read_bytes(uris.join(run.uri, "run.json"))
    wrong = table.set_column(1, "duplicate_of", pa.array([0] * len(table), pa.int64()))
    try:
        for tables, facts, message in (
            ({"duplicates": manifest.write_table(run, "duplicates", wrong)}, {}, "duplicate_of is"),
            ({}, {"duplicates": info["duplicates"] | {"documents": 4}}, "its duplicates are not"),
        ):
            storage.delete([uris.join(run.uri, "run.json")])
            named = {name: entry for name, entry in info["tables"].items() if name != "plan"}
            altered = info | facts | {"tables": named | tables}
            manifest.finish_run(run, cast(RunInfo, altered))
            messages = [finding.message for finding in verify.verify_store(run.uri).findings]
            assert any(message in one for one in messages), messages
        storage.delete([uris.join(run.uri, "run.json")])  # as if killed before the end
        with afn_ray.run(replace(runs["config"], duplicates=ONCE)) as again:
            made = manifest.find_run(again.uri).info["tables"]
        assert made | {"plan": None} == info["tables"] | {"plan": None}
        found = verify.verify_store(store).findings
        assert not found, found[0].message
    finally:
        storage.delete([uris.join(run.uri, "run.json")])
        storage.write_once(uris.join(run.uri, "run.json"), saved)


def test_a_policy_limits_copies_and_repeated_ids(runs: dict[str, Any], tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text('duplicate_share = "9%"\nrepeated_ids = 2\n')
    for choice in (KEEP, ONCE):
        found = audit.run_audit(
            replace(runs["config"], duplicates=choice), afn_ray.read_policy(str(policy))
        )
        share, ids = found.rules
        assert (share.value, share.passed) == (5 / 56, True) and "5 documents" in str(share.where)
        assert (ids.value, ids.passed) == (3, False) and "v0 (2 documents), v1" in str(ids.where)
        assert found.state == verdict.BROKEN
        assert any(note.startswith("Ids are repeated: 3 ids") for note in found.notes)
        body = audit.to_json(found)["duplicates"]
        assert body is not None and body["choice"] == choice and body["share"] == 5 / 56
        assert body["examples"][0] == {"id": "v0", "n": 2, "doc": 0} and body["near_share"] is None
    run = manifest.find_run(runs[KEEP])
    info = run.info.copy()
    del info["duplicates"]
    older = replace(run, info=info)
    num_read = run.info["counts"]["documents"]
    for choice in (KEEP, ONCE, WEIGHT):  # shares are of the documents read, copies included
        one = manifest.find_run(runs[choice])
        counts = one.info["counts"] | {"empty": 2, "quarantined": 1}
        one = replace(one, info=one.info | {"counts": counts})
        values = dict(evidence._of_run(one, losses.of_run(one)))
        assert values["empty_documents"].value == 2 / num_read
        assert values["quarantined_documents"].value == 1 / num_read
    values = dict(evidence._of_run(older, losses.of_run(run)))
    assert values["repeated_ids"].value is None and "older" in str(values["repeated_ids"].reason)


def test_a_broken_share_of_copies_names_the_documents_that_have_them(runs: dict[str, Any]) -> None:
    """The counted one of each text, the most frequent first, though no copy is scanned."""
    policy = Policy((Limit("duplicate_share", 0),))
    for choice in (ONCE, WEIGHT):
        found = audit.run_audit(replace(runs["config"], duplicates=choice), policy, mark=False)
        named = [one for one in found.rules[0].culprits if one.kind == "document"]
        texts = {row["doc"]: row for row in ask(found.run.uri, "SELECT doc, source FROM documents")}
        copies = Counter(
            manifest.read_table(found.run, "duplicates")["duplicate_of"].to_pylist()
        ).most_common()
        expected = sorted(copies, key=lambda pair: (-pair[1], pair[0]))[:5]
        assert [(one.name, one.reason) for one in named] == [
            (f"{doc} of {texts[doc]['source']}", f"{n + 1:,} documents have this text")
            for doc, n in expected
        ]
        assert str(named[0].text).replace(" ", "") == BANNER["text"].replace(" ", "")


def copies_by(runs: dict[str, Any], part: Callable[[dict[str, Any]], str]) -> dict[str, float]:
    """The share of copies in each part of the corpus, counted text by text."""
    seen: set[str] = set()
    numbers: dict[str, list[int]] = {}
    for at, rows in enumerate(documents(runs["verses"])):
        for row in rows:
            if row["text"]:
                of_part = numbers.setdefault(part(row | {"file": at}), [0, 0])
                of_part[0] += 1
                of_part[1] += row["text"] in seen
                seen.add(row["text"])
    return {name: found / n for name, (n, found) in numbers.items()}


@pytest.mark.parametrize("choice", [KEEP, ONCE, WEIGHT])
def test_a_policy_limits_copies_in_each_source_and_group(runs: dict[str, Any], choice: str) -> None:
    """Also in a file that has copies alone, of which a run that counts them once has no token."""
    run = manifest.find_run(runs[choice])
    for kind, part in (
        ("source", lambda row: f"{row['file']}.jsonl"),
        ("group", lambda row: row["lang"]),
    ):
        found = {one.name.rpartition("/")[2]: one.value for one in own_parts.copies(run, kind)}
        assert found == copies_by(runs, part)
    policy = Policy(
        (Limit("duplicate_share", 0.5, of="source"), Limit("duplicate_share", 0.05, of="group")),
        min_tokens={"source": 1, "group": 1},
    )
    audited = audit.run_audit(replace(runs["config"], duplicates=choice), policy, mark=False)
    of_source, of_group = audited.rules
    assert of_source.value == 1 and str(of_source.where).endswith("3.jsonl")
    assert of_source.state == of_group.state == verdict.BROKEN
    named = [one for one in of_source.culprits if one.kind == "document"]
    with afn_ray.open_run(runs[choice]) as opened:
        rows = opened.sql("SELECT doc, source, doc_id FROM documents ORDER BY doc").fetchall()
    of_part = [(doc, str(uri)) for doc, uri, _ in rows if str(uri).endswith("3.jsonl")]
    assert [one.name for one in named] == [f"{doc} of {uri}" for doc, uri in of_part]
    firsts = [min(doc for doc, _, name in rows if name == of) for of in ("v7", "v9")]
    assert [one.reason for one in named] == [f"a copy of document {doc}" for doc in firsts]
    # The worst part that is judged comes first, though smaller ones are all copies.
    large = replace(policy, min_tokens={"source": 100})
    (rule, _) = audit.run_audit(replace(runs["config"], duplicates=choice), large, mark=False).rules
    assert rule.where is None or not str(rule.where).endswith("3.jsonl")
    parts = [one.name for one in rule.culprits if one.kind == "source"]
    assert not any(name.endswith("3.jsonl") for name in parts)


@pytest.mark.parametrize("choice", [KEEP, ONCE])
@pytest.mark.parametrize("by", ["site", "lang"])
def test_copies_are_shared_out_among_joined_groups_and_documents_without_a_value(
    by: str, choice: str, tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups are by a kept column and by a key of the path: two groups, the others,
    and those with no value.
    """
    monkeypatch.setattr(groups, "MAX_GROUPS", 2)
    texts = [f"word number {at} of {' '.join('abcdefg'[: 2 + at % 5])}" for at in range(40)]
    of_site = {  # a and b are the largest
        "": [texts[0], texts[0], texts[30]],
        "a": [*texts[1:14], texts[2]],
        "b": [*texts[14:25], texts[3], texts[0]],
        "c": [texts[25], texts[4], texts[4]],
        "d": [texts[26], texts[27]],
    }
    shares: dict[str, list[bool]] = {}
    seen = set[str]()
    for site, rows in of_site.items():
        folder = tmp_path / "c" / f"site={site}" if site else tmp_path / "c"
        folder.mkdir(parents=True, exist_ok=True)
        value = {"lang": site} if site else {}
        write_jsonl(folder / "x.jsonl", [{"text": text, **value} for text in rows])
    # "site=..." comes before "x.jsonl" in the corpus.
    for site in (*"abcd", ""):
        name = site if site in ("a", "b") else groups.OTHERS if site else "(no value)"
        for text in of_site[site]:
            shares.setdefault(name, []).append(text in seen)
            seen.add(text)
    config = config_of(
        tiny_bert,
        tmp_path / "c",
        tmp_path / "s",
        keep_columns="lang",
        group_by=by,
        duplicates=choice,
    )
    policy = Policy((Limit("duplicate_share", 0, of="group"),), min_tokens={"group": 1})
    found = audit.run_audit(config, policy, mark=False)
    parts = {part.name: part.value for part in own_parts.copies(found.run, "group")}
    assert parts == {name: sum(copies) / len(copies) for name, copies in shares.items()}
    (rule,) = found.rules
    beyond = sorted((name for name in parts if parts[name]), key=lambda name: -parts[name])
    assert [one.name for one in rule.culprits if one.kind == "group"] == beyond
    assert rule.where == beyond[0] == "(no value)" and len(beyond) == 4
    documents = [one for one in rule.culprits if one.kind == "document"]
    assert len(documents) == 1 and documents[0].reason.startswith("the first of 2 copies of")


def test_a_value_that_only_copies_have_is_among_the_joined_groups(
    tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that counts texts once has no group without a value, if only copies lack it."""
    monkeypatch.setattr(groups, "MAX_GROUPS", 1)
    (tmp_path / "c").mkdir()
    rows = [{"text": f"word {at}", "lang": of} for at, of in enumerate(("en", "en", "de"))]
    write_jsonl(tmp_path / "c" / "a.jsonl", rows)
    copies = [{"text": "word 0"}, {"text": "word 1", "lang": "fr"}]
    write_jsonl(tmp_path / "c" / "b.jsonl", copies)
    config = config_of(
        tiny_bert,
        tmp_path / "c",
        tmp_path / "s",
        keep_columns="lang",
        group_by="lang",
        duplicates=ONCE,
    )
    policy = Policy((Limit("duplicate_share", 0, of="group"),), min_tokens={"group": 1})
    found = audit.run_audit(config, policy, mark=False)
    assert {part.name: part.value for part in own_parts.copies(found.run, "group")} == {
        "en": 0,
        groups.OTHERS: 2 / 3,
    }
    (rule,) = found.rules
    named = [one.reason for one in rule.culprits if one.kind == "document"]
    assert (rule.where, named) == (
        groups.OTHERS,
        ["a copy of document 0", "a copy of document 1"],
    )
    assert not verify.verify_store(found.run.uri).findings


def test_a_run_says_what_it_leaves_out(runs: dict[str, Any]) -> None:
    for choice, expected in ((KEEP, []), (ONCE, ["of these tokens, 5 documents"])):
        said: list[events.Event] = []
        config = replace(runs["config"], duplicates=choice, store=f"{runs['config'].store}-said")
        afn_ray.run(config, on_event=said.append).close()
        texts = [one.message for one in said if isinstance(one, events.Complete)]
        found = [text for text in texts if text.startswith("of these")]
        assert len(found) == len(expected)
        assert all(text.startswith(start) for text, start in zip(found, expected, strict=True))


def test_frozen_thresholds_label_only_what_is_counted(runs: dict[str, Any], tmp_path: Path) -> None:
    config = replace(runs["config"], duplicates=ONCE, thresholds=runs[KEEP])
    with afn_ray.run(config) as run:
        frozen = run.sql("FROM labels WHERE population = 'tokens'").to_arrow_table().to_pylist()
        write_catalog(run.uri, tmp_path / "catalog.duckdb")
    q3 = {row["layer"]: row["q3"] for row in ask(runs[KEEP], "FROM thresholds")}
    with duckdb.connect(tmp_path / "catalog.duckdb", read_only=True) as catalog:
        for row in frozen:
            assert row["q3"] == q3[row["layer"]]
            query = f"SELECT count(*), sum(high_{row['layer']}) FROM tokens WHERE NOT is_special"
            assert catalog.execute(query).fetchone() == (row["n"], row["n_high"])
        (copies,) = catalog.execute("SELECT count(duplicate_of) FROM documents").fetchall()
        assert copies == (5,)


def test_kept_columns_named_as_in_the_queries_hide_nothing(tmp_path: Path, tiny_bert: Path) -> None:
    """Names that the corpus chooses, beside those that SQL of copies uses."""
    (tmp_path / "c").mkdir()
    odd = {"of": "x'); --", "first": 7, "copies": 1}
    write_jsonl(tmp_path / "c" / "a'; b.jsonl", [{"text": "Selah.", **odd}] * 3)
    columns = "of,first:int64,copies:int64"
    config = config_of(
        tiny_bert, tmp_path / "c", tmp_path / "s", keep_columns=columns, group_by="of"
    )
    limits = tuple(Limit("duplicate_share", 0.5, of=part) for part in ("source", "group"))
    policy = Policy(limits, min_tokens={"source": 1, "group": 1})
    for rule in audit.run_audit(config, policy, mark=False).rules:
        assert rule.value == 2 / 3
        named = [one for one in rule.culprits if one.kind == "document"]
        assert [one.reason for one in named] == ["the first of 2 copies of document 0"]
        assert all(one.name.endswith("a'; b.jsonl") for one in named)
