"""Models, tokenizers and corpora that the tests share; nothing here needs a network."""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from unittest import mock

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from rich.console import Console

import faults
import warm_workers
from hosts import ATOMIC_S3, wait_until

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_AUTH_MODE"] = "token"
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# The processes that Ray would start beforehand for each CPU have another environment than workers.
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
# One thread each, for the suite's processes have the cores between them: threads that wait for
# others' cores spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from afn_ray.bench import PIPED_COLUMNS
from afn_ray.config import RunConfig
from afn_ray.corpus_values import ReadOptions, Shard
from afn_ray.measure import Measure
from afn_ray.query import processes
from afn_ray.run_info import RunInfo
from afn_ray.runs import demo
from afn_ray.schema import TOKEN_CHARS, strengths
from afn_ray.store import blocks, checksums, layout, shard_files, storage, uris
from afn_ray.store.commits import Commit

if TYPE_CHECKING:
    from afn_ray import Run
    from afn_ray.model import ModelFiles
    from drivers import Drivers
    from ground import Ground
    from hosts import Chaos

SLOW = (
    "test_machines",
    "test_jobs",
    "test_ray",
    "test_readme",
    "test_audit",
    "test_nights",
    "test_bench",
    "test_generators",
    "test_object_store",
    "test_cli",
    "test_report",
    "test_tour",
    "test_memory",
    "test_status",
    "test_screen",
    "test_doctor",
    "test_reduce",
    "test_garbage",
)
"""Files that begin first: processes take whole files, and the last one should not be long."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fuzz-long", action="store_true", help="tests/fuzz tries thousands of instances, not some"
    )


@pytest.fixture(scope="session")
def fuzz_length(request: pytest.FixtureRequest) -> str:
    """Length of the fuzzers of tests/fuzz: ``short``, the gate's, or ``long`` with
    ``--fuzz-long``.
    """
    return "long" if request.config.getoption("--fuzz-long") else "short"


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Tests of bytes are named by the argument: gzip's hold the time, and each process collects."""
    return argname if isinstance(val, bytes) else None


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Faults are tried on a disk and in a bucket. The short run (``not again``) has each on one of
    them, in turn.

    A long run of a fuzzer has no time limit.
    """
    for item in items:
        if config.getoption("--fuzz-long") and "fuzz_length" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(0))
    kinds = ("local", "s3")
    numbers: dict[str, int] = {}
    for item in items:
        kind = item.callspec.params.get("ground") if hasattr(item, "callspec") else None
        if item.get_closest_marker("chaos") is not None:
            item.add_marker(pytest.mark.xdist_group(f"{chaos_group(item)}-{kind}"))
        if kind is None or not isinstance(item, pytest.Function):
            continue
        if (only := item.get_closest_marker("only")) is not None:
            there, why = only.args
            if kind != there:
                item.add_marker(pytest.mark.skip(why))
        elif kind != kinds[numbers.setdefault(item.originalname, len(numbers)) % 2]:
            item.add_marker("again")
    items.sort(key=lambda item: SLOW.index(item.path.stem) if item.path.stem in SLOW else len(SLOW))


def chaos_group(item: pytest.Item) -> str:
    """The chaos tests that share what one process starts, for ``--dist loadgroup``: its nodes, its
    own Ray, or its drivers.
    """
    if item.path.stem == "test_faults":
        return "workers" if "local_ray" in getattr(item, "fixturenames", ()) else "drivers"
    return item.path.stem


_warm_pythons: list[warm_workers.WarmPython] = []


def pytest_configure(config: pytest.Config) -> None:
    """A shell's background jobs ignore SIGINT, and what they start too: here Ctrl-C is to mean what
    it does.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if not hasattr(config, "workerinput"):  # as in the processes of xdist, which find these
        _warm_pythons.extend(warm_workers.start())


_frozen = False


def pytest_runtest_teardown() -> None:
    """Every model that is freed collects garbage: of transformers' own two million objects none is
    ever garbage, so that nobody looks at them again.
    """
    global _frozen
    if not _frozen and "transformers.modeling_utils" in sys.modules:
        gc.collect()
        gc.freeze()
        _frozen = True


def pytest_unconfigure() -> None:
    """Extensions that count what they have freed see it freed."""
    gc.unfreeze()
    for warm_python in _warm_pythons:
        warm_python.close()


@pytest.fixture
def own_templates(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The test's own templates of query processes: its first query process is a fresh one."""
    monkeypatch.setattr(processes, "_crashes", 0)
    monkeypatch.setattr(processes, "_once", set())
    monkeypatch.setattr(processes, "_failed", Counter())
    monkeypatch.setattr(processes, "_templates", {})
    yield
    processes._end()


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Folder of the real all-MiniLM-L6-v2 weights."""
    return demo.model_folder()


@pytest.fixture(scope="session")
def verses() -> list[str]:
    """The King James verses, in order."""
    with demo.corpus_file().open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def save_model(folder: Path, config: Any, seed: int = 0, tokenizer: Path | None = None) -> Path:
    """A model of ``config`` with random weights, large enough gains that its norms differ, in
    ``folder``.

    ``tokenizer``: a folder whose files it gets too.
    """
    import torch
    import transformers

    torch.manual_seed(seed)
    model = transformers.AutoModel.from_config(config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" in name.lower() and name.endswith(
                "weight"
            ):  # fresh post-LN norms are all sqrt(d)
                value.copy_(1 + 0.5 * torch.rand_like(value))
    model.save_pretrained(folder)
    for file in () if tokenizer is None else tokenizer.iterdir():
        shutil.copy(file, folder / file.name)
    return folder


@pytest.fixture(scope="session")
def wordpiece(tmp_path_factory: pytest.TempPathFactory, minilm: Path) -> Path:
    """Folder with MiniLM's tokenizer, for a model of any family."""
    folder = tmp_path_factory.mktemp("wordpiece")
    shutil.copy(minilm / "tokenizer.json", folder)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory, minilm: Path) -> Path:
    """A BERT of 3 layers and 64 positions with MiniLM's tokenizer: fast, and documents soon need
    windows.
    """
    import transformers

    folder = tmp_path_factory.mktemp("tiny-bert")
    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    save_model(folder, config)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copy(minilm / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def tiny_mpnet(tmp_path_factory: pytest.TempPathFactory, wordpiece: Path) -> Path:
    """An MPNet of 3 layers and 64 positions, of the family whose position biases forbid packing."""
    import transformers

    config = transformers.MPNetConfig(
        vocab_size=30522,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=66,
        pad_token_id=1,
    )
    return save_model(tmp_path_factory.mktemp("tiny-mpnet"), config, tokenizer=wordpiece)


@pytest.fixture(scope="session")
def byte_bpe(tmp_path_factory: pytest.TempPathFactory, verses: list[str]) -> Path:
    """Folder with a byte-level BPE tokenizer trained on the verses, as GPT-2 and Llama 3 have."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(verses[:500], trainer)
    folder = tmp_path_factory.mktemp("byte-bpe")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"})
    )
    return folder


@pytest.fixture(scope="session")
def tiny_gpt(tmp_path_factory: pytest.TempPathFactory, byte_bpe: Path) -> Path:
    """A GPT-2 of 3 layers and 48 positions: causal, no special tokens, Conv1D instead of linear
    layers.
    """
    import transformers

    config = transformers.GPT2Config(vocab_size=600, n_embd=32, n_layer=3, n_head=2, n_positions=48)
    return save_model(tmp_path_factory.mktemp("tiny-gpt"), config, tokenizer=byte_bpe)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory, byte_bpe: Path) -> Path:
    """A Llama of 3 layers with grouped-query attention and a final norm."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=600,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=48,
    )
    return save_model(tmp_path_factory.mktemp("tiny-llama"), config, tokenizer=byte_bpe)


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    """``rows`` as JSON lines; a string is written as it is."""
    path.write_text(
        "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), "utf-8"
    )
    return path


@pytest.fixture
def corpus(tmp_path: Path, verses: list[str]) -> str:
    """A file of 60 verses."""
    return str(write_jsonl(tmp_path / "c.jsonl", [{"text": t} for t in verses[:60]]))


def config_of(model: Path, corpus: Path | str, store: Path | str, /, **changes: Any) -> RunConfig:
    """The config of a run in this process with small batches; ``changes`` replace any field."""
    values: dict[str, Any] = {
        "corpus": (str(corpus),),
        "model": str(model),
        "store": str(store),
        "executor": "inline",
        "batch_tokens": 256,
        "dtype": "float32",
    }
    return RunConfig(**(values | changes))


@pytest.fixture(scope="module")
def short_calibrations() -> Iterator[None]:
    """Calibrations of this process measure a sixteenth of their usual sample: for tests whose point
    is not what they decide.
    """
    from afn_ray.runs import outliers, precision

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "CALIBRATION_TOKENS", precision.CALIBRATION_TOKENS // 16)
        patch.setattr(outliers, "CALIBRATION_CHARS", outliers.CALIBRATION_CHARS // 16)
        yield


MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def make_config(tmp_path: Path, tiny_bert: Path) -> MakeConfig:
    """A config over the tiny BERT, in this process, with small shards; keywords replace any
    field.
    """

    def make(**changes: Any) -> RunConfig:
        values = {"shard_bytes": 4096, "layers": "2/3"} | changes
        return config_of(tiny_bert, tmp_path / "corpus", tmp_path / "store", **values)

    return make


def printed(render: Any, result: dict[str, Any]) -> str:
    """Output of ``render`` of a module that measures where it is piped, once no line is too
    wide.
    """
    out = io.StringIO()
    render(result, Console(file=out, width=PIPED_COLUMNS, highlight=False))
    assert max(map(len, out.getvalue().splitlines())) <= PIPED_COLUMNS
    return out.getvalue()


RUN_INFO: RunInfo = {
    "measure": {}, "model": {}, "layers": [8], "config": {}, "corpus": {}, "counts": {},
    "tables": {}, "created_at": "",
    "precision": {"dtype": "float32", "asked": "float32", "device": "cpu", "why": "asked for",
                  "n_tokens": 0,
                  "trials": []},
    "finished_at": "",
}  # fmt: skip
"""The keys that every run.json has."""


def make_measure(layers: Sequence[int] = (8,)) -> Measure:
    """A measure of strength at ``layers``, of a model that is nowhere."""
    return Measure(
        model=(("config.json", "abc"),),
        model_type="bert",
        layers=tuple(layers),
        signals=("strength",),
        series=strengths(layers),
        window_tokens=512,
        overlap_tokens=128,
        offsets=True,
        dtype="float32",
    )


def rewrite(uri: str, data: bytes) -> None:
    """Put ``data`` in the place of the file at ``uri``."""
    storage.delete([uri])
    write_new(uri, data)


def edit_checksummed(uri: str, edit: Callable[[dict[str, Any]], object]) -> None:
    """``edit`` the JSON file at ``uri`` and make its checksum right again, as one who knows how
    would.
    """
    body = json.loads(storage.read_bytes(uri))
    del body["sha256"]
    edit(body)
    rewrite(uri, checksums.checksummed(body))


def edit_table(run_uri: str, name: str, edit: Callable[[pa.Table], pa.Table]) -> None:
    """``edit`` a table of the run at ``run_uri`` and have its run.json list what it became."""
    uri = f"{run_uri}/{name}.parquet"
    sink = io.BytesIO()
    pq.write_table(edit(pq.read_table(io.BytesIO(storage.read_bytes(uri)))), sink)
    data = sink.getvalue()
    rewrite(uri, data)
    edit_checksummed(
        f"{run_uri}/run.json",
        lambda info: info["tables"].update({name: listed(f"{name}.parquet", data)}),
    )


def listed(name: str, data: bytes) -> dict[str, Any]:
    """Entry of run.json for a file."""
    return {
        "name": name,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "crc32": blocks.checksums(data),
    }


def recommit(folder: str, table: str, data: bytes, **changes: Any) -> None:
    """Put ``data`` in the place of a committed shard's table, and have its commit say that this is
    right.
    """

    def edit(commit: dict[str, Any]) -> None:
        entry = commit["files"][table]
        rewrite(f"{folder}/{entry['name']}", data)
        entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} | changes
        commit["crc32"][table] = blocks.checksums(data)

    edit_checksummed(f"{folder}/commit.json", edit)


def as_version_5(store: str) -> None:
    """Write the shards and complete runs of ``store`` as version 5 of the schema did."""
    sizes: dict[str, int] = {}
    for commit in Path(store).glob("shards/*/*/commit.json"):
        for table, entry in json.loads(commit.read_text("utf-8"))["files"].items():
            if table in ("tokens", "documents", "neurons"):
                path = commit.with_name(entry["name"])
                sink = io.BytesIO()
                pq.write_table(_of_version_5(pq.read_table(path)), sink)
                recommit(str(commit.parent), table, sink.getvalue())
                sizes[str(path.relative_to(store))] = len(sink.getvalue())
        edit_checksummed(str(commit), lambda body: body.update(schema_version=5))

    def of_files(shards: pa.Table) -> pa.Table:
        for table, column in (
            ("tokens", "token"),
            ("documents", "document"),
            ("neurons", "neurons"),
        ):
            names = shards[f"{table}_file"].to_pylist()
            at = shards.schema.get_field_index(f"{column}_bytes")
            found = pa.array([sizes.get(name, 0) for name in names], pa.int64())
            shards = shards.set_column(at, shards.schema.field(at), found)
        return shards.drop_columns(["schema_version"])

    for run in Path(store).glob("runs/*/run.json"):
        edit_table(str(run.parent), "shards", of_files)
        edit_checksummed(str(run), lambda body: body.update(schema_version=5))


def _of_version_5(table: pa.Table) -> pa.Table:
    metadata = table.schema.metadata
    if "length" in table.column_names:
        chars = pc.multiply(table["position"], pa.scalar(TOKEN_CHARS, pa.int32()))
        start = pc.add(table["start_ahead"], chars)
        end = pc.add(start, table["length"])
        for name, old, values in (("start_ahead", "start", start), ("length", "end", end)):
            at = table.column_names.index(name)
            table = table.set_column(at, table.schema.field(at).with_name(old), values)
    return table.rename_columns({"doc_in_shard": "doc"}).replace_schema_metadata(metadata)


def race_attempts(store: str, folder: Path, options: ReadOptions, rounds: int) -> None:
    """Two attempts at one shard commit at once: one wins, and the other reads the winner's commit
    and deletes its own files. ``folder``: a scratch folder.
    """
    tables = {}
    for table in layout.TABLES:
        tables[table] = (folder / table, 1)
        tables[table][0].write_bytes(table.encode() * 10)
    barrier = threading.Barrier(2)
    counts = dict.fromkeys(("documents", "tokens", "forward_tokens"), 1)

    def publish(shard: Shard) -> tuple[str, Commit]:
        attempt = shard_files.Attempt(uuid.uuid4().hex[:16], tables, counts, 1.0, {})
        barrier.wait()
        return attempt.id, shard_files.publish(store, "m", shard, attempt)

    for i in range(rounds):
        shard = Shard(f"{i:032x}", (), options)
        with ThreadPoolExecutor(2) as pool:
            (a, by_a), (b, by_b) = pool.map(publish, [shard, shard])
        assert by_a == by_b and by_a.attempt in (a, b)
        shard_folder = shard_files.shard_uri(store, "m", shard.id)
        names = {str(f["name"]) for f in by_a.files.values()} | {"commit.json"}
        assert set(storage.list_names(shard_folder)) == names


def afn(
    *args: str | Path, stdin: str | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """``afn`` with ``args`` in a process of its own, a warm fork, once it has ended."""
    command = [warm_workers.choose(has_faults=False), "-m", "afn_ray", *map(str, args)]
    return subprocess.run(
        command, capture_output=True, text=True, input=stdin, cwd=cwd, timeout=300
    )


def benchmark(
    main: Callable[[Sequence[str]], NoReturn], folder: Path, *words: str
) -> tuple[dict[str, Any], str, str]:
    """The figures of ``afn bench`` or ``jobs/benchmark.py`` (its ``main``) with ``words``.

    The figures are from its JSON in ``folder``. They come with the printed table and the notes.
    """
    out, err, figures = io.StringIO(), io.StringIO(), folder / "figures.json"
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as end,
    ):
        main([*words, "--json", str(figures)])
    assert end.value.code in (None, 0), err.getvalue()
    return json.loads(figures.read_text("utf-8")), out.getvalue(), err.getvalue()


def command_parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of each command, by its name."""
    from afn_ray.cli import grammar

    return subcommands_of(grammar.parser())


def subcommands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parser of each subcommand of ``parser``, by its name."""
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return dict(commands.choices)


def recorded(run: Run) -> tuple[pa.Table, ...]:
    """All tokens and documents in plan order, and the run's thresholds and vocabulary."""

    def read(uri: str) -> pa.Table:
        return pq.read_table(pa.BufferReader(storage.read_bytes(uri)))

    store = run.uri.rsplit("/runs/", 1)[0]
    shards = read(f"{run.uri}/shards.parquet").to_pylist()
    tables = (
        pa.concat_tables(
            [read(f"{store}/{shard[f'{table}_file']}") for shard in shards]
        ).unify_dictionaries()
        for table in ("tokens", "documents")
    )
    metadata = None  # it names the attempt
    return (
        *(t.combine_chunks().replace_schema_metadata(metadata) for t in tables),
        *(read(f"{run.uri}/{name}.parquet") for name in ("thresholds", "vocabulary")),
    )


def flags_of(*parsers: argparse.ArgumentParser) -> set[str]:
    """Flags of ``parsers`` and of the parsers of their subcommands."""
    flags, waiting = set[str](), list(parsers)
    while waiting:
        for action in waiting.pop()._actions:
            flags |= {*action.option_strings}
            if isinstance(action.choices, dict):
                waiting += action.choices.values()
    return flags


def fenced(page: str, language: str) -> list[str]:
    """Texts between fences of ``language`` in the Markdown ``page``."""
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.M | re.S)


def find_model(folder: Path | str, **options: bool) -> ModelFiles:
    """The model in ``folder``, of which nothing is to be executed unless ``options`` allow it."""
    from afn_ray import model

    return model.find_model(
        str(folder), None, **({"trust_remote_code": False, "allow_pickle": False} | options)
    )


def interrupted(*args: object, **kwargs: object) -> NoReturn:
    """Ctrl-C, in the place of any function."""
    raise KeyboardInterrupt


def stop_after(monkeypatch: pytest.MonkeyPatch, shards: int) -> list[str]:
    """Ctrl-C in this process once ``shards`` are committed; returns the ids of those that were."""
    from afn_ray.runs import worker

    process = worker.Processor.process
    done: list[str] = []
    one_by_one = threading.Lock()

    def process_or_stop(self: Any, shard: Shard, oom_retries: int = 0) -> Commit:
        with one_by_one:
            if len(done) == shards:
                raise KeyboardInterrupt
            done.append(shard.id)
            return process(self, shard, oom_retries)

    monkeypatch.setattr(worker.Processor, "process", process_or_stop)
    return done


S3_SECRET = "no-file-and-no-message-may-hold-this"


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of S3's API on a loopback port, for this process and those it starts; its URL."""
    log = tmp_path_factory.mktemp("s3") / "log"
    with log.open("w") as sink:
        server = subprocess.Popen(
            [sys.executable, "-u", "-P", str(ATOMIC_S3), "-H", "127.0.0.1", "-p", "0"],
            stdout=sink,
            stderr=sink,
        )
    try:
        found = wait_until(
            "the server of S3 says its address",
            lambda: re.search(r"http://127\.0\.0\.1:\d+", log.read_text()),
            server,
            log.read_text,
        )
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {
                "AWS_ENDPOINT_URL": found[0],
                "AWS_ACCESS_KEY_ID": "test",
                "AWS_SECRET_ACCESS_KEY": S3_SECRET,
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_EC2_METADATA_DISABLED": "true",
                "NO_PROXY": "127.0.0.1",
                "AWS_CONFIG_FILE": os.devnull,
                "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            }.items():
                patch.setenv(name, value)
            yield found[0]
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def object_store(s3_server: str) -> str:
    """A fresh bucket."""
    bucket = uuid.uuid4().hex
    uris.open_filesystem(f"s3://{bucket}")[0].mkdir(bucket)
    return f"s3://{bucket}"


@pytest.fixture
def memory(request: pytest.FixtureRequest) -> Iterator[str]:
    """A fresh folder in this process's memory, the same in every session: faults go by names."""
    uri = f"memory://{hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:32]}"
    yield uri
    fs = fsspec.filesystem("memory")
    if fs.exists(uri):
        fs.rm(uri, recursive=True)


def write_new(uri: str, data: bytes) -> None:
    """Write ``uri``, which nobody else writes: where it is there already, its first answer was
    lost.
    """
    with (
        contextlib.suppress(storage.AlreadyWritten)
        if uri.startswith("faulty:")
        else contextlib.nullcontext()
    ):
        storage.write_once(uri, data)


@pytest.fixture(params=["local", "memory"])
def quiet_place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh folder on filesystems that answer."""
    return (
        str(tmp_path / "place")
        if request.param == "local"
        else str(request.getfixturevalue("memory"))
    )


@pytest.fixture(params=["local", "memory", "s3", "faulty"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A fresh folder on each kind of filesystem; ``faulty`` is memory whose every fourth call goes
    wrong.
    """
    if request.param == "local":
        yield str(tmp_path / "place")
    elif request.param == "s3":
        yield request.getfixturevalue("object_store")
    elif request.param == "memory":
        yield request.getfixturevalue("memory")
    else:
        with faults.injected(
            seed=0, rate=0.25, kinds=("fail", "slow", "lie")
        ):  # stale listings change answers
            yield faults.wrap(request.getfixturevalue("memory"))


@pytest.fixture(scope="module")
def local_ray(request: pytest.FixtureRequest, s3_server: str) -> Iterator[None]:
    """One local Ray of four logical CPUs for the tests of a file; its workers, which begin as
    forks, inherit the way to the bucket.

    An idle one takes a twentieth of a core, so it does not outlive them.
    """
    import ray

    from afn_ray.runs.cluster import access

    python = warm_workers.choose(request.node.get_closest_marker("chaos") is not None)
    with mock.patch.object(sys, "executable", python):
        access.start_local(num_cpus=4, object_store_memory=128 << 20)
    yield
    ray.shutdown()


@pytest.fixture(scope="module", params=["local", "s3"])
def ground(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_bert: Path,
    verses: list[str],
    s3_server: str,
) -> Ground:
    """Ground of a chaos test, on a disk and in a bucket."""
    from ground import make_ground

    folder = tmp_path_factory.mktemp(f"ground-{request.param}")
    return make_ground(request.param, folder, tiny_bert, verses)


@pytest.fixture(scope="module")
def chaos(tmp_path_factory: pytest.TempPathFactory, s3_server: str) -> Chaos:
    """The schedule of faults of a file's tests; none is planned yet."""
    from hosts import Chaos

    return Chaos.of(tmp_path_factory.mktemp("chaos"))


@pytest.fixture(scope="module")
def drivers(tmp_path_factory: pytest.TempPathFactory, chaos: Chaos) -> Drivers:
    """Starts ``afn`` commands that meet the faults of ``chaos``."""
    from drivers import Drivers

    return Drivers(tmp_path_factory.mktemp("drivers"), chaos.environment)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium; without it these tests are skipped, but never in CI."""
    path = next(
        (p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None
    )
    if path is None:
        why = "no Chromium here: apt-get install chromium"
        pytest.fail(why) if os.environ.get("CI") else pytest.skip(why)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox"]
        )  # root has no sandbox
        yield chromium
        chromium.close()


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """State of a process that has joined no Ray: another test's may be there."""
    from afn_ray.runs.cluster import access

    access.choose_token(own=False)  # before Ray is imported
    monkeypatch.setattr("ray.is_initialized", lambda: False)
