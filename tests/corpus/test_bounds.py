"""Corpora, models and stores from strangers take bounded memory and time, and run no code."""

from __future__ import annotations

import ast
import bz2
import gzip
import json
import lzma
import os
import pickle
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import afn_ray
from afn_ray import model
from afn_ray.cli import commands as cli
from afn_ray.cli import grammar
from afn_ray.config import RunConfig
from afn_ray.corpus import conllu, documents, footer, reading, streams
from afn_ray.corpus import listing as corpus
from afn_ray.corpus_values import ReadOptions
from afn_ray.errors import ModelError, StoreError
from afn_ray.model.files import DESCRIPTION_BYTES
from afn_ray.model.load import load_blocks, load_weights
from afn_ray.store import checksums, corpus_files, manifest, shard_files
from bench import commands as bench_commands
from conftest import MakeConfig, fenced, find_model, flags_of, write_jsonl

PIECE = 64 << 20
OPTIONS = ReadOptions("auto", "text", "id", "line", 8 << 20, None)
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gz": lambda data: gzip.compress(data, 1),
    "bz2": lambda data: bz2.compress(data, 1),
    "xz": lambda data: lzma.compress(data, preset=0),
    "zst": lambda data: bytes(pa.Codec("zstd").compress(data, asbytes=True)),
}

READ = """
import dataclasses, json, re, sys, time
from pathlib import Path
from afn_ray.corpus import listing, reading, row_groups, sources, streams
from afn_ray.store import corpus_files
from afn_ray.corpus_values import ReadOptions
for uri in sys.argv[1:]:
    id_column = "id" if uri.endswith("id.jsonl") else None
    options = ReadOptions("auto", "text", id_column, "line", 8 << 20, None)
    slice = listing._whole(corpus_files.stat(uri), options)
    problems = {}
    try:
        with sources.Source(uri, 0, slice.size) as source:
            if slice.format == "parquet":
                documents = row_groups.parquet_documents(source, slice, options)
            else:
                stream = streams.Stream(source, slice.compression)
                documents = reading._documents(stream, slice, options)
            for document in documents:
                problem = document.problem or "ok"
                problems[problem] = problems.get(problem, 0) + 1
    except sources.DamagedStream as damage:
        problems[str(damage)] = 1
    peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) >> 10
    print(json.dumps([Path(uri).name, problems, peak, round(time.process_time(), 1)]))
"""


def test_what_is_made_to_fill_memory_is_quarantined_and_memory_stays_flat(tmp_path: Path) -> None:
    zeros = bytes(PIECE)
    for ending, compress in COMPRESS.items():  # 10 GiB and more in one line
        piece = compress(zeros)
        (tmp_path / f"bomb.jsonl.{ending}").write_bytes(piece * 160)
    with (tmp_path / "line.jsonl").open("wb") as sparse:
        sparse.truncate(256 << 20)
    (tmp_path / "deep.jsonl").write_bytes(b'{"text": ' + b"[" * 1_000_000 + b"\n")
    (tmp_path / "digits.jsonl").write_bytes(b'{"text": ' + b"7" * 10_000_000 + b"}\n")
    (tmp_path / "field.csv").write_bytes(b'text\n"' + b"x" * (80 << 20) + b'"\n')
    (tmp_path / "sentence.conllu").write_bytes(b"a\n" * 1_100_000)
    write_jsonl(tmp_path / "id.jsonl", [{"id": "x" * 2_000_000, "text": "a"}])
    many = pa.DictionaryArray.from_arrays(
        pa.array([0] * 300, pa.int32()), pa.array(["x" * (32 << 20)])
    )
    pq.write_table(
        pa.table({"text": many}),
        tmp_path / "dictionary.parquet",
        store_schema=False,
        compression="zstd",
        dictionary_pagesize_limit=1 << 30,
    )
    pages = pa.table({"text": ["x" * PIECE] * 4})
    pq.write_table(pages, tmp_path / "pages.parquet", compression="zstd", use_dictionary=False)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert sum((tmp_path / n).stat().st_blocks * 512 for n in names) < 200 << 20
    done = subprocess.run(
        [sys.executable, "-c", READ, *(str(tmp_path / n) for n in names)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = {name: problems for name, problems, *_ in map(json.loads, done.stdout.splitlines())}
    for name, says, times in (
        *((f"bomb.jsonl.{ending}", "over 200 times as many", 1) for ending in COMPRESS),
        ("line.jsonl", "line of 268435456 bytes is over the limit", 1),
        ("deep.jsonl", "not JSON: nested too deeply", 1),
        ("digits.jsonl", "not JSON: Exceeds the limit", 1),
        ("field.csv", "row is over the limit", 1),
        ("sentence.conllu", "is over the limit of", 1),
        ("id.jsonl", "id of 2000000 characters is over the limit of 1024", 1),
        ("dictionary.parquet", "document of 33554432 bytes is over max_document_bytes", 300),
        ("pages.parquet", "over 200 times as many", 1),
    ):
        assert any(says in problem and n == times for problem, n in found[name].items()), (
            name,
            found[name],
        )
        assert "ok" not in found[name], name
    peaks = {name: peak for name, _, peak, _ in map(json.loads, done.stdout.splitlines())}
    assert max(peaks.values()) < 600, peaks  # MiB, of which libraries are the half


def test_a_bomb_costs_its_own_file_and_what_came_before_it_stays(tmp_path: Path) -> None:
    text = b"".join(b"%d\n" % i for i in range(1000))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text) + COMPRESS["gz"](bytes(PIECE)) * 2)
    (tmp_path / "b.txt").write_bytes(b"fine\n")
    (tmp_path / "c.txt.gz.gz").write_bytes(
        gzip.compress(gzip.compress(text))
    )  # what is inside is no known format
    options = replace(OPTIONS, id_column=None)
    files, skipped = corpus.list_files([str(tmp_path)], options)
    assert [Path(file.uri).name for file in skipped] == ["c.txt.gz.gz"]
    documents = [
        d for f in files for s in corpus.cut(f, options, 1 << 20) for d in reading.read(s, options)
    ]
    assert [d.text for d in documents if d.problem is None] == [*map(str, range(1000)), "fine"]
    (problem,) = (d.problem for d in documents if d.problem is not None)
    assert problem.startswith("rest left out of gz stream after 1000 documents: ")


class Evil:
    """A class that runs code as it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_pickles_beside_a_model_and_in_parquet_are_never_opened(
    tmp_path: Path, tiny_bert: Path
) -> None:
    mark = tmp_path / "it ran"
    evil = pickle.dumps(Evil(mark))
    pickle.loads(evil)
    assert mark.exists()  # it would
    mark.unlink()
    folder = shutil.copytree(tiny_bert, tmp_path / "model")
    for name in (
        "pytorch_model.bin",
        "training_args.bin",
        "optimizer.pt",
        "vocab.pkl",
        "model.pickle",
    ):
        (folder / name).write_bytes(evil)
    files = find_model(folder)
    assert not any(name.endswith(".bin") for name in files.identity)
    model.load_tokenizer(files)
    load_weights(files)
    load_blocks(files, 1)
    field = pa.field(
        "text",
        pa.string(),
        metadata={
            b"ARROW:extension:name": b"arrow.py_extension_type",
            b"ARROW:extension:metadata": evil,
        },
    )
    schema = pa.schema([field], {b"pandas": b"{}", b"afn": evil})
    pq.write_table(pa.table({"text": ["hello"]}, schema=schema), tmp_path / "a.parquet")
    options = replace(OPTIONS, id_column=None)
    (slice,) = corpus.cut(corpus_files.stat(str(tmp_path / "a.parquet")), options, 1 << 20)
    assert [d.text for d in reading.read(slice, options)] == ["hello"]
    assert not mark.exists()


FORBIDDEN = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "yaml"}


def test_no_module_can_unpickle_or_evaluate() -> None:
    """Weights, where --allow-pickle asks for it, and code of a model, where --trust-remote-code
    does, are transformers' to load: ``model.files`` passes the two flags on, and nothing else in
    the package does.
    """
    root = Path(afn_ray.__file__).parent
    sources = [
        *root.rglob("*.py"),
        *(root.parent / "jobs").glob("*.py"),
        *(root.parent / "tests" / "bench").glob("[!t]*.py"),
    ]
    assert len(sources) > 60
    passes_on = set()
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names: set[str] = set()
            if isinstance(node, ast.Import):
                names = {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = {(node.module or "").partition(".")[0]}
            elif isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in (
                    "eval",
                    "exec",
                    "compile",
                    "__import__",
                    "torch.load",
                    "pd.read_pickle",
                ), path
                given = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert not (
                    called in ("np.load", "numpy.load")
                    and given.get("allow_pickle", "False") != "False"
                ), path
                assert (
                    given.get("weights_only", "True") == "True"
                    and given.get("shell", "False") == "False"
                ), path
                if "use_safetensors" in given:
                    passes_on.add(path.relative_to(root).as_posix())
            assert not names & FORBIDDEN, (path, names)
    assert "model/load.py" in passes_on and all(
        name.startswith(("model/", "bench/")) for name in passes_on
    )


def test_files_of_a_gigabyte_are_refused_before_they_are_read(
    tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(tiny_bert, tmp_path / "model")
    for name in ("tokenizer.json", "config.json"):
        before = (folder / name).read_bytes()
        with (folder / name).open("wb") as sparse:
            sparse.truncate(1 << 30)
        with pytest.raises(
            ModelError, match=rf"{name} of .* has 1,073,741,824 bytes; expected at most"
        ):
            find_model(folder)
        (folder / name).write_bytes(before)
    shard = tmp_path / "store" / "shards" / "m" / "s"
    run = tmp_path / "store" / "runs" / "r"
    for place, name in ((shard, "commit.json"), (run, "run.json"), (run, "audited.json")):
        place.mkdir(parents=True, exist_ok=True)
        with (place / name).open("wb") as sparse:
            sparse.truncate(1 << 30)
    folder_of_run = manifest.RunFolder(str(run), str(tmp_path / "store"), "r", {})
    reads = (
        (
            lambda: shard_files.read_committed(str(tmp_path / "store"), "m", "s"),
            shard / "commit.json",
        ),
        (lambda: manifest.open_folder(str(tmp_path / "store"), "r"), run / "run.json"),
        (lambda: manifest.is_audited(folder_of_run), run / "audited.json"),
    )
    for read, path in reads:
        with pytest.raises(StoreError, match=r"has more than 67,108,864 bytes"):
            read()
        path.write_bytes(b"[" * 1_000_000)
        with pytest.raises(StoreError, match="is damaged: maximum recursion"):
            read()


def test_no_secret_of_the_environment_is_written_or_printed(
    tmp_path: Path,
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    secrets = {
        name: f"planted-{name.lower()}"
        for name in (
            "AWS_ACCESS_KEY_ID",
            "AWS_SECRET_ACCESS_KEY",
            "AWS_SESSION_TOKEN",
            "RAY_AUTH_TOKEN",
            "HF_TOKEN",
            "AFN_WEBHOOK",
            "AZURE_STORAGE_KEY",
        )
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": "In the beginning"}, {"text": 7}])
    config = make_config(corpus=(str(corpus),))
    command = [
        "run",
        config.corpus[0],
        "--model",
        config.model,
        "--store",
        config.store,
        "--executor",
        "inline",
    ]
    for arguments in (
        command,
        ["show", config.store, "--json"],
        ["run", "s3://user:hunter2@b/c", *command[2:]],
        ["doctor", "--address", "ray://x:1", "--store", "/proc/none", "--model", "gone"],
    ):
        with pytest.raises(SystemExit):
            cli.main(arguments)
    said = "".join(capfd.readouterr())
    assert "Q3" in said or "q3" in said
    written = list((tmp_path / "store").rglob("*"))
    everything = [said]
    for path in written:
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            everything += [str(table.to_pydict()), str(table.schema.metadata)]
        elif path.is_file():
            everything.append(path.read_text("utf-8"))
    assert len(everything) > 8
    for text in everything:
        for value in (*secrets.values(), "hunter2"):
            assert value not in text


ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / ".github" / "SECURITY.md",
    ROOT / ".github" / "CONTRIBUTING.md",
    ROOT / "infra" / "guide" / "safety.md",
]


def test_pages_name_files_bounds_and_commands_that_are_there() -> None:
    flags = flags_of(grammar.parser(), bench_commands.parser())
    for page in PAGES:
        text = page.read_text("utf-8")
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            assert (page.parent / link).exists(), (page, link)
        for flag in re.findall(r"`[^`\n]*?(--[a-z-]+)", text):
            assert flag in flags, (page, flag)
    everything, single, *_ = fenced(PAGES[1].read_text("utf-8"), "sh")
    commands = single.splitlines()
    gate = ROOT / ".ci" / "run"
    assert everything == ".ci/run\n" and os.access(gate, os.X_OK)
    for command in commands[1:]:
        assert re.search(rf"(?:^ *|[{{&] ){re.escape(command)}", gate.read_text(), re.M), command
    assert (
        commands[0].startswith("python -m pytest -n 0 tests/")
        and (ROOT / commands[0].split()[-1]).exists()
    )
    token, licences = fenced(PAGES[2].read_text("utf-8"), "sh")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    listed = subprocess.run(
        ["bash", "-euc", f"{token}echo ${{#RAY_AUTH_TOKEN}}\n{licences}"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert listed.returncode == 0, listed.stderr
    length, *lines = listed.stdout.splitlines()
    assert length == "64" and any(re.match(r"pyarrow \| Apache", line) for line in lines)
    assert not [line for line in lines if re.search(r"\b(A?GPL|LGPL)", line.partition("|")[2])]


def test_the_table_of_bounds_has_the_bounds_of_the_code() -> None:
    table = PAGES[2].read_text("utf-8")
    assert RunConfig(corpus=("-",), model="-", store="-").max_document_bytes == 8 << 20
    assert (streams.LINE_BYTES, streams.EXPANSION, streams.EXPANSION_FROM_BYTES) == (
        64 << 20,
        200,
        64 << 20,
    )
    assert footer.FOOTER_BYTES == 64 << 20
    assert (checksums.JSON_BYTES, DESCRIPTION_BYTES) == (64 << 20, 256 << 20)
    garbled = (
        f"{documents.GARBLED_SHARE * 100:.0f} %, or {documents.GARBLED_FROM - 1} if that is more"
    )
    for bound in (
        garbled,
        f"{documents.ID_CHARS:,} characters",
        f"{conllu.CONLLU_LINES:,} lines",
        "256 MiB",
        "64 MiB",
        "8 MiB",
    ):
        assert bound in table


def test_the_licence_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text("utf-8")
    assert (
        "Apache License\n" in text
        and "Version 2.0, January 2004" in text
        and "END OF TERMS AND CONDITIONS" in text
    )
    assert (
        tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["license"]
        == "Apache-2.0"
    )
