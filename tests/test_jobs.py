"""The scripts in jobs/, each through the real job API of a cluster with a token: shipped,
installed, stopped.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import ray
import yaml
from packaging.requirements import Requirement
from ray.dashboard.modules.job.cli import job_cli_group

import afn_ray
from afn_ray.cli import audits, grammar
from afn_ray.errors import ConfigError, IncompleteRun, Interrupted
from afn_ray.store import manifest, settings, storage, uris
from conftest import command_parsers, fenced, write_jsonl
from hosts import wait_until

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(f.name for f in (ROOT / "jobs").glob("*.py"))
pytestmark = pytest.mark.ray


class Head:
    """A Ray of one node with the job API, on loopback, whose Python has this one's packages, but
    for afn-ray.
    """

    def __init__(self) -> None:
        self.folder = Path(
            tempfile.mkdtemp(prefix="afn-", dir="/tmp")
        )  # the paths of sockets are short
        self._mark = secrets.token_hex(8)
        venv.create(self.folder / "image", symlinks=True)
        (self.packages,) = (self.folder / "image" / "lib").glob("python*/site-packages")
        ours = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
        (self.packages / "image.pth").write_text(
            "\n".join(ours)
        )  # not what hooks into imports there: afn-ray is one
        inherited = {
            k: v
            for k, v in os.environ.items()
            if k not in ("PYTHONPATH", "RAY_ADDRESS", "VIRTUAL_ENV")
        }
        assert inherited["RAY_AUTH_MODE"] == "token" and inherited["RAY_AUTH_TOKEN"]
        dashboard, client = _free_ports(2)
        self.url = f"http://127.0.0.1:{dashboard}"
        self._environment = inherited | {
            "PATH": f"{self.folder / 'image' / 'bin'}:{inherited['PATH']}",
            "AFN_TEST_MARK": self._mark,
            "RAY_API_SERVER_ADDRESS": self.url,
        }
        with (self.folder / "out").open("w") as out:
            self._process = subprocess.Popen(
                [
                    *self._ray,
                    "start",
                    "--head",
                    "--block",
                    "--node-ip-address=127.0.0.1",
                    "--port=0",
                    "--num-cpus=2",
                    "--dashboard-host=127.0.0.1",
                    f"--dashboard-port={dashboard}",
                    "--dashboard-agent-listen-port=0",
                    f"--ray-client-server-port={client}",
                    "--min-worker-port=0",
                    "--max-worker-port=0",
                    f"--object-store-memory={80 << 20}",
                    f"--temp-dir={self.folder / 'ray'}",
                    "--disable-usage-stats",
                ],
                env=self._environment,
                stdout=out,
                stderr=out,
                start_new_session=True,
                cwd=self.folder,
            )
        try:
            said = (self.folder / "out").read_text
            wait_until("Ray is up", lambda: "Ray runtime started" in said(), self._process, said)
            from ray.job_submission import JobSubmissionClient

            self.client = JobSubmissionClient(self.url)
        except BaseException:
            self.close()
            raise

    @property
    def _ray(self) -> list[str]:
        return [str(self.folder / "image" / "bin" / "python"), "-m", "ray.scripts.scripts"]

    @property
    def shipped(self) -> list[Path]:
        """Folders that jobs came with, as the node has them."""
        return sorted(
            self.folder.glob(
                "ray/session_2*/runtime_resources/working_dir_files/_ray_pkg_*[0-9a-f]"
            )
        )

    def ray(self, *words: str) -> subprocess.CompletedProcess[str]:
        """``ray job`` as a user gives it in the repository's folder."""
        return subprocess.run(
            [*self._ray, "job", *words],
            env=self._environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )

    def wait(self, name: str) -> tuple[str, int | None, str]:
        """End of job ``name``: its status, the exit code of its script, and its logs."""
        wait_until(
            f"job {name} has ended",
            lambda: self.client.get_job_status(name).is_terminal(),
            said=lambda: self.client.get_job_logs(name),
        )
        info = self.client.get_job_info(name)
        return info.status.value, info.driver_exit_code, self.client.get_job_logs(name)

    def running(self) -> list[str]:
        """Command lines of the processes of this Ray and its jobs."""
        return [
            Path("/proc", str(pid), "cmdline").read_text().replace("\0", " ")
            for pid in self._pids()
        ]

    def _pids(self) -> Iterator[int]:
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"AFN_TEST_MARK={self._mark}".encode() in (entry / "environ").read_bytes().split(
                    b"\0"
                ):
                    yield int(entry.name)

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(30)
        while pids := list(self._pids()):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        shutil.rmtree(self.folder, ignore_errors=True)


def _free_ports(n: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@pytest.fixture(scope="module")
def head(s3_server: str) -> Iterator[Head]:
    head = Head()
    yield head
    head.close()


@pytest.fixture(scope="module")
def bucket(
    s3_server: str, tmp_path_factory: pytest.TempPathFactory, verses: list[str], tiny_bert: Path
) -> str:
    """A bucket with two corpora, a config for each, and a policy that the second one breaks."""
    uri = f"s3://{secrets.token_hex(8)}"
    uris.open_filesystem(uri)[0].mkdir(uri)
    files = {"policy.toml": "empty_documents = 0\n"}
    for name, texts in {"run": verses[:5000], "few": [*verses[:100], ""]}.items():
        corpus = write_jsonl(
            tmp_path_factory.mktemp(name) / "c.jsonl", [{"text": t} for t in texts]
        )
        storage.upload(corpus, f"{uri}/texts/{name}/c.jsonl")
        files[f"{name}.toml"] = (
            f'corpus = "{uri}/texts/{name}"\nmodel = "{tiny_bert}"\nstore = '
            f'"{uri}/{name}"\nlayers = "0,2"\n'
            'dtype = "float32"\nshard_bytes = 16000\nscreen = 0\n'
        )
    for name, text in files.items():
        storage.write_once(f"{uri}/{name}", text.encode())
    return uri


def commits(store: str) -> list[str]:
    """URIs of the commits in ``store``."""
    return [f.uri for f in storage.list_below(f"{store}/shards") if f.uri.endswith("/commit.json")]


def test_a_scan_is_stopped_and_the_same_submission_resumes_it(head: Head, bucket: str) -> None:
    """Shipped to a node whose own afn-ray cannot be imported."""
    (head.packages / "afn_ray.py").write_text("raise ImportError('of the image')")
    script = ["python", "jobs/activation_scan.py", f"{bucket}/run.toml", "--workers=1"]
    environment = [
        "--runtime-env",
        "jobs/runtime-env.yaml",
    ]  # of which nothing is lacking: it needs no index
    submitted = head.ray(
        "submit", "--no-wait", "--submission-id=scan-1", *environment, "--", *script
    )
    assert submitted.returncode == 0, submitted.stderr
    wait_until(
        "2 shards are committed, or the job has ended",
        lambda: (
            len(commits(f"{bucket}/run")) >= 2 or head.client.get_job_status("scan-1").is_terminal()
        ),
    )
    assert head.client.stop_job("scan-1")
    status, _, _ = head.wait("scan-1")
    said = head.ray("logs", "scan-1").stdout
    assert (
        status == "STOPPED"
        and "afn: stopped; the same command resumes" in said
        and "Traceback" not in said
    )
    assert not any("activation_scan" in words or "_Worker" in words for words in head.running())
    assert (
        len(list(head.folder.glob("ray/session_2*/runtime_resources/pip/*/virtualenv/bin/python")))
        == 1
    )
    before = {uri: storage.read_bytes(uri) for uri in commits(f"{bucket}/run")}

    again = head.ray("submit", "--submission-id=scan-2", "--working-dir", ".", "--", *script)
    assert again.returncode == 0 and "succeeded" in again.stdout, again.stdout + again.stderr
    status, code, logs = head.wait("scan-2")
    assert (status, code) == ("SUCCEEDED", 0)
    after = commits(f"{bucket}/run")
    assert 2 <= len(before) < len(after)
    assert before == {uri: storage.read_bytes(uri) for uri in before}  # each names its attempt
    with afn_ray.open_run(f"{bucket}/run") as run:
        counts = run.info["counts"]
    assert (counts["shards_reused"], counts["shards"]) == (len(before), len(after)) and counts[
        "documents"
    ] == 5000
    planned = f"{len(after)} shards: {len(before)} in the store, {len(after) - len(before)} to do"
    for line in (planned, "starting workers on cpu, on Ray", "run s3://"):
        assert line in logs
    assert "\r" not in logs and "\x1b" not in logs  # a log is lines


def test_what_is_shipped_is_the_code_alone(head: Head) -> None:
    assert head.shipped
    for folder in head.shipped:  # one, unless something was edited meanwhile
        # Modules are compiled there.
        files = [f for f in folder.rglob("*") if f.is_file() and f.suffix != ".pyc"]
        top = {f.relative_to(folder).parts[0] for f in files}
        assert top >= {"afn_ray", "jobs", "constraints.txt"}
        assert not top & {".git", ".github", ".venv", ".venv-dev", "tests", ".ci", ".mypy_cache"}
        assert sum(f.stat().st_size for f in files) < 4 << 20


def test_the_runtime_environment_has_every_package_at_its_pinned_version() -> None:
    asked = yaml.safe_load((ROOT / "jobs" / "runtime-env.yaml").read_text("utf-8"))
    constraints, *names = asked["pip"]["packages"]
    assert constraints == "-c ${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}/constraints.txt"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["s3"]]
    assert {normal(n) for n in names} == {normal(Requirement(r).name) for r in needed} - {"ray"}
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pinned = {normal(name): pin for name, at, pin in (line.partition("==") for line in lines) if at}
    assert {normal(n) for n in names} <= pinned.keys()
    assert ray.runtime_env.RuntimeEnv(
        **(asked | {"working_dir": "s3://of-no-matter/here.zip"})
    ).to_dict()["env_vars"]


PAGE = (ROOT / "infra" / "guide" / "jobs.md").read_text("utf-8")


def test_what_the_page_says_is_so(tmp_path: Path) -> None:
    """Its commands parse and name what is there; its config is one; its flags and exit codes
    exist.
    """
    lines = [line for block in fenced(PAGE, "sh") for line in block.splitlines()]
    seen = set()
    for line in lines:
        program, group, name, *words = shlex.split(line)
        assert (program, group) == ("ray", "job")
        parsed = job_cli_group.commands[name].make_context(name, words).params
        if name == "submit":
            seen.add(Path(check_entrypoint(parsed["entrypoint"])).name)
            assert not (file := parsed["runtime_env"]) or (ROOT / file).is_file()
    for row in re.findall(r"^\| `jobs/(\S+) .*$", PAGE, re.M):
        seen.add(row)
    assert seen == set(SCRIPTS)
    (text,) = fenced(PAGE, "toml")
    (tmp_path / "run.toml").write_text(text)
    assert settings.config_from({}, tmp_path / "run.toml").workers == 100
    given = {
        flag
        for command in command_parsers().values()
        for action in command._actions
        for flag in action.option_strings
    }
    of_ray = {
        flag
        for command in job_cli_group.commands.values()
        for p in command.params
        for flag in p.opts
    }
    assert set(re.findall(r"`(--[a-z-]+)", PAGE)) <= given | of_ray
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", PAGE, re.M)} == {
        0,
        IncompleteRun.exit_code,
        ConfigError.exit_code,
        audits.VERDICTS["not judged"],
        Interrupted.exit_code,
    }


MEANT = {
    "activation_scan": ["run", "--config"],
    "reduce": ["run", "--reduce-only", "--config"],
    "nightly_audit": ["audit"],
    "benchmark": ["bench"],
}


def check_entrypoint(words: Sequence[str]) -> str:
    """The script that an entry point starts, once it exists and its command takes these flags."""
    python, script, *flags = words
    assert python == "python" and (ROOT / script.removeprefix("/opt/afn-ray/")).is_file()
    grammar.parser().parse_args([*MEANT[Path(script).stem], *flags])
    return script


def normal(name: str) -> str:
    return name.lower().replace("_", "-")


ENDS = {
    # The reduce of the same shards by another rule, and by a config that asks for other shards.
    "reduce": ("reduce.py {bucket}/run.toml --sink-factor=5", 0, "is complete: "),
    "lacking": ("reduce.py {bucket}/run.toml --shard-bytes=30000", 1,
                "{bucket}/run lacks "),
    "audit": ("nightly_audit.py {bucket}/few.toml --policy={bucket}/policy.toml --no-report", 1,
              "BROKEN     empty"),
    "bench": ("benchmark.py monitor --model={model} --texts=1", 0, "overhead"),
    "no-config": ("activation_scan.py {bucket}/none.toml", 2,
                  "config file cannot be read: reading {bucket}/none.toml"),
}  # fmt: skip


def test_every_script_says_how_it_ended(head: Head, bucket: str, tiny_bert: Path) -> None:
    """The failure shows in its exit code, the job's status, and in its logs, which the status of a
    failed job quotes.

    Nothing is shipped: the image has the package.
    """
    (head.packages / "afn_ray.py").unlink()
    shutil.copytree(
        ROOT / "afn_ray", head.packages / "afn_ray", ignore=shutil.ignore_patterns("__pycache__")
    )
    assert {words.split()[0] for words, _, _ in ENDS.values()} == set(SCRIPTS)
    places = {"bucket": bucket, "model": tiny_bert}
    for name, (words, _, _) in ENDS.items():  # beside each other
        head.client.submit_job(
            entrypoint=f"python {ROOT}/jobs/{words.format(**places)}", submission_id=name
        )
    for name, (_, code, says) in ENDS.items():
        status, left_with, logs = head.wait(name)
        assert (status, left_with) == ("FAILED" if code else "SUCCEEDED", code), logs
        assert says.format(**places) in logs and "Traceback" not in logs, logs
        message = head.client.get_job_info(name).message
        assert not code or (f"exit code {code}" in message and says.format(**places) in message)
    assert "starting workers on cpu, on Ray" in head.client.get_job_logs("audit")
    with afn_ray.open_run(f"{bucket}/run") as run:
        counts = run.info["counts"]
        assert (
            run.info["config"]["sink_factor"] == 5 and counts["shards_reused"] == counts["shards"]
        )
    assert "starting workers" not in head.client.get_job_logs("reduce")


def test_a_store_below_the_working_directory_is_not_shipped_whatever_its_name(
    tmp_path: Path,
) -> None:
    from ray._private.runtime_env import packaging

    store = tmp_path / "any" / "name"
    manifest.keep_from_jobs(str(store))
    manifest.keep_from_jobs(str(store))  # a second run finds it there
    (store / "runs").mkdir()
    (store / "runs" / "tokens.parquet").write_bytes(b"x")
    (tmp_path / "run.toml").write_text("")
    shipped: list[str] = []
    packaging._dir_travel(
        tmp_path,
        [],
        lambda path: shipped.append(path.relative_to(tmp_path).as_posix()),
        include_gitignore=False,
    )
    assert "run.toml" in shipped and not [name for name in shipped if name.startswith("any/name/")]


def test_stores_that_the_pages_make_here_are_not_shipped_with_a_job() -> None:
    from ray._private.thirdparty.pathspec import PathSpec

    ignored = PathSpec.from_lines(
        "gitwildmatch", (ROOT / ".rayignore").read_text("utf-8").splitlines()
    )
    pages = [ROOT / "README.md", *(ROOT / "infra").rglob("*.md")]
    text = "\n".join(page.read_text("utf-8") for page in pages)
    before = r"(?:--store[ =]|^store = \"|afn (?:show|sql|report|explain|status|verify|gc) )"
    names = set(re.findall(before + r"([\w.-]+)", text, re.M))
    stores = {
        name
        for name in names
        if not name.startswith("-") and name not in ("DIR", "s3", "RUN", "STORE")
    }
    assert {"afn-demo", "results", "results-0", "results-1"} <= stores
    assert not [
        name for name in stores if not ignored.match_file(f"{name}/shards/m/s/a-tokens.parquet")
    ]
    written = set(re.findall(r"(?:--out|--html)[ =]([\w.-]+\.\w+)", text))
    assert not [name for name in written if not ignored.match_file(name)]
    assert not ignored.match_file("afn_ray/store.py") and not ignored.match_file(
        "jobs/activation_scan.py"
    )
