"""Provenance: every shard's software and device reach run.json and the facts of a run, as does the
command that repeats it.
"""

from __future__ import annotations

import itertools
import json
import shlex
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import afn_ray
from afn_ray.cli import commands, grammar
from afn_ray.config import RunConfig
from afn_ray.errors import StoreError
from afn_ray.provenance import PACKAGES, software
from afn_ray.run_info import RunInfo
from afn_ray.runs import worker
from afn_ray.show import provenance
from afn_ray.show.summary import summarise, to_json
from afn_ray.store import manifest
from afn_ray.store.settings import config_from
from conftest import config_of, edit_checksummed


@pytest.mark.parametrize(
    "changes",
    [{}, {"offsets": False, "layers": "0, 4", "workers": 3, "revision": "$(rm -rf ~); 'x'",
          "trust_remote_code": True},
     {"corpus": ("/data/a b/*.jsonl", "/data/it's <script>"), "sink_factor": 12.5,
      "format": "txt"}],
)  # fmt: skip
def test_the_command_gives_the_config_back(changes: dict[str, Any]) -> None:
    config = replace(
        RunConfig(corpus=("/data/x",), model="/models/a b", store="/results"), **changes
    )
    words = shlex.split(provenance.command_line(json.loads(json.dumps(asdict(config)))))
    assert words[:2] == ["afn", "run"]
    given = vars(grammar.parser().parse_args(words[1:]))
    kept = {k: tuple(v) if k == "corpus" else v for k, v in given.items() if k in asdict(config)}
    assert config_from(kept, None) == config


def test_a_command_too_long_for_a_terminal_is_named_instead() -> None:
    config = RunConfig(corpus=("/data/x",) * 500, model="m", store="s")
    assert provenance.shown_command(asdict(config)).startswith("a command of 4,0")


def test_afn_show_names_the_software_and_the_command(
    tiny_bert: Path, corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tiny_bert, corpus, tmp_path / "store", layers="1")
    with afn_ray.run(config) as run:
        info, uri = run.info, run.uri
    (kind,) = info["provenance"]
    assert kind["shards"] == info["counts"]["shards"]
    assert software().items() <= kind["made_by"].items()
    with pytest.raises(SystemExit, match=r"^0$"):
        commands.main(["show", uri])
    lines = capsys.readouterr().out.splitlines()
    shown = "".join(" ".join(lines).split())
    for name in PACKAGES:
        assert f"{name}{version(name)}" in shown
    command = provenance.command_line(info["config"])
    assert command.startswith(f"afn run {' '.join(config.corpus)} --model {config.model}")
    assert len(command) > 80 and command in lines  # one line at any width, to be copied
    assert to_json(summarise(uri))["command"] == command


@pytest.mark.parametrize(
    ("model", "layers", "expected"),
    [
        ("tiny_llama", "0,1.0", "read before the model's final norm"),
        ("tiny_gpt", "1.0", "read before the model's final norm"),
        ("tiny_bert", "1.0", "the model has no final norm"),
        ("tiny_llama", "1", None),  # not the last layer
    ],
)
def test_a_run_of_the_last_layer_says_whether_a_final_norm_is_left_out(
    model: str,
    layers: str,
    expected: str | None,
    corpus: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    config = config_of(request.getfixturevalue(model), corpus, tmp_path / "store", layers=layers)
    with afn_ray.run(config) as run:
        assert dict(provenance.facts(run.info)).get("last layer") == expected


def test_versions_of_all_shards_are_counted_not_those_of_the_first(
    tiny_bert: Path, corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_shard = itertools.cycle([software(), software() | {"pyarrow": "99.0"}, software()])
    monkeypatch.setattr(worker, "software", lambda: next(of_shard))
    config = config_of(tiny_bert, corpus, tmp_path / "store", layers="1", shard_bytes=2000)
    with afn_ray.run(config) as run:
        info, uri = run.info, run.uri
    most, fewest = info["provenance"]
    assert most["shards"] + fewest["shards"] == info["counts"]["shards"] > 2
    assert fewest["made_by"]["pyarrow"] == "99.0" and most["shards"] > fewest["shards"]
    ours, shards = version("pyarrow"), most["shards"]
    named = dict(provenance.facts(info))["software"]
    assert f"pyarrow {ours} ({shards} shards) and 99.0 (" in named
    assert not afn_ray.verify_store(uri).findings

    edit_checksummed(f"{uri}/run.json", lambda edited: edited["provenance"].pop())
    (finding,) = afn_ray.verify_store(uri).findings
    assert "provenance is not that of its shards" in finding.message


def _set_provenance(info: dict[str, Any], value: object) -> None:
    info["provenance"] = value


def test_a_damaged_provenance_is_named(tiny_bert: Path, corpus: str, tmp_path: Path) -> None:
    with afn_ray.run(config_of(tiny_bert, corpus, tmp_path / "store", layers="1")) as run:
        uri = run.uri
    for damage in ([{"shards": -1, "made_by": {}}], [{"shards": 1}], [3], 3):
        edit_checksummed(f"{uri}/run.json", partial(_set_provenance, value=damage))
        with pytest.raises(StoreError, match=r"run.json is damaged: .*(provenance is|'made_by')"):
            manifest.find_run(uri)


def test_a_run_of_an_older_version_shows_what_it_has() -> None:
    older: RunInfo = {"makers": {"cpu": 3}, "model": {"depth": 2}, "layers": [2]}
    assert list(provenance.facts(older)) == []
