"""The Python API: every command calls a public function, and what these return can be read."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pytest

import afn_ray
from afn_ray.cli import commands
from afn_ray.errors import ConfigError
from conftest import config_of, write_jsonl

GUIDE = Path(__file__).parents[1] / "infra" / "guide" / "python.md"
STORE = str(Path(__file__).parent / "data" / "store")
HOSTILE = "the <script>alert(1)</script> lord \u202egnp.exe"


def rows_of_guide() -> dict[str, list[str]]:
    """The public functions that the guide names for each command."""
    found = {}
    for command, cell in re.findall(r"^\| `(afn [^`]*)` \| ([^|]*) \|", GUIDE.read_text(), re.M):
        names = re.findall(r"\b([a-z_]+)\(", cell)
        found[command] = [name for name in names if name in afn_ray.__all__]
    return found


ROWS = rows_of_guide()
CALLS = [(command, name) for command, names in ROWS.items() for name in names]


def test_the_guide_has_every_command_and_every_function() -> None:
    named = {command.split()[1] for command in ROWS}
    assert named == set(commands.COMMANDS)
    assert [command for command, names in ROWS.items() if not names] == ["afn bench"]
    text = GUIDE.read_text()
    elsewhere = {"Finding", "IcebergTable", "Night", "Policy"}  # on the pages of their commands
    for name in afn_ray._LAZY.keys() - elsewhere:
        assert re.search(rf"\b{name}\b", text), name


@pytest.fixture
def argv(tmp_path: Path, minilm: Path) -> dict[str, list[str]]:
    """Arguments of each command of the guide."""
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": "In the beginning"}])
    run = ["run", str(corpus), "--model", str(minilm), "--store", str(tmp_path / "new")]
    config = tmp_path / "run.toml"
    config.write_text(f'corpus = "{corpus}"\nmodel = "{minilm}"\nstore = "{tmp_path}/new"\n')
    policy = tmp_path / "policy.toml"
    policy.write_text("psi = 0.1\n")
    return {
        "afn run": run,
        "afn run --dry-run": [*run, "--dry-run"],
        "afn status": ["status", STORE],
        "afn show": ["show", STORE],
        "afn show --card": ["show", STORE, "--card"],
        "afn compare": ["compare", STORE, STORE],
        "afn compare --layers": ["compare", STORE, STORE, "--layers", "0:2"],
        "afn claims": ["claims", STORE],
        "afn neurons": ["neurons", STORE],
        "afn neurons --word": ["neurons", STORE, "--word", "lord"],
        "afn neurons --neuron": ["neurons", STORE, "--neuron", "7"],
        "afn audit": ["audit", str(config), "--policy", str(policy)],
        "afn audit --accept": ["audit", "--accept", STORE, "--why", "it is meant"],
        "afn history": ["history", STORE],
        "afn schema": ["schema", "run"],
        "afn sql": ["sql", STORE, "FROM run"],
        "afn sql --open": ["sql", STORE, "--open", str(tmp_path / "catalog.duckdb")],
        "afn export": ["export", STORE, str(tmp_path / "out")],
        "afn explain": ["explain", STORE, "In the beginning"],
        "afn report": ["report", STORE, "--out", str(tmp_path / "page.html")],
        "afn verify": ["verify", STORE],
        "afn gc": ["gc", STORE],
        "afn doctor": ["doctor"],
        "afn demo": ["demo", "--store", str(tmp_path / "demo")],
    }


@pytest.mark.parametrize(("command", "name"), CALLS)
def test_a_command_calls_the_public_function(
    command: str,
    name: str,
    argv: dict[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def called(*args: object, **options: object) -> NoReturn:
        raise ConfigError(f"{name} was called")

    for public in afn_ray.__all__:  # else a module that is imported now keeps what stands in
        getattr(afn_ray, public)
    module, _, attribute = afn_ray._LAZY[name].partition(":")
    monkeypatch.setattr(import_module(f"afn_ray.{module}"), attribute or name, called)
    with pytest.raises(SystemExit) as end:
        commands.main(argv[command])
    assert end.value.code == 2 and f"{name} was called" in capsys.readouterr().err


def test_the_package_loads_only_what_is_used() -> None:
    """A function that measures needs torch; one that reads a run does not."""
    measuring = {"dry_run", "explain", "run", "run_audit", "verify_store"}
    measuring |= {"Audit", "Estimate", "Verification"}  # in the modules of these functions
    light = sorted(set(afn_ray._LAZY) - measuring)
    heavy = "{'torch', 'ray', 'transformers'}"
    code = (
        f"import sys, afn_ray\nassert not ({heavy} | {{'duckdb'}}) & set(sys.modules)\n"
        f"for name in {light!r}:\n    getattr(afn_ray, name)\n"
        f"    assert not {heavy} & set(sys.modules), name\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, verses: list[str]) -> str:
    """A store with one run of neurons over verses, and a text that would be a script in a page."""
    folder = tmp_path_factory.mktemp("api")
    texts = [*verses[:80], *[HOSTILE] * 30]
    corpus = write_jsonl(folder / "c.jsonl", [{"text": text} for text in texts])
    config = config_of(tiny_bert, corpus, folder / "store", layers="0,2", signals="neurons,shift")
    with afn_ray.run(config) as run:
        return run.uri


def results(uri: str, target: Path) -> dict[str, Any]:
    """A result of each function that reads a run, by its class."""
    store = uri.partition("/runs/")[0]
    question = afn_ray.Question(signals="shift")
    with afn_ray.open_run(uri) as run:
        neurons = afn_ray.neurons(run)
        found = [
            afn_ray.status(store),
            afn_ray.summarise(run),
            afn_ray.model_card(run),
            afn_ray.rankings(run),
            afn_ray.claims(run),
            neurons,
            afn_ray.word_neurons(run, "lord"),
            afn_ray.neuron_uses(run, neurons.neurons[0].neuron),
            afn_ray.history(store),
            afn_ray.explain(run, f"In the beginning {HOSTILE} zeppelin", question),
            afn_ray.export(run, str(target), "documents"),
            afn_ray.compare_runs(uri, uri),
            afn_ray.compare_layers(uri, uri, "0:2"),
            afn_ray.verify_store(store),
            afn_ray.collect_garbage(store),
        ]
    return {type(one).__name__: one for one in found}


@pytest.fixture(scope="module")
def found(store: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return results(store, tmp_path_factory.mktemp("exported"))


def test_results_are_frozen_and_their_tables_have_rows(found: dict[str, Any]) -> None:
    documented = set(re.findall(r"`(\w+)`", GUIDE.read_text().partition("has a row for each")[2]))
    for name, result in found.items():
        assert is_dataclass(result) and name in documented, name
        with pytest.raises(AttributeError):
            setattr(result, fields(result)[0].name, None)
        line = repr(result)
        assert line.startswith(f"<{name}: ") and " in ." in line and len(line) < 400, line
        if hasattr(result, "table"):
            assert isinstance(result.table, pa.Table), name
            assert result.table.num_rows or name in ("Verification", "Garbage"), name


def test_no_result_runs_a_script_in_a_notebook(found: dict[str, Any], store: str) -> None:
    with afn_ray.open_run(store) as run:
        shown = {name: result._repr_html_() for name, result in found.items()}
        shown["Run"] = run._repr_html_()
        last = "SELECT document_text(doc) AS text FROM documents ORDER BY doc DESC"
        shown["Result"] = run.sql(last)._repr_html_()
        shown["kwic"] = run.sql("FROM kwic('script', 4)")._repr_html_()
    for name, page in shown.items():
        assert "<table>" in page and "<script" not in page and "\u202e" not in page, name
    assert all("&lt;" in shown[name] for name in ("Result", "kwic", "Explanation"))


def test_a_relation_in_a_notebook_computes_its_first_rows_once(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with afn_ray.open_run(store) as run:
        words = run.sql("FROM words ORDER BY doc, word")
        asked: list[str] = []
        ask = afn_ray.Result._ask

        def counted(self: afn_ray.Result, allowance: Any, do: str, argument: Any) -> Any:
            asked.append(do)
            return ask(self, allowance, do, argument)

        monkeypatch.setattr(afn_ray.Result, "_ask", counted)
        bundle = words._repr_mimebundle_()
        assert asked == ["read"]
        assert bundle["text/html"].count("<tr>") == 21
        assert "the first 20 rows; there are more" in bundle["text/html"]
        assert bundle["text/plain"].startswith("<Result: doc, word, text")
        assert words._repr_mimebundle_(include={"text/plain"}) == {"text/plain": repr(words)}
        few = run.sql("FROM words LIMIT 3")._repr_html_()
        assert few.count("<tr>") == 4 and "more" not in few


def test_tables_have_what_the_objects_have(found: dict[str, Any], store: str) -> None:
    explained = found["Explanation"]
    rows = explained.table.to_pylist()
    assert len(rows) == len(explained.tokens) * len(explained.layers)
    for row in rows:
        token = explained.tokens[row["at"]]
        (reading,) = (r for r in token.readings if r.layer == row["layer"])
        assert (row["strength"], row["quartile"]) == (reading.strength, reading.quartile)
        assert row["n"] == (None if reading.usual is None else reading.usual.n)
        signals = {value.signal: value.value for value in reading.signals}
        assert row["shift"] == signals.get("shift") and ("shift" in signals) == (row["layer"] > 0)
    claims = found["Claims"]
    assert [f.value for f in claims.figures] == claims.table["value"].to_pylist()
    status = found["Statuses"]
    assert status[0].tokens == status.table["tokens"][0].as_py() and status[0].state == "complete"
    with afn_ray.open_run(store) as run:
        q3 = run.sql("FROM thresholds SELECT q3 WHERE population = 'tokens' ORDER BY layer")
        assert found["RunSummary"].table["q3"].to_pylist() == [x for (x,) in q3.fetchall()]
        assert status[0].tokens == run.info["counts"]["tokens"]


def test_an_open_run_and_its_uri_give_the_same_answer(store: str, found: dict[str, Any]) -> None:
    assert afn_ray.neurons(store, top=15) == found["SelectiveNeurons"]
    assert afn_ray.summarise(store).table.equals(found["RunSummary"].table)
    with pytest.raises(ConfigError, match="neurons of layer 7 were not recorded"):
        afn_ray.neurons(store, layer=7)
    with pytest.raises(ConfigError, match="there is no schema of 'runs'"):
        afn_ray.json_schema("runs")
