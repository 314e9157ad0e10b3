"""The GPU check runs without a GPU, Ray or DuckDB at toy size, and loses one part's figures at
most.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import simulated
import warm_workers
from families import FAMILIES

ROOT = Path(__file__).parents[2]
CHECK = ROOT / "infra" / "gpu" / "check.py"
ABSENT = {"ray", "duckdb", "prompt_toolkit", "conftest"}
"""Modules that a machine with torch's image may lack."""
BLOCK = f"""
import importlib.metadata
import sys

from_name = importlib.metadata.Distribution.from_name


def installed(name):
    if name in {ABSENT | {"afn-ray"}!r}:
        raise importlib.metadata.PackageNotFoundError(name)
    return from_name(name)


importlib.metadata.Distribution.from_name = installed

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

sys.meta_path.insert(0, Block())
"""
MOST_CPU_S = 60.0
"""Longest toy run, in CPU seconds of all its processes."""
FIGURES = {
    "device": {"cores", "torch"},
    "parity": {"of_tolerance", "attention", "operators", "syncs", "repeatable", "q90", "worst"},
    "flips": {"flips", "median", "worst", "tokens"},
    "ceilings": set(),
    "speed": {"tokens_per_s", "tflops", "mfu", "batch_ms", "host_ms"},
    "pipeline": {"engine_tokens_per_s", "tuned_tokens_per_s", "ratio", "difference"},
    "fused": {"eager_ms", "fused_ms", "speedup"},
    "feed": {"tokens_per_s", "of_engine", "model_share", "wait_share", "cpu_us_per_token"},
    "drills": {"found"},
}
"""Figures of each row, by part; the tables of the guide name them."""


class Checked(NamedTuple):
    """A run of the check."""

    done: subprocess.CompletedProcess[str]
    content: dict[str, Any]
    """The file that it wrote; empty if there is none."""
    cpu_s: float
    """CPU time of its processes, in seconds."""


def run(folder: Path, *arguments: str, program: str | None = None) -> Checked:
    """The check at toy size where ``ABSENT`` cannot be imported.

    ``program`` runs instead, in a fork that may have imported them.
    """
    (folder / "sitecustomize.py").write_text(BLOCK)
    out, said, errors = (folder / name for name in ("check.json", "stdout", "stderr"))
    start = [sys.executable, str(CHECK)]
    if program is not None:
        (folder / "script.py").write_text(textwrap.dedent(program))
        start = [warm_workers.choose(has_faults=False), str(folder / "script.py")]
    with said.open("w") as stdout, errors.open("w") as stderr:
        process = subprocess.Popen(
            [*start, "--dry", "--out", str(out), *arguments],
            env=os.environ | {"PYTHONPATH": str(folder)},
            cwd=folder,
            stdout=stdout,
            stderr=stderr,
        )
        # The usage of this process alone: other children of the tests may be waited for meanwhile.
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    texts = (said.read_text(), errors.read_text())
    done = subprocess.CompletedProcess(process.args, process.returncode, *texts)
    content = json.loads(out.read_text()) if out.exists() else {}
    return Checked(done, content, used.ru_utime + used.ru_stime)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, minilm: Path) -> Checked:
    """All parts."""
    return run(tmp_path_factory.mktemp("check"), "--model", str(minilm))


def test_all_parts_run_without_a_gpu_ray_or_duckdb(whole: Checked) -> None:
    done, content, used_s = whole
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(content) == ["format", "about", "seconds", "parts"]
    assert list(content["parts"]) == list(FIGURES)
    for name, part in content["parts"].items():
        assert part["seconds"] > 0 and part["rows"]
        for row in part["rows"].values():
            assert row.keys() >= FIGURES[name] | {"seconds"} and "error" not in row
    assert used_s < MOST_CPU_S, f"{used_s:.0f} CPU s"


def test_the_figures_are_of_what_they_name(whole: Checked, check: Any) -> None:
    parts = {name: part["rows"] for name, part in whole.content["parts"].items()}
    dtypes = ("float32", "bfloat16")
    families = check.TOY.families
    assert list(parts["parity"]) == [f"{name} {dtype}" for name in families for dtype in dtypes]
    assert check.REAL.families == tuple(FAMILIES)
    assert all(row["repeatable"] for row in parts["parity"].values())
    half = [row["q90"] for name, row in parts["parity"].items() if name.endswith("bfloat16")]
    assert min(half) > 0  # so bfloat16 was measured and not float32 twice
    assert parts["flips"]["float32"]["worst"] < 1e-4 < parts["flips"]["bfloat16"]["worst"]
    assert all(
        row.get("tflops", 1) > 0 and row.get("tb_per_s", 1) > 0
        for row in parts["ceilings"].values()
    )
    for row in parts["speed"].values():
        assert row["mfu"] > 0 and row["tokens_per_s"] > 0 and row["host_ms"] > 0
    assert all(row["tokens_per_s"] > 0 and row["shards"] > 0 for row in parts["feed"].values())
    assert list(parts["feed"]) == ["0 tokenizer processes", "1 tokenizer processes"]


def test_the_summary_fits_a_terminal(whole: Checked) -> None:
    output = whole.done.stdout
    summary = output[output.rindex("\ndevice, machine") :].splitlines()
    assert max(map(len, summary)) <= 80
    assert "0 failures" in summary[-2] + summary[-1]
    for heading in ("tokens/s", "MFU", "TFLOP/s", "flips", "of engine"):
        assert any(heading in line for line in summary)


@pytest.fixture(scope="module")
def drills(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Checks of parts that fail, keep and are stopped, one after another in one program.

    Its first check, what that wrote, and the exit codes and files of the others.
    """
    program = f"""
        import json, os, signal, sys, time
        sys.path.insert(0, {str(CHECK.parent)!r})
        import check

        def hang(run):
            run.row("before", lambda: {{"done": 1}})
            time.sleep(600)

        def die(run):
            os._exit(7)

        def fail(run):
            run.row("row", lambda: 1 / 0)
            raise ValueError("no figures")

        def stopping(number):
            def stop(run):
                child = os.fork()
                if child == 0:
                    os.close(1), os.close(2)  # the test would wait for their end
                    time.sleep(60)
                    os._exit(0)
                run.row("processes", lambda: {{"part": os.getpid(), "its child": child}})
                os.kill(os.getppid(), number)
                time.sleep(600)
            return stop

        def again(name, *arguments):
            out = name + ".json"
            code = check.main([*given[:-1], out, *arguments])
            codes[name] = code, json.load(open(out))

        given = sys.argv[1:]
        codes = {{}}
        parts = {{"hang": check.Part(hang, 1), "die": check.Part(die, 60)}}
        parts["fail"] = check.Part(fail, 60)
        check.PARTS = parts | {{"device": check.PARTS["device"]}}
        first = check.main([*given, "--parts", ",".join(check.PARTS)])

        content = check.Report(check.Path(given[-1])).read()
        for name, torch in (("kept", check.torch.__version__), ("apart", "1.0")):
            content["parts"]["device"]["rows"]["machine"]["torch"] = torch
            json.dump(content, open(name + ".json", "w"))
            check.PARTS["fail"] = check.Part(lambda run: run.row("row", lambda: {{"done": 2}}), 60)
            again(name, "--parts", "device, fail")

        signal.signal(signal.SIGINT, signal.default_int_handler)  # the gate may run without Ctrl-C
        for number in (signal.SIGTERM, signal.SIGINT):
            check.PARTS["hang"] = check.Part(stopping(number), 60)
            again(number.name, "--parts", "hang,die")
        json.dump(codes, open("codes.json", "w"))
        sys.exit(first)
    """
    folder = tmp_path_factory.mktemp("drills")
    done, content, _ = run(folder, program=program)
    assert (folder / "codes.json").exists(), done.stderr
    return done, content, json.loads((folder / "codes.json").read_text())


def test_a_part_that_hangs_or_dies_costs_its_own_figures_only(drills: Any) -> None:
    done, content, _ = drills
    parts = content["parts"]
    assert done.returncode == 1, done.stderr
    assert parts["hang"]["rows"]["before"]["done"] == 1
    assert parts["hang"]["error"] == "stopped after 5 s, its time limit"
    assert parts["die"]["error"] == "its process ended with exit code 7"
    assert parts["fail"]["error"] == "ValueError: no figures"
    assert parts["fail"]["rows"]["row"]["error"] == "ZeroDivisionError: division by zero"
    assert parts["device"]["rows"]["machine"]["torch"]
    assert "FAILED fail, row: ZeroDivisionError" in done.stdout and "4 failures" in done.stdout


def test_parts_of_an_earlier_file_are_kept(drills: Any) -> None:
    done, first, codes = drills
    code, content = codes["kept"]
    assert code == 1  # two of the kept parts failed
    assert list(content["parts"]) == ["hang", "die", "fail", "device"]
    assert content["parts"]["fail"]["rows"]["row"]["done"] == 2
    for name in ("hang", "die"):
        assert content["parts"][name] == first["parts"][name]
    assert re.search(r"^kept from \S+/kept\.json: hang, die$", done.stdout, re.M)


def test_parts_of_another_machine_are_neither_kept_nor_lost(drills: Any) -> None:
    done, first, codes = drills
    code, content = codes["apart"]
    assert code == 2
    first["parts"]["device"]["rows"]["machine"]["torch"] = "1.0"
    assert content == first
    said = (
        r"apart\.json has other parts \(hang, die\), and torch was 1\.0, and is "
        rf"{torch.__version__}"
    )
    assert len(re.findall(said.replace("+", "\\+"), done.stderr)) == 1


def is_running(process: int) -> bool:
    """True if the process exists and is no zombie, which some containers keep."""
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_ends_the_running_part_and_its_processes(
    name: str, code: int, drills: Any
) -> None:
    got, content = drills[2][name]
    assert got == code
    assert list(content["parts"]) == ["hang", "device"]  # "die" has not begun
    assert content["parts"]["hang"]["error"] == f"stopped by {name}"
    processes = content["parts"]["hang"]["rows"]["processes"]
    assert not is_running(processes["part"]) and not is_running(processes["its child"])


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(CHECK.parent))
    return importlib.import_module("check")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--out", "no/such.json"], "cannot be written"),
        (["--out", "/proc/nope/x.json"], "cannot be written"),
        (["--out", "."], "Is a directory"),
        (["--out", "other.json"], "has no results of this check"),
        (["--out", "rows.json"], "has no results of this check"),
        (["--out", "new.json", "--here"], "--here adds to a file of results"),
        (["--model", "nosuchfolder"], "--model nosuchfolder: no model there"),
        (["--parts", "flips, speeds"], "no part 'speeds'"),
    ],
)
def test_a_check_that_cannot_start_says_why_in_one_line(
    arguments: list[str],
    said: str,
    check: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(check, "run_part", lambda *given: pytest.fail("a part began"))
    Path("other.json").write_text('{"of": "another program"}')
    Path("rows.json").write_text('{"format": 1, "parts": {"flips": {"rows": []}}}')
    before = {path: path.read_text() for path in tmp_path.iterdir()}
    assert check.main(["--dry", "--parts", "flips", *arguments]) == 2
    output = capsys.readouterr()
    assert said in output.err and output.err.count("\n") == 1 and output.out == ""
    assert {path: path.read_text() for path in tmp_path.iterdir()} == before


def test_a_part_without_a_process_of_its_own_adds_to_the_file(
    check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)  # also of later tests
    out = tmp_path / "check.json"
    earlier = {"format": 1, "about": "", "seconds": 0.0, "parts": {"device": {"rows": {}}}}
    out.write_text(json.dumps(earlier))
    assert check.main(["--dry", "--here", "--parts", "flips", "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    assert list(content["parts"]) == ["device", "flips"]
    # There is no model for the flips, which is said, and is no failure.
    assert "no folder with real weights" in content["parts"]["flips"]["rows"]["labels"]["skipped"]
    assert "flips, labels: skipped no folder with real weights" in check.summary(content)
    assert check.failures(content) == []


def test_parity_fails_where_flash_attention_is_refused(
    check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    with simulated.device():
        row = check._compare(check._Family("bert", tmp_path / "bert"), "float16", "cuda")
    assert row["operators"] == "torch_attn::_varlen_attn" and "error" not in row
    with simulated.device(varlen_attn=simulated.varlen_of_2_10):
        row = check._compare(check._Family("bert", tmp_path / "bert"), "float16", "cuda")
    assert row["error"].startswith("no flash attention, but ") and "is refused" in row["error"]


def test_the_engines_own_kernel_is_compared_where_it_can_be_made(
    check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(check, "REPEAT", 1)
    monkeypatch.setattr(check, "QUEUED", 1)
    monkeypatch.setitem(check.measurer.BATCH_TOKENS, "cuda", 1024)
    size = replace(check.TOY, device="cuda", fast=("float16",))
    run = check.Check("fused", size, check.Report(tmp_path / "check.json"), tmp_path, None)
    run.report.write({"parts": {}})
    with simulated.device():
        check.check_fused(run)
    assert run.report.rows("fused") == {
        "fused against eager": {"skipped": "triton is not installed"}
    }
    with simulated.device(kernel=simulated.fused_norm) as log:
        check.check_fused(run)
    _, alone, engine = run.report.rows("fused").values()
    assert log.kernels["add_norm_cast"] > 0 and alone["difference"] == 0
    assert engine["norm"] == "fused" and engine["why"] == ""
    assert not {"error"} & (alone.keys() | engine.keys())


def test_the_arithmetic_of_the_guide_follows_from_its_rates() -> None:
    page = (ROOT / "infra" / "guide" / "sizing.md").read_text("utf-8")
    section = page.split("## Measure a GPU")[1].split("## ")[0]
    found = re.findall(
        r"^\| ([^|]+) \| ([\d.]+) (MFLOP|kB) \| ([\d.]+) T\S+ \| ([\d.]+) \|$", section, re.M
    )
    work = {name: float(amount) for name, amount, *_ in found}
    took = {}
    for name, amount, unit, rate, us in found:
        took[name] = float(amount) * (1 if unit == "MFLOP" else 1e-3) / float(rate)
        assert took[name] == pytest.approx(float(us), abs=5e-4)
    d, f, layers, length = 768, 3072, 8, 128
    assert work["matrix products"] == pytest.approx(
        layers * (8 * d * d + 4 * d * f) / 1e6, abs=0.05
    )
    assert work["attention"] == pytest.approx(layers * 4 * length * d / 1e6, abs=0.05)
    flop = work["matrix products"] + work["attention"]
    fused = sum(took.values()) - (393 - 246) * 1e-3 / 4.3
    for us, said in ((sum(took.values()), "0.300"), (fused, "0.266")):
        assert f"{us:.3f}" == said and said in section
        assert f"{1 / us:.1f} M tokens/s" in section
        assert f"{flop / us / 788:.0%}".replace("%", " %") in section
    (prepared,) = re.findall(r"prepares ([\d.]+) M tokens/s", section)
    (own_us,) = re.findall(r"takes ([\d.]+) microseconds\s+of CPU a token", section)
    cores = [float(n) for n in re.findall(r"^\| [a-z][^|]+ \| (\d\.\d) \|$", section, re.M)]
    tokenizing, own = 3.3 / float(prepared), 3.3 * float(own_us)
    assert cores == [round(tokenizing, 1), round(own, 1), round(tokenizing + own, 1)]
