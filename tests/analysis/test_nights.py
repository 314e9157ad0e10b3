"""Nights of a dated corpus: series, windows, partitions and baselines, by command and real job."""

from __future__ import annotations

import io
import json
import signal
from contextlib import redirect_stderr, redirect_stdout
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any

import pytest

import afn_ray
from afn_ray.analysis import baselines, verify
from afn_ray.analysis.limits import Limit
from afn_ray.analysis.nights import choose_partition
from afn_ray.analysis.policy import Policy, read_policy
from afn_ray.cli import audits, commands
from afn_ray.errors import ConfigError
from afn_ray.runs import events
from afn_ray.store import manifest, series_runs, storage, uris
from afn_ray.store.manifest import RunFolder
from afn_ray.store.settings import config_from
from nights import complete, real_job

ROOT = Path(__file__).parents[2]
NEW = 'window = "new"\n'
LIMITS = "psi = 9\nempty_documents = 0\nmax_new_sources = 0\n[source]\nks = 1\nmin_tokens = 1\n"


DRIFTING = "g17"


class Dated:
    """A corpus in dated folders, and the job that audits its nights."""

    def __init__(self, folder: Path, place: str, model: Path, verses: list[str]) -> None:
        self.folder, self.verses = folder, verses
        self.texts, self.store = f"{place}/texts", f"{place}/store"
        self.config, self.policy = folder / "run.toml", folder / "policy.toml"
        self.config.write_text(
            f'corpus = "{self.texts}/dt=*/"\nmodel = "{model}"\nstore = "{self.store}"\n'
            'layers = "2"\ndtype = "float32"\nexecutor = "inline"\nbatch_tokens = 256\n'
        )
        self.policy.write_text(NEW + LIMITS)

    def put(
        self, day: int, begin: int, end: int, *more: str, texts: str = "", drifts: bool = False
    ) -> None:
        """Verses ``begin`` to ``end`` and ``more`` texts as the partition of November ``day``.

        They are in 30 groups; with ``drifts`` the group ``DRIFTING`` repeats one word.
        """
        rows = []
        for at, text in enumerate((*self.verses[begin:end], *more)):
            lang = f"g{at % 30:02d}"
            if drifts and lang == DRIFTING:
                text = " ".join(["begat"] * len(text.split()))
            rows.append({"text": text, "lang": lang})
        lines = map(json.dumps, rows)
        content = "".join(f"{line}\n" for line in lines).encode()
        place = texts or self.texts
        storage.write_over(f"{place}/dt=2026-11-{day:02d}/part-0.jsonl", content)

    def words(self, *flags: str) -> list[str]:
        out = f"--out={self.folder}/out"
        return [f"--policy={self.policy}", out, "--no-report", "--quiet", *flags]

    def night(self, *flags: str, dies_at: str = "") -> tuple[int, str, str]:
        """Exit code, output and errors of the real job, which may be killed at a step."""
        return real_job(self.folder, str(self.config), *self.words(*flags), dies_at=dies_at)

    def command(self, *flags: str) -> tuple[int, str, str]:
        """The same of ``afn audit``, which the job runs, in this process."""
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as left:
            commands.main(["audit", str(self.config), *self.words(*flags)])
        assert isinstance(left.value.code, int)
        return left.value.code, out.getvalue(), err.getvalue()

    def here(self, *flags: str) -> tuple[int, str, str | None]:
        """Exit code, state and id of the baseline of ``command``."""
        code, *_ = self.command(*flags)
        before = self.said["baseline"]
        return code, self.said["state"], before and before["id"]

    @property
    def written(self) -> bytes:
        return (self.folder / "out" / "audit.json").read_bytes()

    @property
    def said(self) -> dict[str, Any]:
        return dict(json.loads(self.written))

    def audited(self, *flags: str, job: bool = False) -> tuple[int, str, str, str | None]:
        """Exit code, state, partition and the partition that a night was held against.

        ``job``: by the real job, as ``night``, not by ``command``.
        """
        code, out, err = self.night(*flags) if job else self.command(*flags)
        said = self.said
        assert code == {"held": 0, "broken": 1, "not judged": 3}[said["state"]], out + err
        last = out.splitlines()[-1]
        assert f"partition {said['partition']}, run {said['run']['uri']}" in last
        before = said["baseline"] and said["baseline"]["corpus"][0].rpartition("dt=")[2]
        return code, said["state"], said["partition"][-2:], before and before[-2:]


@pytest.fixture(params=["local", "s3"])
def dated(
    request: pytest.FixtureRequest, tmp_path: Path, tiny_bert: Path, verses: list[str]
) -> Dated:
    place = str(tmp_path / "place")
    if request.param == "s3":
        place = request.getfixturevalue("object_store")
    return Dated(tmp_path, place, tiny_bert, verses)


STEPS = (
    "afn_ray.store.plans:plan_table",
    "afn_ray.store.shard_files:publish",
    "afn_ray.reduce.losses:files_table",
    "afn_ray.store.manifest:finish_run",
    "afn_ray.analysis.audit:write_json",
    "afn_ray.store.verdicts:write_verdict",
    "afn_ray.store.manifest:mark_audited",
)
"""Steps of a night, in order; each is called by this name, so it can be replaced."""
OF_GROUPS = f"{LIMITS.replace('psi = 9', 'psi = 0.1')}[group.lang]\npsi = 0.8\nmin_tokens = 50\n"
"""Limits on the whole, each source and each group;
all hold for verses of one book after another.
"""


def test_a_fortnight_of_a_dated_corpus(dated: Dated) -> None:
    """On a disk and in a bucket: every state and exit code, and kills of the real job.

    Each night is held against the one before that is neither broken nor empty. The real job follows
    the command, and the reverse, so that a night has nothing from the process of another.
    """
    dated.config.write_text(f'{dated.config.read_text()}keep_columns = "lang"\ngroup_by = "lang"\n')
    dated.policy.write_text(NEW + OF_GROUPS)
    dated.put(1, 0, 120)
    assert dated.audited("--frozen") == (3, "not judged", "01", None)
    first = dated.said
    assert any("--frozen found no earlier night" in note for note in first["notes"])
    assert first["window"] == "new" and first["run"]["corpus"] == [
        f"{uris.absolute(dated.texts)}/dt=2026-11-01"
    ]
    assert first["series"] == f"store: {uris.absolute(dated.texts)}/dt=<date>"
    assert first["reason"] == (
        f'psi, max_new_sources, source.ks, group.psi: the series "{first["series"]}" has no '
        "earlier run with this measure"
    )
    assert dated.audited("--first-night", job=True) == (0, "held", "01", None)
    assert "group.psi: first night: " in dated.said["reason"]
    assert dated.said["run"] == first["run"]

    dated.put(2, 120, 240)
    assert dated.audited() == (0, "held", "02", "01")  # no limit on sources is broken
    source = f"{uris.absolute(dated.texts)}/dt=<date>/part-0.jsonl"
    assert {r["key"]: r["where"] for r in dated.said["rules"]}["source.ks"] == source

    dated.put(3, 240, 360, "")
    assert dated.audited() == (1, "broken", "03", "02")
    broken = dated.written
    code, out, _ = dated.night()  # run twice
    assert code == 1 and dated.written == broken and "still broken since" in out

    # The night of the 4th: its partition is late.
    code, _, err = dated.night()
    assert code == 1 and dated.written == broken
    assert "partition 2026-11-03 was audited before, and no newer one is there" in err
    code, _, err = dated.night("--partition=2026-11-04")
    assert code == 2 and "there is no partition 2026-11-04" in err and dated.written == broken
    dated.put(5, 480, 600)
    assert dated.audited() == (0, "held", "05", "02")  # not against the broken one
    dated.put(4, 360, 480)
    assert dated.audited("--partition=2026-11-04") == (0, "held", "04", "02")

    # The 5th is replaced: it is not held against what it was, and the 6th against what it is.
    old = dated.said["run"]["id"]
    dated.put(5, 600, 720)
    assert dated.audited() == (0, "held", "05", "04")
    new = dated.said["run"]["id"]
    dated.put(6, 720, 840)
    assert dated.audited() == (0, "held", "06", "05")
    assert dated.said["baseline"]["id"] == new != old

    # The 7th is empty.
    sixth = dated.written
    dated.put(7, 0, 0)
    code, _, err = dated.night()
    assert code == 2 and "the corpus has no token to measure" in err and dated.written == sixth
    dated.put(8, 840, 960)
    assert dated.audited() == (0, "held", "08", "06")

    # One of 30 groups drifts in the night of the 9th, and stays so: somebody accepts it.
    dated.put(9, 960, 1080, drifts=True)
    assert dated.audited() == (1, "broken", "09", "08")
    said = dated.said
    rules = {rule["key"]: rule for rule in said["rules"]}
    assert [key for key, rule in rules.items() if rule["state"] == "broken"] == ["group.psi"]
    assert rules["group.psi"]["where"] == DRIFTING
    named = [one["name"] for one in rules["group.psi"]["worst"] if one["kind"] == "group"]
    assert named == [DRIFTING] and rules["group.psi"]["n_beyond"] == 1
    assert rules["group.psi"]["n_within"] > 20
    dated.put(10, 1080, 1200, drifts=True)
    assert dated.audited() == (1, "broken", "10", "08")
    accept = ["audit", f"--accept={dated.said['run']['uri']}", "--why=the new source of it"]
    with pytest.raises(SystemExit) as left:
        commands.main(accept)
    assert not left.value.code
    dated.put(11, 1200, 1320, drifts=True)
    assert dated.audited() == (0, "held", "11", "10")

    # Another series of the same store, whose nights are not those of this one.
    assert dated.audited("--series=mine") == (3, "not judged", "11", None)
    mine = dated.said["run"]["id"]

    # Nights that are killed at one step or more, and given again each time.
    for day, steps in ((12, STEPS[:3]), (13, STEPS[3:5]), (14, STEPS[5:])):
        dated.put(day, 120 * (day - 1), 120 * day, drifts=True)
        earlier = dated.written
        for step in steps:
            code, out, err = dated.night(dies_at=step)
            assert code == 128 + signal.SIGKILL, (step, out, err)
            assert (dated.written != earlier) == (step in STEPS[5:]), step
            (dated.folder / "out" / "audit.json").write_bytes(earlier)
        assert dated.audited(job=True) == (0, "held", f"{day}", f"{day - 1}")
    assert dated.audited("--series=mine") == (0, "held", "14", "11")
    assert dated.said["baseline"]["id"] == mine
    found = verify.verify_store(dated.store)
    assert not found.findings


def test_two_series_of_one_store_do_not_meet(dated: Dated) -> None:
    """Neither two corpora, nor one corpus under two names."""
    dated.put(1, 0, 30)
    assert dated.here("--first-night") == (0, "held", None)
    ours = dated.said["run"]["id"]
    assert dated.here("--series=mine") == (3, "not judged", None)
    mine = dated.said
    assert mine["series"] == "mine" and mine["run"]["id"] != ours
    assert mine["counts"]["shards_reused"] == mine["counts"]["shards"]
    assert manifest.find_run(mine["run"]["uri"]).info["config"]["series"] == "mine"

    others = dated.texts.replace("texts", "others")
    dated.put(1, 300, 330, texts=others)
    text = dated.config.read_text()
    dated.config.write_text(text.replace(dated.texts, others))
    assert dated.here() == (3, "not judged", None)
    dated.config.write_text(text)

    dated.put(2, 30, 60)
    assert dated.here() == (0, "held", ours)
    dated.config.write_text(f'{text}series = "mine"\n')
    assert dated.here() == (0, "held", mine["run"]["id"])


def test_one_folder_after_another_in_the_config_is_one_series(dated: Dated) -> None:
    """The window covers the whole corpus, which here is what the config names."""
    dated.policy.write_text("ks = 0.0001\n")
    text = dated.config.read_text()
    found = []
    for day in (1, 2):
        dated.put(day, 300 * day, 300 * day + 60)
        dated.config.write_text(text.replace("dt=*", f"dt=2026-11-{day:02d}"))
        found.append((*dated.here(), dated.said["run"]["id"]))
    assert found[0][:3] == (3, "not judged", None)
    assert found[1][:3] == (1, "broken", found[0][3])
    assert dated.said["partition"] is None


# --- baselines of partitions


TONIGHT = datetime(2026, 11, 22, 3, tzinfo=UTC)


class Runs:
    """Complete runs of the partitions of one series, in the order of their calls."""

    def __init__(self, store: Path) -> None:
        self.store, self.num_runs = store, 0

    def add(self, day: int, audited: bool = True, **changes: Any) -> RunFolder:
        self.num_runs += 1
        began = TONIGHT + timedelta(hours=self.num_runs)
        corpus = changes.pop("corpus", [f"/t/dt=2026-11-{day:02d}"])
        run = complete(self.store, began, corpus=corpus, ask=f"{self.num_runs:012x}", **changes)
        if audited:
            manifest.mark_audited(run)
        return run

    def found(self, run: RunFolder, kind: str) -> RunFolder | None:
        return baselines.find(run, kind, "new").run


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path / "store")


def test_the_baseline_of_a_partition_is_the_one_before_whenever_it_was_measured(
    runs: Runs,
) -> None:
    first, third = runs.add(1), runs.add(3)
    late = runs.add(2)
    fourth = runs.add(4)
    assert runs.found(late, "previous") == first
    assert runs.found(third, "previous") == late
    assert runs.found(fourth, "previous") == third
    assert runs.found(first, "previous") is None
    again = runs.add(3)
    assert runs.found(again, "previous") == late and runs.found(fourth, "previous") == again
    runs.add(3, audited=False)  # its audit was killed before its verdict
    assert runs.found(fourth, "previous") == again
    unheard = runs.add(5, audited=False)
    sixth = runs.add(6)
    assert runs.found(sixth, "previous") == fourth
    assert runs.found(runs.add(12), "weekday") == unheard
    for other in ({"measure": "other"}, {"corpus": ["/u/dt=2026-11-06"]}, {"done": False}):
        runs.add(6, **other)
    assert runs.found(runs.add(7), "previous") == sixth


def test_the_weekday_before_is_exactly_seven_days_older(runs: Runs) -> None:
    second, third = runs.add(2), runs.add(3)
    assert runs.found(runs.add(10), "weekday") == third
    assert runs.found(runs.add(9), "weekday") == second
    lacking = baselines.find(runs.add(11), "weekday", "new")
    assert lacking.run is None
    assert lacking.lacking == "the series has no run of 2026-11-04, the same weekday a week before"


def test_a_median_is_of_the_last_nights_and_needs_them_all(runs: Runs) -> None:
    nights = [runs.add(day) for day in (1, 4, 2, 3)]
    by_day = [nights[1], nights[3], nights[2], nights[0]]
    tonight = runs.add(5)
    found = baselines.find(tonight, "median:3", "new")
    assert found.run == by_day[0] and list(found.median_of) == by_day[:3]
    short = baselines.find(tonight, "median:5", "new")
    assert (short.run, short.median_of, short.is_median) == (by_day[0], (), True)
    assert short.lacking == "the median needs 5 earlier nights; there are 4"


def test_a_first_audit_is_held_against_the_newest_partition_of_plain_runs(tmp_path: Path) -> None:
    """Even where tonight's partition was measured before its audit."""
    runs = Runs(tmp_path / "store")
    for day in (1, 3, 2, 4):
        runs.add(day, audited=False)
    config = config_from(
        {"store": str(tmp_path / "store"), "corpus": ["/t/dt=2026-11-04"], "model": "x"}
    )
    for name in manifest.run_names(str(tmp_path / "store")):
        assert not manifest.is_audited(manifest.open_folder(str(tmp_path / "store"), name))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "OF_BASE", ())
        baselines.begin_nights(config, "new")
    audited = [
        series_runs.day_of(run)
        for run in series_runs.complete_runs(str(tmp_path / "store"))
        if manifest.is_audited(run)
    ]
    assert audited == [date(2026, 11, 2)]  # the newest run, though not the newest day


# --- medians


def test_scalar_figures_are_held_against_medians_of_the_recorded_rows(
    tmp_path: Path, tiny_bert: Path, verses: list[str]
) -> None:
    """Values of limits equal those that a few lines find in the rows of all nights."""
    dated = Dated(tmp_path, str(tmp_path), tiny_bert, verses)
    keys = (
        "q1_shift",
        "q2_shift",
        "q3_shift",
        "share_high_shift",
        "class_share_shift",
        "class_high_shift",
        "max_tokens_ratio",
        "ks",
    )
    limits = "".join(f"{key} = 1\n" for key in keys[:-1])
    dated.policy.write_text(f'{NEW}baseline = "median:3"\nunjudged = "fail"\n{limits}ks = 1\n')
    policy, config = read_policy(dated.policy), config_from({}, dated.config)
    found = []
    for day, (begin, end) in enumerate(((0, 40), (600, 690), (900, 950), (300, 380)), 1):
        dated.put(day, begin, end)
        found.append(afn_ray.run_audit(config, policy, afn_ray.Night(frozen=True)))
    assert [one.state for one in found[:3]] == ["broken"] * 3
    third = {rule.key: rule for rule in found[2].rules}
    assert third["ks"].passed is True and third["q1_shift"].passed is None
    assert third["q1_shift"].reason == "the median needs 3 earlier nights; there are 2"
    assert found[3].baseline is not None and found[3].baseline.id == found[2].run.id

    *earlier, tonight = [figures(one.run.uri) for one in found]
    expected: dict[str, float] = {}
    for name in ("q1", "q2", "q3"):
        expected[f"{name}_shift"] = abs(tonight[name] / median(n[name] for n in earlier) - 1)
    expected["max_tokens_ratio"] = tonight["n"] / median(n["n"] for n in earlier)
    expected["share_high_shift"] = abs(tonight["high"] - median(n["high"] for n in earlier))
    for kind in ("share", "high"):
        shifts = [
            abs(tonight[f"{kind} {name}"] - median(n[f"{kind} {name}"] for n in earlier))
            for name in ("content", "function", "punctuation", "piece")
        ]
        expected[f"class_{kind}_shift"] = max(shifts)
    values = {rule.key: rule.value for rule in found[3].rules}
    for key, value in expected.items():
        assert values[key] == pytest.approx(value, rel=1e-6), key
    of_previous = afn_ray.compare_runs(found[2].run, found[3].run).drift.to_pylist()
    assert values["ks"] == next(
        r["ks"] for r in of_previous if (r["layer"], r["source"]) == (2, None)
    )


def figures(run_uri: str) -> dict[str, float]:
    """Quartiles, numbers and shares of a run's tokens at layer 2, from its rows."""
    with afn_ray.open_run(run_uri) as run:
        rows = run.sql(
            "SELECT strength_2, high_2, class FROM tokens JOIN vocabulary USING (token_id) "
            "WHERE layer = 2 AND class <> 'special'"
        ).fetchall()
    strengths = sorted(row[0] for row in rows)
    n = len(rows)
    quartiles = {f"q{i}": strengths[-(-i * n // 4) - 1] for i in (1, 2, 3)}
    found = {"n": float(n), "high": sum(row[1] for row in rows) / n, **quartiles}
    for name in {row[2] for row in rows}:
        high = [row[1] for row in rows if row[2] == name]
        found |= {f"share {name}": len(high) / n, f"high {name}": sum(high) / len(high)}
    return found


# --- what is said


def test_a_part_of_a_newer_partition_is_warned_of(
    tmp_path: Path, tiny_bert: Path, verses: list[str]
) -> None:
    dated = Dated(tmp_path, str(tmp_path), tiny_bert, verses)
    others = f"{tmp_path}/others"
    config = dated.config.read_text().replace(
        f'"{dated.texts}', f'["{others}/dt=*/", "{dated.texts}'
    )
    dated.config.write_text(config.replace('dt=*/"\n', 'dt=*/"]\n'))
    dated.put(1, 0, 20)
    dated.put(1, 20, 40, texts=others)
    dated.put(2, 40, 60)
    said: list[events.Event] = []
    found = afn_ray.run_audit(
        config_from({}, dated.config),
        read_policy(dated.policy),
        afn_ray.Night(first_night=True),
        on_event=said.append,
    )
    assert found.state == "held" and found.partition == date(2026, 11, 1)
    assert isinstance(said[0], events.Warned)
    assert "a part of 2026-11-02 is there, but not in every glob of the corpus" in said[0].notice


def test_an_empty_partition_is_a_mistake_and_not_the_latest() -> None:
    """The schedule's shell gives an empty text for a variable that is not set."""
    config = config_from({"store": "s", "corpus": ["/t/dt=2026-11-04"], "model": "x"})
    policy = Policy((Limit("psi", 1),), window="new")
    with pytest.raises(ConfigError, match="partition is ''; expected latest, or a date"):
        choose_partition(config, policy, afn_ray.Night(partition=""))


def test_the_guide_has_every_state_with_its_exit_code() -> None:
    page = (ROOT / "infra" / "guide" / "audit.md").read_text("utf-8")
    for state, code in audits.VERDICTS.items():
        assert f"\n| {code} | `{state}` |" in page
