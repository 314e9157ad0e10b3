"""The command as a user types it, right and wrong: what it prints and the code it leaves with."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from afn_ray.cli import commands, progress, terminal
from afn_ray.config import BUILT_IN_SIGNALS, RunConfig
from afn_ray.runs import precheck
from afn_ray.runs.progress import Counters, Progress
from afn_ray.store import parquet, storage
from conftest import afn, command_parsers, write_jsonl


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, verses: list[str]) -> Path:
    """A store with one complete run of 100 verses, made by flags and a TOML file together."""
    folder = tmp_path_factory.mktemp("cli")
    write_jsonl(
        folder / "verses.jsonl", [{"id": f"v{i}", "text": t} for i, t in enumerate(verses[:100])]
    )
    (folder / "run.toml").write_text(
        f'corpus = "{folder}/verses.jsonl"\nmodel = "{tiny_bert}"\nlayers = "all"\n'
    )
    done = afn(
        "run",
        "--config",
        folder / "run.toml",
        "--store",
        folder / "store",
        "--layers",
        "0,2",
        "--executor",
        "inline",
        "--id-column",
        "id",
    )
    assert done.returncode == 0, done.stderr
    assert " of 1 file" in done.stderr and "is complete" in done.stderr
    assert done.stdout.startswith("\nNext: afn show ")
    return folder / "store"


Typed = Callable[..., tuple[int, str, str]]


@pytest.fixture
def typed(capsys: pytest.CaptureFixture[str]) -> Typed:
    """Runs ``afn`` in this process, which has loaded torch: exit code, and what is on each
    stream.
    """

    def run(*args: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            commands.main([*map(str, args)])
        out, err = capsys.readouterr()
        assert isinstance(end.value.code, int)
        return end.value.code, out, err

    return run


def test_show_prints_the_honest_summary_and_json(store: Path, typed: Typed) -> None:
    code, text, _ = typed("show", store)
    assert code == 0
    for expected in ("100 measured", "Thresholds", "layer 2", "(control)", "rarity alone", "CV"):
        assert expected in text
    summary = json.loads(typed("show", store, "--json")[1])
    assert [facts["layer"] for facts in summary["layers"]] == [0, 2]


def test_compare_prints_what_moved_and_writes_json(store: Path, tmp_path: Path) -> None:
    done = afn("compare", store, store, "--json", tmp_path / "drift.json")
    assert done.returncode == 0, done.stderr
    for expected in (
        "Strengths of all tokens",
        "Classes at layer 2",
        "0 words are new",
        "A and B are one run.",
    ):
        assert expected in done.stdout
    body = json.loads((tmp_path / "drift.json").read_text())
    assert body["schema_version"] == 2 and [row["psi"] for row in body["drift"]] == [0.0, 0.0]
    ranks = afn("compare", store, store, "--ranks-only").stdout
    assert "Ranks only" in ranks and "0.0000" not in ranks


@pytest.mark.parametrize("format", ["csv", "json", "parquet"])
def test_sql_answers_in_every_format(store: Path, format: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    query = "SELECT doc_id, n_tokens FROM documents ORDER BY doc LIMIT 2"
    assert afn("sql", store, query, "--format", format, "--out", out).returncode == 0
    if format == "csv":
        assert list(csv.reader(out.read_text().splitlines()))[:2] == [
            ["doc_id", "n_tokens"],
            ["v0", "13"],
        ]
    elif format == "json":
        assert json.loads(out.read_text())[0] == {"doc_id": "v0", "n_tokens": 13}
    else:
        assert pq.read_table(out).column_names == ["doc_id", "n_tokens"]


def test_sql_from_standard_input_runs_every_statement_and_fails_with_the_first_wrong_one(
    store: Path,
) -> None:
    done = afn("sql", store, stdin="SELECT 1 AS one;\nSELECT count(*) AS n FROM documents;")
    assert done.returncode == 0 and "one" in done.stdout and "100" in done.stdout
    done = afn("sql", store, stdin="SELECT nothing FROM documents;")
    assert done.returncode == 2 and "nothing" in done.stderr and "Traceback" not in done.stderr


def test_a_result_of_sql_goes_to_a_bucket_whole_or_not_at_all(
    store: Path, tmp_path: Path, object_store: str, typed: Typed
) -> None:
    query = "SELECT doc_id, n_tokens FROM documents ORDER BY doc"
    there, here = f"{object_store}/some/where.parquet", tmp_path / "here.parquet"
    for out in (there, here):
        code, _, err = typed("sql", store, query, "--out", out)
        assert code == 0, err
    assert storage.read_bytes(there) == here.read_bytes()
    assert typed("sql", store, "SELECT 1 AS one", "--out", there)[0] == 0  # it is replaced
    assert parquet.read(storage.read_bytes(there)).to_pydict() == {"one": [1]}
    failing = "SELECT error('no') FROM documents"
    for out in (f"{object_store}/failed.csv", f"file://{tmp_path}/failed.csv"):
        code, _, err = typed("sql", store, failing, "--out", out)
        assert code == 2 and "no" in err and not storage.exists(out)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("s3://key:secret@bucket/x.csv", "holds credentials"),
        ("nosuch://bucket/x.csv", "nosuch"),
        ("s3://bucket/x", "the ending says no format"),
        ("", "--out is empty; name a file"),
    ],
)
def test_a_place_for_a_result_is_refused_before_the_query(
    out: str, message: str, typed: Typed
) -> None:
    code, _, err = typed("sql", "nowhere", "SELECT 1", "--out", out)
    assert code == 2 and message in err and "secret" not in err and "neither" not in err


def test_explain_prints_text_json_and_a_page(
    store: Path, tmp_path: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "beginning" in typed("explain", store, "In the beginning")[1]
    flags = ("--signals", "shift", "--layers", "all")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"In the beginning\n")))
    found = json.loads(typed("explain", store, "-", "--json", *flags)[1])
    assert [t["piece"] for t in found["tokens"]] == ["[CLS]", "in", "the", "beginning", "[SEP]"]
    assert found["sweep"] == [0, 1, 2, 3] and len(found["tokens"][1]["cells"]) == 4
    assert [v["signal"] for v in found["tokens"][1]["readings"][1]["signals"]] == ["shift"]
    code, *_ = typed("explain", store, "In the beginning", "--html", tmp_path / "page.html")
    assert code == 0 and "<html" in (tmp_path / "page.html").read_text()


def test_a_dry_run_prints_the_plan(store: Path, tiny_bert: Path, typed: Typed) -> None:
    corpus = store.parent / "verses.jsonl"
    code, out, err = typed(
        "run",
        corpus,
        "--model",
        tiny_bert,
        "--store",
        store / "new",
        "--executor",
        "inline",
        "--dry-run",
    )
    assert code == 0, err
    for expected in (
        "100 documents",
        "1, of them 0 in the store and 1 to do",
        "tokens/s",
        "nothing was done",
    ):
        assert expected in out
    assert not (store / "new").exists()


def test_a_run_says_that_there_is_nothing_to_do(store: Path, typed: Typed) -> None:
    code, _, err = typed(
        "run",
        "--config",
        store.parent / "run.toml",
        "--store",
        store,
        "--layers",
        "0,2",
        "--id-column",
        "id",
    )  # with Ray as its executor, which it then need not start
    assert code == 0 and "nothing to do" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["run"], "missing: corpus, model, store"),
        (["run", "x", "--modle", "y"], "unrecognized arguments: --modle y (did you mean --model?)"),
        (["audit", "x", "--group-by", "y"], "--group-by y (group_by is a key of RUN_TOML)"),
        (
            ["run", "x", "--model", "y", "--store", "z", "--workers", "0"],
            "workers is 0; expected at least 1",
        ),
        (
            ["run", "x", "--model", "y", "--store", "z", "--workers", "two"],
            "invalid int value: 'two'",
        ),
        (
            ["run", "x", "--model", "y", "--store", "z", "--dtype", "float8"],
            "invalid choice: 'float8'",
        ),
        (["run", "--config", "nowhere.toml"], "config file nowhere.toml cannot be read"),
        (["run", "--config", "broken.toml"], "is not TOML"),
        (
            ["run", "--config", "typo.toml"],
            "unknown key in typo.toml: modle (did you mean model?); known keys: corpus",
        ),
        (["run", "c.jsonl", "--model", "no/such", "--store", "s"], "no model 'no/such'"),
        (["verify", "nowhere"], "nowhere is neither a store nor a run"),
        (["verify", "{store}", "--min-age-h", "-1"], "min_age_h is -1.0; expected 0 or more hours"),
        (
            ["verify", "{store}", "--memory-limit", "lots"],
            "--memory-limit: 'lots' is not a size; expected a size such as 2GB",
        ),
        (
            ["sql", "{store}", "SELECT 1", "--max-rows", "1_000"],
            "--max-rows: '1_000' is not a whole number",
        ),
        (["show", "nowhere"], "nowhere is neither a store nor a run"),
        (["compare", "{store}", "nowhere"], "nowhere is neither a store nor a run"),
        (["compare", "{store}", "{store}", "--json", "no/such/folder/x"], "cannot be written"),
        (["sql", "nowhere", "SELECT 1"], "is neither a store nor a run"),
        (["sql", "{store}", "SELEC 1"], "syntax error"),
        (["sql", "{store}", "SELECT * FROM read_text('/etc/passwd')"], "afn:"),
        (["sql", "{store}", "COPY tokens TO 'x.csv'"], "afn:"),
        (
            ["sql", "{store}", "SELECT 1", "--out", "no/such/folder/x"],
            "the ending says no format; end it in .csv",
        ),
        (["sql", "{store}", "SELECT 1", "--out", "no/such/folder/x.csv"], "cannot be written"),
        (["explain", "{store}", ""], "afn:"),
        ([], "afn [-h] [--version] COMMAND"),
    ],
)
def test_what_is_typed_wrong_leaves_with_2_and_a_line_that_helps(
    args: list[str],
    message: str,
    tmp_path: Path,
    store: Path,
    tiny_bert: Path,
    typed: Typed,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_jsonl(tmp_path / "c.jsonl", [{"text": "hello"}])
    (tmp_path / "c.exe").write_text("x")
    (tmp_path / "broken.toml").write_text("= 1")
    (tmp_path / "typo.toml").write_text('modle = "x"')
    if "run" in args[:1] and "{model}" in args:
        args = [*args, "--executor", "inline"]
    monkeypatch.chdir(tmp_path)
    code, out, err = typed(
        *(a.format(model=tiny_bert, store=store) if "{" in a else a for a in args)
    )
    assert code == 2, (out, err)
    assert message in out + err
    assert "Traceback" not in err
    assert not (tmp_path / "x.csv").exists()


# what is asked, what the refusal says; each in a second, without torch, transformers or Ray
WRONG = [
    (
        "run c.jsonl --model {model} --store s --signals shfit",
        "no signal 'shfit' (did you mean shift?)",
    ),
    (
        "run c.jsonl --model {model} --store s --layers 9",
        "layer 9 does not exist; the model has layers 0 (embeddings)",
    ),
    ("run c.jsonl --model {model} --store s --layers eight", "layers is 'eight'; expected numbers"),
    ("run c.jsonl --model {model} --store s --text-column txet", "no column 'txet' in"),
    ("run c.jsonl --model {model} --store s --text-column txet", "did you mean text?"),
    ("run c.jsonl --model {model} --store s --id-column nr", "no column 'nr' in"),
    (
        "run c.jsonl --model {model} --store s --language english",
        "language is 'english'; expected auto, or a code of ISO 639, such as en, pt-BR or yue",
    ),
    (
        "run c.jsonl --model {model} --store s --device cuda",
        "device is cuda, but there is no driver of a GPU here",
    ),
    ("run c.jsonl --model {model} --store s --device cdua", "invalid choice: 'cdua'"),
    (
        "run c.jsonl --model {model} --store s --address http://head:8265",
        "ray job submit --address http://head:8265",
    ),
    ("run c.jsonl --model {model} --store s --address head", "it has no port"),
    (
        "run c.jsonl --model {model} --store s --thresholds nowhere",
        "nowhere is neither a store nor a run",
    ),
    (
        "run c.jsonl --model {model} --store s --revision main",
        "is on this disk, and revision 'main' is for hub models",
    ),
    ("run c.jsonl --model {model} --store c.jsonl", "c.jsonl"),
    ("run c.jsonl --model {model} --store c.jsonl/s", "c.jsonl/s"),
    ("run c.jsonl --model {model} --store /proc/s", "/proc/s"),
    ("run no.jsonl --model {model} --store s", "no.jsonl: no such file or folder"),
    ("run no*.jsonl --model {model} --store s", "no*.jsonl: no files match"),
    ("run c.exe --model {model} --store s", "no file has a known ending"),
    ("run c.jsonl --model ./none --store s", "no model at ./none"),
    (
        "run c.jsonl --model c.jsonl --store s",
        "no model at c.jsonl: expected a folder with config.json",
    ),
    ("run c.jsonl --model empty --store s", "empty has no config.json"),
    ("run c.jsonl --model outer --store s", "its folder 0_Transformer has one"),
    ("run c.jsonl --model bare --store s", "bare has no .safetensors file"),
    ("run c.jsonl --model broken --store s", "its config.json is not JSON"),
    ("run c.jsonl --model {long} --store s", "File name too long"),
    ("run c.jsonl --model {model} --store {long}", "File name too long"),
    ("run {long} --model {model} --store s", "File name too long"),
    ("run c.jsonl --model {model} --store s --dry-run --layers 9", "layer 9 does not exist"),
    ("audit run.toml --policy none.toml", "policy none.toml cannot be read"),
    ("audit run.toml --policy p.toml", "no.jsonl: no such file or folder"),
    ("audit run.toml --policy p.toml --partition latest", "the policy's window is all"),
    ("audit run.toml --policy p.toml --series a:b", "series is 'a:b'; expected 1 to 100"),
    ("explain {store} hello --layer 7", "layer 7 was not recorded; the run has"),
    ("explain {store} hello --layers 7", "layer 7 does not exist; the model has layers 0"),
    ("explain {store} hello --signals shfit", "did you mean shift?"),
    ("explain {store} hello --model ./none", "no model at ./none"),
    ("explain nowhere hello", "nowhere is neither a store nor a run"),
    ("claims {store} --masking --model ./none", "no model at ./none"),
    ("claims nowhere", "nowhere is neither a store nor a run"),
    ("bench rate run.toml", "no.jsonl: no such file or folder"),
    ("bench rrate run.toml", "(did you mean rate?)"),
    ("shwo {store}", "invalid choice: 'shwo'"),
    ("shwo {store}", "(did you mean show?)"),
    ("sql {store} --fromat csv", "(did you mean --format?)"),
    ("sql {store} --format jsno", "(did you mean json?)"),
    ("run {pipes}/p.jsonl --model {model} --store {store}", "p.jsonl: it is a pipe"),
    ("run {pipes}/*.jsonl --model {model} --store {store}", "*.jsonl: no files match"),
    ("run {pipes}/x.zip::* --model {model} --store {store}", "x.zip: it is a pipe"),
    ("run {pipes}/table --model {model} --store {store}", "table: no files match"),
    ("run /dev/zero --model {model} --store {store}", "zero: it is a pipe, a device"),
    ("run c.jsonl --model {pipes}/model --store {store}", "config.json: it is a pipe"),
    ("run c.jsonl --model {pipes}/m.gguf --store {store}", "m.gguf: it is a pipe"),
    ("run --config {pipes}/p.toml", "p.toml cannot be read: it is a pipe"),
    ("audit run.toml --policy {pipes}/p.toml", "p.toml cannot be read: it is a pipe"),
]
TRY_ALL = """
import contextlib, io, json, sys, time
from afn_ray.cli import commands
found = []
for argv in json.load(sys.stdin):
    said, began = io.StringIO(), time.process_time()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            commands.main(argv)
        except SystemExit as end:
            code = end.code
    heavy = [m for m in ("torch", "transformers", "ray") if m in sys.modules]
    found.append([code, said.getvalue(), heavy, time.process_time() - began])
print(json.dumps(found))
"""


def test_wrong_input_is_refused_before_anything_heavy_is_loaded(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, store: Path, tiny_bert: Path
) -> None:
    write_jsonl(tmp_path / "c.jsonl", [{"text": "hello"}])
    (tmp_path / "c.exe").write_text("x")
    (tmp_path / "outer" / "0_Transformer").mkdir(parents=True)
    (tmp_path / "outer" / "0_Transformer" / "config.json").write_text("{}")
    for folder, config in (("empty", None), ("bare", "{}"), ("broken", "{")):
        (tmp_path / folder).mkdir()
        if config is not None:
            (tmp_path / folder / "config.json").write_text(config)
    (tmp_path / "broken" / "model.safetensors").touch()
    (tmp_path / "run.toml").write_text(f'corpus = "no.jsonl"\nmodel = "{tiny_bert}"\nstore = "s"\n')
    (tmp_path / "p.toml").write_text("psi = 1")
    pipes = tmp_path_factory.mktemp("pipes")
    for name in ("p.jsonl", "x.zip", "table/metadata/version-hint.text", "model/config.json",
                 "m.gguf", "p.toml"):  # fmt: skip
        (pipes / name).parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(pipes / name)
    named = {"model": tiny_bert, "store": store, "long": "x" * 300, "pipes": pipes}
    asked = [[word.format(**named) for word in line.split()] for line, _ in WRONG]
    done = subprocess.run(
        [sys.executable, "-c", TRY_ALL],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=400,
    )
    found = json.loads(done.stdout or "[]")
    assert len(found) == len(WRONG), done.stderr
    for (line, says), (code, said, heavy, cpu_s) in zip(WRONG, found, strict=True):
        assert says in said and code == 2, (line, code, said)
        assert heavy == [], (line, heavy)
        assert len(said.strip().splitlines()) == 1 and "Traceback" not in said, (line, said)
        assert cpu_s < 2, (line, cpu_s)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "bare",
        "broken",
        "c.exe",
        "c.jsonl",
        "empty",
        "outer",
        "p.toml",
        "run.toml",
    ]


def test_a_reduce_alone_asks_for_no_gpu(tmp_path: Path, tiny_bert: Path) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": "hello"}])
    config = RunConfig(
        corpus=(str(corpus),),
        model=str(tiny_bert),
        store=str(tmp_path / "s"),
        device="cuda",
        executor="inline",
    )
    precheck.check_run(config, reduce_only=True)
    assert [p.name for p in tmp_path.iterdir()] == ["c.jsonl"]


def test_signals_are_those_that_are_known_before_torch_is_loaded() -> None:
    from afn_ray.model import signals

    assert tuple(signals.BUILT_IN) == BUILT_IN_SIGNALS


def test_control_characters_of_names_do_not_reach_the_terminal() -> None:
    done = afn("show", "\x1b[31mred")
    assert done.returncode == 2 and "\x1b" not in done.stderr and "x1b[31mred" in done.stderr


def test_a_reader_that_leaves_early_is_no_error(store: Path) -> None:
    command = (
        f"{sys.executable} -m afn_ray sql {store} 'FROM tokens' --format csv | head -1; echo "
        f"${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0" and done.stderr == ""


STREAMS = [  # what is done to the streams, exit code, what is on stderr
    ("show {store} <&- >&- 2>&-", 0, ""),
    ("show {store} >/dev/full", 75, "No space left on device"),
    ("show nowhere 2>/dev/full", 2, ""),
    ("show nowhere 2>&-", 2, ""),
    ("verify nowhere 2>&1 | true; (exit ${{PIPESTATUS[0]}})", 2, ""),
    ("sql {store} 'SELECT chr(233) || chr(8364) AS x' --format csv", 0, ""),
    ("sql {store} 'SELECT chr(233) || chr(8364) AS x'", 0, ""),
    ("show caf\u00e9", 2, "neither a store nor a run"),
    ("explain {store} - <<< $'caf\\xe9'", 2, "standard input is not UTF-8: "),
]


def test_streams_that_are_closed_full_or_not_utf8_end_in_no_traceback(
    store: Path, tmp_path: Path
) -> None:
    """All at once, in a locale whose encoding has no letters beyond ASCII."""
    lines = [
        f"( {{ {sys.executable} -m afn_ray {how.format(store=store)}; }} >{at}.out 2>{at}.err; "
        f"echo $? >{at}.code ) &"
        for at, (how, _, _) in enumerate(STREAMS)
    ]
    (tmp_path / "all.sh").write_text("\n".join([*lines, "wait"]), "utf-8")
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    subprocess.run(["bash", "all.sh"], cwd=tmp_path, env=env, check=True)
    for at, (how, code, said) in enumerate(STREAMS):
        errors = (tmp_path / f"{at}.err").read_text("utf-8")
        assert "Traceback" not in errors and "Exception ignored" not in errors, (how, errors)
        assert (tmp_path / f"{at}.code").read_text().strip() == str(code), (how, errors)
        assert said in errors, (how, errors)
    assert "\u00e9\u20ac" in (tmp_path / "5.out").read_text(
        "utf-8"
    )  # data is UTF-8 whatever people read
    assert "\\xe9\\u20ac" in (tmp_path / "6.out").read_text("ascii")


def test_a_log_that_nobody_reads_any_more_stops_no_work() -> None:
    reader, writer = os.pipe()
    with open(writer, "w", encoding="ascii") as log:  # noqa: PTH123
        steady = terminal._Steady(log)
        print("heard", file=steady, flush=True)
        assert os.read(reader, 99) == b"heard\n"
        os.close(reader)
        print("not heard", file=steady, flush=True)
        print("x" * 100_000, file=steady, flush=True)
        assert steady.encoding == "ascii"


def test_a_wrong_flag_ends_a_process_with_2_and_a_line() -> None:
    done = afn("show", "store", "--nonsense")
    assert done.returncode == 2 and done.stdout == ""
    assert "--nonsense" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("ready", "committed", "waits"), [(0, 0, True), (0, 1, False), (1, 0, False)]
)
def test_the_bar_waits_for_workers_also_after_a_shard_was_given_up(
    ready: int, committed: int, waits: bool
) -> None:
    snapshot = Progress(
        4, 2, ready, num_committed=committed, failures=(("0" * 32, "killed its worker"),)
    )
    text = progress._note(snapshot)
    assert text.startswith("waiting for workers: 0 of 2") == waits
    assert waits or "1 FAILED" in text


def test_the_parser_has_no_option_without_help() -> None:
    assert all(a.help for parser in command_parsers().values() for a in parser._actions)


def test_a_flag_that_takes_a_count_calls_it_n() -> None:
    (run,) = (parser for name, parser in command_parsers().items() if name == "run")
    counts = {a.metavar for a in run._actions if a.type is int}
    assert counts == {"N", "TOKENS", "BYTES"}
    of_flag = {flag: a.metavar for a in run._actions for flag in a.option_strings}
    assert of_flag["--near-duplicates"] == of_flag["--sample"] == "SHARE"


@pytest.mark.parametrize(
    ("seconds", "says"),
    [
        (Counters(model_s=9.0, wait_s=1.0, tokenize_s=5.0), ""),
        (Counters(model_s=1.0, wait_s=3.0, tokenize_s=5.0), ""),  # too early to tell
        (
            Counters(model_s=6.0, wait_s=4.0, tokenize_s=5.0, read_s=1.0),
            "40% of the time waiting for the tokenizer: try more --tokenizer-workers",
        ),
        (
            Counters(model_s=6.0, wait_s=4.0, tokenize_s=1.0, read_s=5.0),
            "40% of the time waiting for the corpus",
        ),
    ],
)
def test_the_progress_line_says_what_the_models_wait_for(seconds: Counters, says: str) -> None:
    work = replace(seconds, documents=1, tokens=100, forward_tokens=110)
    assert work.bottleneck == says
    snapshot = Progress(4, 1, 1, work=work, seconds=10.0)
    assert (says or "10 tokens/s") in progress._note(snapshot)


@pytest.mark.parametrize(
    "argv",
    [["show"], ["show", "--json"], ["sql", "SELECT 1"], ["status"], ["verify"], ["gc"]],
    ids=" ".join,
)
def test_a_command_that_reads_a_store_loads_neither_torch_nor_ray(
    store: Path, argv: list[str]
) -> None:
    code = (
        "import os, sys, afn_ray\n"
        "from afn_ray.cli import commands\n"
        "try:\n"
        "    commands.main(sys.argv[1:])\n"
        "except SystemExit as end:\n"
        "    code = end.code or 0\n"
        "heavy = {'torch', 'transformers', 'ray'} & set(sys.modules)\n"
        "print(f'{heavy} are loaded', file=sys.stderr) if heavy else None\n"
        "sys.stderr.flush()\n"
        "os._exit(3 if heavy else code)\n"  # as afn itself ends
    )
    command, *rest = argv
    done = subprocess.run(
        [sys.executable, "-c", code, command, str(store), *rest], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_what_reads_a_run_loads_neither_torch_nor_ray() -> None:
    """They take seconds to load, and an analyst's machine may be small."""
    code = (
        "import sys\n"
        "import afn_ray\n"
        "from afn_ray.analysis import claims, concepts, verify\n"
        "from afn_ray.query import database\n"
        "from afn_ray.reduce import compare\n"
        "from afn_ray.runs import dispatch, plan, status\n"
        "from afn_ray.show import charts, overview, report, shell\n"
        "from afn_ray.store import garbage\n"
        "print([m for m in ('torch', 'transformers', 'ray') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["gc", "x", "--jsn"], "did you mean --json?"),
        (["gc", "x", "--store"], ""),  # the help mentions the flag, and gc does not have it
        (["claims", "x", "--signals"], ""),
        (["audit", "x", "--policy", "y", "--config"], ""),
        (["demo", "--demo"], ""),
    ],
)
def test_only_flags_of_the_command_are_suggested(
    words: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        commands.main(words)
    said = capsys.readouterr().err
    suggested = re.findall(r"did you mean (-[\w-]*)", said)
    assert hint in said
    assert words[-1] not in suggested


def test_an_installed_script_finds_its_entry_point() -> None:
    from afn_ray.cli import command, main

    assert (command, main) == (commands.command, commands.main)
