"""A store that somebody altered and sealed again: a finding, a refusal or a right answer, and never
a traceback.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

import afn_ray
from afn_ray.analysis import verify
from afn_ray.errors import AfnError, StoreError
from afn_ray.query.database import open_run
from afn_ray.reduce import compare
from afn_ray.runs import status, status_text
from afn_ray.show import overview, report, run_facts, summary
from afn_ray.store import garbage, gc_report, manifest
from conftest import config_of, edit_checksummed, listed, recommit, rewrite, write_jsonl

NUM_STORES = {"short": 4, "long": 1000}

WEIRD: list[Any] = [
    None, True, -1, 0, 1, 1.5, 1e308, -(2**63), 2**64, 10**30, float("nan"), "", "x",
    "../../etc/passwd", "\x1b[31m",
    "😀", "2026-13-99T99:99:99", [], [[]], {}, {"a": {"b": []}}, ["x"] * 50, "9" * 400, [None],
    {"": None},
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, verses: list[str]) -> Path:
    """A store of two runs with neurons and another signal, the second of a corpus that grew."""
    folder = tmp_path_factory.mktemp("altered")
    (folder / "corpus").mkdir()
    write_jsonl(folder / "corpus" / "a.jsonl", [*({"text": t} for t in verses[:25]), "no JSON"])
    config = config_of(
        tiny_bert,
        folder / "corpus",
        folder / "store",
        shard_bytes=2048,
        layers="0,1,2",
        signals="strength,shift,neurons",
    )
    afn_ray.run(config).close()
    write_jsonl(folder / "corpus" / "b.jsonl", [{"text": t} for t in verses[25:30]])
    afn_ray.run(config).close()
    return folder / "store"


# --- what is altered
# -------------------------------------------------------------------------------------


def paths_of(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The place of every value within ``value``."""
    here = [at] if at else []
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return here + [path for key, one in inner for path in paths_of(one, (*at, key))]


def alter_json(body: dict[str, Any], dice: random.Random) -> str:
    """Replace, remove, nest, double or add one value; returns what was done."""
    path = dice.choice(paths_of({k: v for k, v in body.items() if k != "schema_version"}))
    holder = body
    for key in path[:-1]:
        holder = holder[key]
    key = path[-1]
    kind = dice.choice(("replace", "replace", "replace", "remove", "nest", "add", "scale"))
    if kind == "remove":
        del holder[key]
    elif kind == "nest":
        holder[key] = {"deeper": [holder[key]]}
    elif kind == "add":
        body[f"extra-{dice.randrange(9)}"] = dice.choice(WEIRD)
    elif kind == "scale" and type(holder[key]) in (int, float):
        holder[key] = holder[key] * -(10**20)
    else:
        holder[key] = dice.choice(WEIRD)
    return f"{kind} {'.'.join(map(str, path))}"


def weird_values(kind: pa.DataType, n: int, dice: random.Random) -> pa.Array:
    """``n`` values of ``kind`` that no run writes."""
    if pa.types.is_floating(kind):
        return pa.array(
            [dice.choice((float("nan"), float("inf"), -1e30, 0.0)) for _ in range(n)], kind
        )
    if pa.types.is_integer(kind):
        width = kind.bit_width - int(pa.types.is_signed_integer(kind))
        return pa.array([dice.choice((0, 2**width - 1)) for _ in range(n)], kind)
    if pa.types.is_string(kind):
        return pa.array(
            [dice.choice(("", "x\x1b[31m", "../..", "'; DROP")) for _ in range(n)], kind
        )
    return pa.nulls(n, kind)


def alter_table(table: pa.Table, dice: random.Random) -> tuple[pa.Table, str]:
    """Change the schema, the values or the number of rows; returns what was done."""
    at = dice.randrange(table.num_columns)
    field = table.schema.field(at)
    kind = dice.choice(
        (
            "drop",
            "rename",
            "nulls",
            "type",
            "values",
            "fewer",
            "twice",
            "none",
            "reverse",
            "metadata",
        )
    )
    if kind == "drop":
        table = table.remove_column(at)
    elif kind == "rename":
        table = table.rename_columns(
            [f"{n}_x" if i == at else n for i, n in enumerate(table.column_names)]
        )
    elif kind == "nulls":
        table = table.set_column(
            at, pa.field(field.name, field.type), pa.nulls(len(table), field.type)
        )
    elif kind == "type":
        other = dice.choice(
            (pa.string(), pa.int8(), pa.float64(), pa.list_(pa.int32()), pa.bool_(), pa.date32())
        )
        table = table.set_column(at, pa.field(field.name, other), pa.nulls(len(table), other))
    elif kind == "values":
        table = table.set_column(
            at, pa.field(field.name, field.type), weird_values(field.type, len(table), dice)
        )
    elif kind == "fewer":
        table = table.slice(0, len(table) // 2)
    elif kind == "twice":
        table = pa.concat_tables([table, table])
    elif kind == "none":
        table = table.slice(0, 0)
    elif kind == "reverse":
        table = table.take(pa.array(range(len(table) - 1, -1, -1)))
    else:
        table = table.replace_schema_metadata({"afn": json.dumps(dice.choice(WEIRD))})
    return table, f"{kind} {field.name}"


def parquet_of(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def alter(store: Path, dice: random.Random) -> str:
    """Alter one file of ``store`` and seal again what names it; returns what was done."""
    run = dice.choice(sorted((store / "runs").iterdir()))
    shard = dice.choice(sorted(store.glob("shards/*/*")))
    what: list[str] = []
    kind = dice.choice(
        (
            "run.json",
            "run.json",
            "commit.json",
            "commit.json",
            "run table",
            "run table",
            "shard table",
        )
    )
    if kind.endswith(".json"):
        path = (run if kind == "run.json" else shard) / kind
        edit_checksummed(str(path), lambda body: what.append(alter_json(body, dice)))
    elif kind == "run table":
        path = dice.choice(sorted(run.glob("*.parquet")))
        table, done = alter_table(pq.read_table(path), dice)
        data = parquet_of(table)
        rewrite(str(path), data)
        edit_checksummed(
            str(run / "run.json"),
            lambda i: i["tables"].update({path.stem: listed(path.name, data)}),
        )
        what.append(done)
    else:
        path = dice.choice(sorted(shard.glob("*.parquet")))
        table, done = alter_table(pq.read_table(path), dice)
        name = path.stem.partition("-")[2]
        recommit(str(shard), name, parquet_of(table), **dice.choice(({}, {"rows": len(table)})))
        what.append(done)
    return f"{path.relative_to(store)}: {', '.join(what)}"


# --- what is asked
# ---------------------------------------------------------------------------------------


def ask_sql(store: str) -> None:
    with open_run(store, timeout_s=20, memory_limit="500MB") as run:
        for view in (
            "run",
            "vocabulary",
            "tokens",
            "words",
            "documents",
            "files",
            "sources",
            "token_neurons",
        ):
            with contextlib.suppress(AfnError):
                run.sql(f"SELECT count(*), bit_xor(hash(t)) FROM {view} t").fetchall()


def ask_show(store: str) -> None:
    run = manifest.find_run(store)
    list(run_facts.facts(summary.summarise(run)))
    overview.render(summary.summarise(run), Console(file=io.StringIO(), width=100))


def ask_status(store: str) -> None:
    found = status.read_status(store)
    list(status_text.table(found))
    for one in found:
        list(status_text.lines(one))
        json.dumps(status.to_json(one))


def ask_compare(store: str) -> None:
    runs = [manifest.find_run(f"{store}/runs/{name}") for name in manifest.run_names(store)]
    compare.compare(*runs)


def ask_report(store: str) -> None:
    report.render(manifest.find_run(store), with_claims=False)


ASKS: dict[str, Callable[[str], object]] = {
    "verify": lambda store: list(verify.lines(verify.verify_store(store, memory_limit="500MB"))),
    "sql": ask_sql,
    "show": ask_show,
    "status": ask_status,
    "gc": lambda store: list(
        gc_report.lines(garbage.collect_garbage(store, keep=1, min_age_h=0), [])
    ),
    "compare": ask_compare,
    "report": ask_report,
}
SLOW = ("sql", "report")
"""Questions that the short run asks of one store in eight."""


def test_what_was_altered_and_sealed_again_is_a_finding_a_refusal_or_an_answer(
    made: Path, tmp_path: Path, fuzz_length: str
) -> None:
    ends: Counter[str] = Counter()
    crashes = []
    for seed in range(NUM_STORES[fuzz_length]):
        dice = random.Random(seed)
        store = tmp_path / "store"
        shutil.copytree(made, store)
        what = alter(store, dice)
        asks = (
            ASKS
            if fuzz_length == "long" or seed % 8 == 0
            else {k: v for k, v in ASKS.items() if k not in SLOW}
        )
        for name, ask in asks.items():
            try:
                ask(str(store))
                ends[f"{name} answers"] += 1
            except AfnError as error:
                assert str(error), (seed, name, what)
                ends[f"{name} refuses"] += 1
            # All errors are printed, with the line that raised each.
            except Exception as error:  # noqa: BLE001
                where = traceback.extract_tb(error.__traceback__)[-1]
                at = f"{Path(where.filename).name}:{where.lineno}"
                crashes.append(f"seed {seed}: {what}: {name}: {error!r} at {at}")
        shutil.rmtree(store)
    assert not crashes, "\n".join(crashes)
    assert ends["verify answers"] > 0 and ends["show answers"] > 0
    assert not verify.verify_store(str(made)).findings


@pytest.mark.parametrize("header", ["x", 1.5, True, [], None], ids=repr)
def test_a_plan_whose_header_is_no_object_is_a_finding(
    made: Path, tmp_path: Path, header: Any
) -> None:
    """The long run found it: four stores of a thousand."""
    store = shutil.copytree(made, tmp_path / "store")
    run = max((store / "runs").iterdir())
    table = pq.read_table(run / "plan.parquet")
    data = parquet_of(table.replace_schema_metadata({"afn": json.dumps(header)}))
    rewrite(str(run / "plan.parquet"), data)
    edit_checksummed(
        str(run / "run.json"), lambda i: i["tables"].update(plan=listed("plan.parquet", data))
    )
    assert any(
        "plan.parquet" in finding.uri for finding in verify.verify_store(str(store)).findings
    )
    with pytest.raises(StoreError, match=r"plan\.parquet is damaged"):
        garbage.collect_garbage(str(store), keep=1, min_age_h=0)


def test_a_measure_whose_model_is_no_object_is_refused_by_name(made: Path, tmp_path: Path) -> None:
    store = shutil.copytree(made, tmp_path / "store")
    run = max((store / "runs").iterdir())
    edit_checksummed(str(run / "run.json"), lambda body: body["measure"].update(model="x"))
    with pytest.raises(StoreError, match=r"run\.json is damaged: measure"):
        manifest.find_run(str(store))
