"""Every command and every line of Python in the README and the guide runs; the first two blocks are
CI's.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

import afn_ray
import warm_workers
from afn_ray.cli import commands as cli
from afn_ray.cli import grammar
from afn_ray.runs import demo
from afn_ray.show import shell
from bench import commands as bench_commands
from conftest import command_parsers, fenced, flags_of, save_model, stop_after, write_jsonl

ROOT = Path(__file__).parent.parent
GUIDE = ("questions", "python", "signals", "audit", "engine", "store", "export")
PAGES = (ROOT / "README.md", *(ROOT / "infra" / "guide" / f"{name}.md" for name in GUIDE))
"""Pages in the order in which their commands can be given: those of one stand on what those before
it made.
"""
TEXT = "\n".join(page.read_text("utf-8") for page in PAGES)


@pytest.fixture(scope="module")
def small_bert(tmp_path_factory: pytest.TempPathFactory, minilm: Path) -> Path:
    """A BERT of MiniLM's depth and tokenizer, which measures in a tenth of its time."""
    import transformers

    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=6, num_attention_heads=2, intermediate_size=48
    )
    folder = tmp_path_factory.mktemp("small-bert")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copy(minilm / name, folder)
    return save_model(folder, config)


@pytest.fixture(scope="module")
def workplace(
    tmp_path_factory: pytest.TempPathFactory,
    verses: list[str],
    small_bert: Path,
    short_calibrations: None,
) -> Path:
    """Things that the README speaks of: a corpus, a model, run.toml, policy.toml, and the demo's
    store over fewer verses.
    """
    folder = tmp_path_factory.mktemp("readme")
    (folder / "corpus").mkdir()
    (folder / "path" / "to").mkdir(parents=True)
    (folder / "path" / "to" / "model").symlink_to(small_bert)
    rows = [{"citation": f"v{i}", "id": i, "text": t} for i, t in enumerate(verses[:150])]
    write_jsonl(folder / "corpus" / "verses.jsonl", rows)
    (folder / "treebank").mkdir()
    (folder / "treebank" / "tale.conllu").write_text("".join(fenced(TEXT, "conllu")), "utf-8")
    for name, text in zip(
        ("run.toml", "signal.toml", "policy.toml"), fenced(TEXT, "toml"), strict=True
    ):
        (folder / name).write_text(text)
    measure(folder, "corpus", "afn-demo", small_bert)
    return folder


def measure(folder: Path, corpus: str, store: str, model: Path) -> None:
    """Does what ``afn run`` in ``folder`` does to measure ``corpus`` as the demo is measured."""
    flags = {"store": store, "model": model, "id-column": "citation", "executor": "inline"}
    layers = demo.demo_config(store).layers
    words = ["run", corpus, f"--layers={layers}", *(f"--{k}={v}" for k, v in flags.items())]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.chdir(folder)
        cli.main(words)
    assert end.value.code == 0


def test_the_first_two_blocks_are_the_two_commands_of_a_newcomer() -> None:
    first, second = fenced(TEXT, "sh")[:2]
    assert 'pip install -c constraints.txt -e ".[demo]" && afn demo' in first
    assert 'pip install -c constraints.txt -e ".[dev]" && python -m pytest' in second


def commands_of(heading: str) -> list[str]:
    """The commands in the README's section of this ``heading``; "": before the first."""
    text = PAGES[0].read_text("utf-8")
    section = text.partition(f"\n## {heading}\n" if heading else "\n")[2].partition("\n## ")[0]
    return [line for block in fenced(section, "sh") for line in block.splitlines()]


@dataclass
class Newcomer:
    """Types commands, in this process."""

    capsys: pytest.CaptureFixture[str]

    def types(self, command: str, code: int = 0) -> str:
        """``command`` as a shell would split it; returns what it prints, in one line."""
        words = shlex.split(command)
        assert words[0] == "afn"
        with pytest.raises(SystemExit) as end:
            cli.main(words[1:])
        said = self.capsys.readouterr()
        assert end.value.code == code, (command, said)
        return " ".join((said.out + said.err).split())


@pytest.fixture
def newcomer(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    tiny_bert: Path,
    verses: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Newcomer:
    """Run in a folder with a corpus of two shards and a line that is none, a model, and a demo over
    fewer verses.
    """
    (tmp_path / "corpus").mkdir()
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "model").symlink_to(tiny_bert)
    write_jsonl(
        tmp_path / "corpus" / "a.jsonl",
        [*({"id": i, "text": t} for i, t in enumerate(verses[:600])), "{no"],
    )
    (tmp_path / "run.toml").write_text(fenced(TEXT, "toml")[0])
    few = write_jsonl(
        tmp_path / "few.jsonl", [{"citation": str(i), "text": t} for i, t in enumerate(verses[:80])]
    )
    monkeypatch.setattr(demo, "corpus_file", lambda: few)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    return Newcomer(capsys)


def test_the_first_section_leads_from_the_demo_to_its_next_commands(newcomer: Newcomer) -> None:
    said = newcomer.types(commands_of("")[0].rpartition("&& ")[2])
    printed = (
        PAGES[0].read_text("utf-8").partition("The demo ends with this:")[2].partition("\n## ")[0]
    )
    promised = [
        line.removeprefix("Next:    ")
        for line in printed.splitlines()
        if line.startswith("Next:    afn")
    ]
    assert len(promised) == 3
    for command in promised:
        assert f"Next: {command}" in said  # word for word what the page shows
        assert newcomer.types(command)


def test_the_section_on_a_corpus_of_ones_own_fits_together(
    newcomer: Newcomer, verses: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, show, dry_run, from_file, sql = commands_of("Measure your own corpus")
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        newcomer.types(first, code=75)
    done = newcomer.types(dry_run)  # of what is done and what is not
    assert (
        "2, of them 1 in the store and 1 to do" in done
        and "in the store, " in done
        and " counted" in done
    )
    said = newcomer.types(first)  # the same command resumes
    assert "1 in the store, 1 to do" in said and f"Next: {show}" in said
    with afn_ray.open_run("results") as run:
        counts = run.info["counts"]
    assert (counts["shards"], counts["shards_reused"], counts["documents"]) == (2, 1, 601)
    shown = newcomer.types(show)
    assert "(control)" in shown and "was not recorded" not in shown

    done = newcomer.types(dry_run)
    assert (
        f"{counts['tokens']:,}: {counts['tokens']:,} in the store" in done
        and "nothing to do" in done
    )
    assert "nothing to do" in newcomer.types(first)
    assert "601 documents" in newcomer.types(f"{from_file} --dry-run")
    newcomer.types(from_file)
    assert "nothing to do" in newcomer.types(from_file)
    rows = newcomer.types(sql)
    assert "corpus/a.jsonl" in rows and "quarantined: not JSON" in rows

    write_jsonl(
        tmp_path / "corpus" / "b.jsonl",
        [{"id": i, "text": t} for i, t in enumerate(verses[600:1200])],
    )
    assert "2 in the store, " in newcomer.types(first)  # only what is new
    refused = dry_run.replace("--dry-run", "--window-tokens 32")
    for command in (refused, f"{refused} --dry-run"):
        assert "holds another measure" in newcomer.types(command, code=2)


def test_what_show_recommends_works(newcomer: Newcomer) -> None:
    first, show, *_ = commands_of("Measure your own corpus")
    newcomer.types(f"{first} --layers 2/3")
    (layers,) = re.findall(
        r"give the same 'afn run' command with --layers ([\d,]+): only layer 0 is then measured",
        newcomer.types(show),
    )
    newcomer.types(f"{first} --layers {layers}")
    shown = newcomer.types(show)
    assert "(control)" in shown and "was not recorded" not in shown


@pytest.mark.ray
def test_every_other_command_runs_in_order(
    workplace: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Run them in this process, for most of them take less time than to load torch.

    Benchmarks, jobs and ``afn doctor`` are run by their own tests; here their flags are parsed.
    """
    commands = [line for block in fenced(TEXT, "sh")[2:] for line in block.splitlines() if line]
    assert len(commands) > 8
    monkeypatch.chdir(workplace)
    for command in commands:
        assert command.startswith(
            ("afn ", "python jobs/", 'python -m pytest -m "chaos', "python tests/chaos/")
        ), command
        program, *words = shlex.split(command)
        if words[0] == "jobs/benchmark.py":
            bench_commands.parser().parse_args(words[1:])
        if program != "afn" or words[0] in ("doctor", "bench"):
            if program == "afn":
                grammar.parser().parse_args(words)
            continue
        said = Newcomer(capsys).types(command)
        assert said.strip() or "--out" in command, command
    assert (workplace / "beginning.html").exists() and (workplace / "thresholds.parquet").exists()


def test_the_python_of_the_pages_runs(workplace: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    for code in fenced(TEXT, "python"):
        script.write_text(code, "utf-8")
        done = subprocess.run(
            [warm_workers.choose(has_faults=False), script],
            cwd=workplace,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert "share_high" in done.stdout


@pytest.fixture(scope="module")
def baseline(workplace: Path, small_bert: Path) -> str:
    """A run of the same measure over fewer verses."""
    lines = (workplace / "corpus" / "verses.jsonl").read_text("utf-8").splitlines(keepends=True)
    (workplace / "before").mkdir()
    (workplace / "before" / "verses.jsonl").write_text("".join(lines[:100]), "utf-8")
    measure(workplace, "before", "afn-before", small_bert)
    return str(workplace / "afn-before")


@pytest.mark.parametrize("number", range(1, 11))
def test_each_worked_question_has_an_answer(workplace: Path, baseline: str, number: int) -> None:
    (block,) = fenced(TEXT, "sql")
    questions, rest = shell.split_statements(block)
    assert [q.split()[1] for q in questions] == [f"{i}." for i in range(1, 11)] and not rest.strip()
    with afn_ray.open_run(str(workplace / "afn-demo"), baseline=baseline) as run:
        rows = run.sql(questions[number - 1]).to_dicts()
    assert rows
    for name in rows[0]:
        values = [row[name] for row in rows]
        if name.startswith(("share", "layer_", "psi", "ks", "js")):
            assert all(v is None or v >= 0 for v in values) and any(
                v is not None for v in values
            ), name
            assert (
                name == "shared"
                or name.startswith("psi")
                or all(v is None or v <= 1 for v in values)
            ), name
        elif name in ("text", "class", "doc_id"):
            assert all(v and isinstance(v, str) for v in values), name
        elif name.startswith(("n", "max_", "median", "position")) and name != "n_sinks":
            assert all(v >= 0 for v in values) and max(values) > 0, name


def test_flags_and_views_that_the_text_names_exist(workplace: Path) -> None:
    flags = flags_of(*command_parsers().values(), bench_commands.parser())
    prose = re.sub(r"^```.*?^```", "", TEXT, flags=re.M | re.S)
    named = set(re.findall(r"`(--[a-z-]+)", prose))
    named.discard("--fuzz-long")  # of the tests
    assert named and named <= flags, named - flags


def test_the_job_that_the_readme_submits_is_one_of_the_project() -> None:
    (line,) = re.findall(r"^ray job submit .*$", (ROOT / "README.md").read_text("utf-8"), re.M)
    words = shlex.split(line)
    assert words[3:5] == ["--working-dir", "."] and words[words.index("--") + 1] == "python"
    assert (ROOT / words[-2]).is_file() and words[-1].endswith(
        "/run.toml"
    )  # test_jobs submits the like


def test_links_lead_somewhere() -> None:
    """Links in every page of the project: files that exist, and headings that are there."""
    pages = [ROOT / "README.md", *(ROOT / "infra").rglob("*.md"), *(ROOT / ".github").glob("*.md")]
    assert len(pages) > 8
    for page in pages:
        prose = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S)
        for link in re.findall(r"\]\((?!https?:)([^)]+)\)", prose):
            path, _, heading = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), (page, link)
            if heading:
                heads = re.findall(r"^#+ (.*)$", target.read_text("utf-8"), re.M)
                assert heading in [
                    re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in heads
                ], (page, link)
