"""A store that has some columns of a run: the rest is measured, and the run is one from scratch."""

from __future__ import annotations

import gc
import json
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import afn_ray
from afn_ray.analysis import verify
from afn_ray.config import RunConfig
from afn_ray.corpus_values import Shard
from afn_ray.model import engine
from afn_ray.reduce import compare
from afn_ray.runs import composer, composition
from afn_ray.runs.recorder import Part, Recorder
from afn_ray.runs.task import Composition, Task
from afn_ray.runs.values import Values
from afn_ray.store import epochs, layout, manifest, plans, shard_files
from afn_ray.store.commits import COMPOSED, Commit
from afn_ray.tokens.feed import Chunk
from conftest import as_version_5, config_of, edit_checksummed, make_measure, recommit, write_jsonl

Ask = dict[str, Any]
"""Fields of a config that decide what is recorded."""
RunIn = Callable[[Path, Ask], manifest.RunFolder]
Tables = dict[str, pa.Table]
FEW: Ask = {"layers": "1", "signals": "strength"}
SIGNALS = "strength,shift,attention,trimmed,centred_mean,neurons"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, verses: list[str]) -> Path:
    """Three shards, with an empty document and one of several windows."""
    folder = tmp_path_factory.mktemp("columns") / "corpus"
    folder.mkdir()
    texts = [*verses[:14], "", " ".join(verses[20:26]), *verses[30:40]]
    write_jsonl(folder / "c.jsonl", [{"text": text} for text in texts])
    return folder


@pytest.fixture(scope="module")
def run_in(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, corpus: Path) -> RunIn:
    """A function that gives the run of an ask in a store."""

    def run(store: Path, ask: Ask) -> manifest.RunFolder:
        afn_ray.run(config_in(tiny_bert, corpus, store, ask)).close()
        return manifest.find_run(str(store))

    return run


def config_in(model: Path, corpus: Path, store: Path, ask: Ask) -> RunConfig:
    return config_of(model, corpus, store, shard_bytes=1500, screen=3, **ask)


@pytest.fixture(scope="module")
def scratch(
    tmp_path_factory: pytest.TempPathFactory, run_in: RunIn
) -> Callable[[Ask], manifest.RunFolder]:
    """A function that gives the run of an ask in a store of its own, made once."""

    @cache
    def made(ask: str) -> manifest.RunFolder:
        return run_in(tmp_path_factory.mktemp("scratch"), json.loads(ask))

    return lambda ask: made(json.dumps(ask))


@pytest.fixture(scope="module")
def from_scratch(scratch: Callable[[Ask], manifest.RunFolder]) -> Callable[[Ask], Tables]:
    """A function that gives all tables of a run in a store of its own."""
    return lambda ask: tables_of(scratch(ask))


@pytest.fixture(scope="module")
def stored_in(scratch: Callable[[Ask], manifest.RunFolder]) -> RunIn:
    """A function that copies the store of an ask's run to a folder, and gives the run there."""

    def stored(store: Path, ask: Ask) -> manifest.RunFolder:
        shutil.copytree(scratch(ask).store, store, dirs_exist_ok=True)
        return manifest.find_run(str(store))

    return stored


def tables_of(run: manifest.RunFolder) -> Tables:
    """All tables of ``run`` and of its shards, without what names attempts."""
    found: Tables = {}
    for name in run.info["tables"]:
        if name not in ("plan", "shards"):
            found[name] = manifest.read_table(run, name)
    measure_id = run.info["measure"]["id"]
    shards, _ = plans.read_shards(run)
    assert len(shards) == 3
    for at, shard in enumerate(shards):
        commit = shard_files.read_commit(run.store, measure_id, shard.id)
        assert commit is not None
        for table in commit.files:
            rows = shard_files.read_shard_table(run.store, measure_id, commit, table)
            found[f"{table} of shard {at}"] = rows.replace_schema_metadata(None)
        found[f"counts of shard {at}"] = pa.table(
            {k: [v] for k, v in commit.counts.items() if k != "forward_tokens"}
        )
    return found


def check_same(found: Tables, expected: Tables) -> None:
    assert list(found) == list(expected)
    for name, table in expected.items():
        assert plain(found[name]).equals(plain(table)), name


def folders_of(run: manifest.RunFolder) -> list[Path]:
    """The folders of the shards of ``run``, in order."""
    shards, _ = plans.read_shards(run)
    measure_id = run.info["measure"]["id"]
    return [Path(shard_files.shard_uri(run.store, measure_id, shard.id)) for shard in shards]


def committed_file(folder: Path, table: str) -> Path:
    entry = json.loads((folder / "commit.json").read_text())["files"][table]
    return folder / str(entry["name"])


def plain(table: pa.Table) -> pa.Table:
    """``table`` whose repeated strings have one dictionary each."""
    return table.unify_dictionaries().combine_chunks()


@pytest.fixture
def blocks_run(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of blocks that each forward pass has run."""
    found: list[int] = []
    submit = engine.Model.submit

    def spied(self: engine.Model, *args: Any, **named: Any) -> Any:
        pending = submit(self, *args, **named)
        found.append(self._pass.calls)
        return pending

    monkeypatch.setattr(engine.Model, "submit", spied)
    return found


@pytest.mark.parametrize(
    ("stored", "asked", "num_blocks"),
    [
        pytest.param([FEW], {"layers": "1,3"}, 3, id="a deeper layer"),
        pytest.param([{"layers": "3"}], {"layers": "1,3"}, 1, id="a lower layer"),
        pytest.param([{"layers": "1,3"}], FEW, 0, id="fewer layers"),
        pytest.param([FEW, {"layers": "3"}], {"layers": "1,3"}, 0, id="two runs together"),
        pytest.param([FEW], {"layers": "1", "signals": "shift,attention"}, 1, id="more signals"),
        pytest.param(
            [{"layers": "1", "signals": "shift,attention"}, {"layers": "2"}],
            {"layers": "1,2", "signals": "attention,shift"},
            2,
            id="signals at another layer",
        ),
        pytest.param(
            [{"layers": "2", "signals": SIGNALS, "mean_vectors": 9, "language": "auto"}],
            {"layers": "0,2", "signals": SIGNALS, "mean_vectors": 9, "language": "auto"},
            1,
            id="all that is recorded, the embeddings added",
        ),
        pytest.param(
            [{"layers": "0,2", "signals": SIGNALS, "mean_vectors": 9}],
            {"layers": "2", "signals": "neurons", "mean_vectors": 9},
            0,
            id="fewer of all",
        ),
    ],
)
def test_a_run_has_the_bits_of_one_from_scratch_in_every_order_of_asking(
    tmp_path: Path,
    run_in: RunIn,
    stored_in: RunIn,
    from_scratch: Callable[[Ask], Tables],
    blocks_run: list[int],
    stored: list[Ask],
    asked: Ask,
    num_blocks: int,
) -> None:
    expected = from_scratch(asked)
    stored_in(tmp_path, stored[0])
    for ask in stored[1:]:
        run_in(tmp_path, ask)
    blocks_run.clear()
    run = run_in(tmp_path, asked)
    assert max(blocks_run, default=0) == num_blocks
    check_same(tables_of(run), expected)


def test_a_plan_unpacks_no_commit_of_a_donor(
    tmp_path: Path,
    run_in: RunIn,
    stored_in: RunIn,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each takes 3 kB as an object, and a run may have a million."""
    stored_in(tmp_path, FEW)
    held: list[int] = []
    plan = composition.plan

    def counted(task: Task, todo: Sequence[Shard]) -> composition.Work:
        gc.collect()
        before = sum(isinstance(one, Commit) for one in gc.get_objects())
        work = plan(task, todo)
        gc.collect()
        held.append(sum(isinstance(one, Commit) for one in gc.get_objects()) - before)
        (group,) = work.composed
        assert [commit.shard for commit in group.donated] == [shard.id for shard in group.shards]
        return work

    monkeypatch.setattr(composition, "plan", counted)
    run_in(tmp_path, {"layers": "1,3"})
    assert held == [0]


@pytest.mark.parametrize(
    ("stored", "asked", "num_blocks"),
    [
        pytest.param(
            {"layers": "3", "signals": "neurons"},
            {"layers": "1,3", "signals": "neurons"},
            1,
            id="beside a layer that is measured",
        ),
        pytest.param({"layers": "1,3", "signals": "neurons"}, FEW, 0, id="alone"),
    ],
)
def test_columns_of_an_older_version_are_copied_in_the_form_of_today(
    tmp_path: Path,
    run_in: RunIn,
    stored_in: RunIn,
    from_scratch: Callable[[Ask], Tables],
    blocks_run: list[int],
    stored: Ask,
    asked: Ask,
    num_blocks: int,
) -> None:
    stored_in(tmp_path, stored)
    as_version_5(str(tmp_path))
    blocks_run.clear()
    run = run_in(tmp_path, asked)
    assert max(blocks_run, default=0) == num_blocks
    check_same(tables_of(run), from_scratch(asked))


def test_what_does_not_fit_is_measured_as_a_whole(
    tmp_path: Path,
    run_in: RunIn,
    stored_in: RunIn,
    from_scratch: Callable[[Ask], Tables],
) -> None:
    """One shard's columns are damaged, another's are of other rows, and a third one's are gone."""
    asked = {"layers": "1,3"}
    expected = from_scratch(asked)
    donor = stored_in(tmp_path, FEW)
    damaged, other, gone = folders_of(donor)
    name = committed_file(damaged, "tokens")
    data = bytearray(name.read_bytes())
    data[len(data) // 2] ^= 1
    name.write_bytes(data)
    tokens = pq.read_table(committed_file(other, "tokens"))
    at = tokens.schema.get_field_index("token_id")
    ids = pc.add(tokens["token_id"], pa.scalar(1, pa.int32()))
    wrong = tokens.set_column(at, tokens.schema.field(at), ids)
    sink = pa.BufferOutputStream()
    pq.write_table(wrong, sink)
    recommit(str(other), "tokens", sink.getvalue().to_pybytes())
    committed_file(gone, "tokens").unlink()
    run = run_in(tmp_path, asked)
    check_same(tables_of(run), expected)
    assert not any(COMPOSED in kind["made_by"] for kind in run.info["provenance"])


def test_a_document_that_one_layer_refuses_is_refused_by_a_run_over_both(
    tmp_path: Path,
    tiny_bert: Path,
    corpus: Path,
    run_in: RunIn,
    stored_in: RunIn,
    from_scratch: Callable[[Ask], Tables],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its shard is measured as a whole, in either order, and the run says so once."""
    asked, make = {"layers": "1,3"}, Recorder.make
    expected = from_scratch(FEW)

    def refuse(self: Recorder, chunk: Chunk, values: Values, first: int) -> Part:
        for at, one in enumerate(self._measure.series):
            if one.layer == 3 and not first:  # the first document of each shard's first chunk
                values.series[at, chunk.prepared.encoded.docs == 0] = np.nan
        return make(self, chunk, values, first)

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "make", refuse)
        whole = run_in(tmp_path / "whole", asked)
        stored_in(tmp_path / "parts", FEW)
        said: list[str] = []
        config = config_in(tiny_bert, corpus, tmp_path / "parts", asked)
        afn_ray.run(config, lambda event: said.append(event.message)).close()
        run = manifest.find_run(config.store)
    assert [text for text in said if "as a whole" in text] == [
        "warning: 3 shards measured as a whole: this attempt lacks a document that could not be "
        "measured"
    ]
    assert whole.info["counts"]["quarantined"] == 3
    check_same(tables_of(run), tables_of(whole))
    check_same(tables_of(run_in(tmp_path / "whole", FEW)), expected)


def test_a_run_killed_while_it_composes_goes_on_where_it_was(
    tmp_path: Path,
    run_in: RunIn,
    stored_in: RunIn,
    from_scratch: Callable[[Ask], Tables],
    monkeypatch: pytest.MonkeyPatch,
    tiny_bert: Path,
    corpus: Path,
) -> None:
    """A dry run tells what it composes; verify proves it; a comparison has the shared layer."""
    asked = {"layers": "1,3"}
    expected = from_scratch(asked)
    donor = stored_in(tmp_path, FEW)
    estimate = afn_ray.dry_run(config_in(tiny_bert, corpus, tmp_path, asked))
    assert (estimate.num_shards_composed, estimate.num_shards_done) == (3, 0)
    assert (
        estimate.composed == "of 3 shards only strength_3 is measured, the rest copied"
        and estimate.tokens_exact
    )
    publish, one_by_one = shard_files.publish, threading.Lock()
    done: list[Commit] = []

    def killed(*args: Any) -> Any:
        with one_by_one:
            if done:
                raise KeyboardInterrupt
            done.append(publish(*args))
            return done[0]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shard_files, "publish", killed)
        run_in(tmp_path, asked)
    run = run_in(tmp_path, asked)
    assert run.info["counts"]["shards_reused"] == 1
    check_same(tables_of(run), expected)
    assert estimate.tokens == run.info["counts"]["tokens"]
    assert sum(k["shards"] for k in run.info["provenance"] if COMPOSED in k["made_by"]) == 3
    assert not verify.verify_store(str(tmp_path)).findings
    found = compare.compare(donor, run)
    assert found.drift["layer"].unique().to_pylist() == [1] and found.drift["psi"][0].as_py() == 0
    assert any("layers 3 were not compared" in note for note in found.notes)


@pytest.mark.parametrize("more", ["neurons of HIGH tokens", "sums of states"])
def test_strengths_beside_what_depends_on_them_are_of_the_same_pass(
    more: str,
    tmp_path: Path,
    run_in: RunIn,
    stored_in: RunIn,
    from_scratch: Callable[[Ask], Tables],
) -> None:
    """Stored ones may differ in their last digits; the other columns are copied."""
    asked: Ask = {"layers": "2", "signals": "shift"}
    donor = stored_in(tmp_path, asked)
    if more == "sums of states":
        asked |= {"mean_vectors": 9}
    else:
        asked |= {"signals": "shift,neurons", "neurons_of": "high", "thresholds": donor.uri}
    expected = from_scratch(asked)
    for folder in folders_of(donor):
        tokens = pq.read_table(committed_file(folder, "tokens"))
        at = tokens.schema.get_field_index("strength_2")
        other = pc.multiply(tokens["strength_2"], pa.scalar(1.000001, pa.float32()))
        sink = pa.BufferOutputStream()
        pq.write_table(tokens.set_column(at, tokens.schema.field(at), other), sink)
        recommit(str(folder), "tokens", sink.getvalue().to_pybytes())
    run = run_in(tmp_path, asked)
    assert any(COMPOSED in kind["made_by"] for kind in run.info["provenance"])
    check_same(tables_of(run), expected)


def test_columns_are_copied_from_the_generation_that_counts(
    tmp_path: Path, run_in: RunIn, stored_in: RunIn
) -> None:
    """The files of an earlier one may be gone."""
    donor = stored_in(tmp_path, FEW)
    for folder in folders_of(donor):
        shutil.copy(folder / "commit.json", folder / layout.commit_name(1))
        edit_checksummed(
            f"{folder}/commit.json", lambda body: body["files"]["tokens"].update(name="gone")
        )
    epochs.publish(str(tmp_path), epochs.Epoch().after({}, frozenset()))
    run = run_in(tmp_path, {"layers": "1,3"})
    assert all(COMPOSED in kind["made_by"] for kind in run.info["provenance"])


def test_what_is_measured_beside_copied_columns_has_the_placed_tokenizers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Task] = []

    def processor(task: Task) -> SimpleNamespace:
        made.append(task)
        return SimpleNamespace(counters=None)

    monkeypatch.setattr(composer, "Processor", processor)
    config, measure = config_of(tmp_path, tmp_path, tmp_path), make_measure()
    rest = Task(config, measure, "cpu")
    placed = replace(config, tokenizer_workers=2)
    task = Task(placed, measure, "cpu", worker=3, composition=Composition((), rest))
    composer.Composer(task)
    assert [(one.config.tokenizer_workers, one.worker) for one in made] == [(2, 3)]
