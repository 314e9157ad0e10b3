"""The published schemas and the parsers take and refuse the same files."""

from __future__ import annotations

import copy
import json
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from afn_ray.analysis import audit, json_schema, learned
from afn_ray.analysis.audit import Audit
from afn_ray.analysis.baselines import Baseline
from afn_ray.analysis.limits import (
    GROUP_LIMITS,
    PART_LIMITS,
    SOURCE_LIMITS,
    WHOLE_LIMITS,
    Limit,
)
from afn_ray.analysis.policy import OPTIONS, read_policy
from afn_ray.analysis.verdict import Rule
from afn_ray.cli import commands
from afn_ray.config import DEFAULTS, RunConfig
from afn_ray.errors import ConfigError
from afn_ray.option_rules import CHOICES, NEEDS
from afn_ray.reduce.losses import Losses
from afn_ray.store.manifest import RunFolder
from afn_ray.store.settings import config_from
from conftest import fenced
from nights import strictly, validator_of

NEEDED = {"corpus": "a.txt", "model": "m", "store": "s"}
VALUES: list[Any] = [
    "", " ", "x", "a b", "1st", "all", "8", "2/3", "0,4,8", "-5", "0.5,", "strength,shift",
    "neurons",
    "year:int64", "x:y", "x:", "é", "cp1251", "a" * 64, "1%",
    "lang = 'de'", True, False, 0, 1, -1, 7, 8, 15, 16, 48, 49, 257, 1023, 1024,
    5001, 10**12, 0.5, 1.5, -0.5, float("inf"), [], ["a"], [""], [1], ["a", "b"], {"a": 1},
    *(choice for choices in CHOICES.values() for choice in choices),
]  # fmt: skip
ONLY_THE_PARSER_KNOWS = {
    "layers": ["-5"],
    "encoding": [v for v in VALUES if isinstance(v, str) and v not in ("", "cp1251")],
    "where": [v for v in VALUES if isinstance(v, str) and v not in ("", "lang = 'de'")],
    "keep_columns": [
        "1%",
        "lang = 'de'",
        " ",
        "a b",
        "1st",
        "8",
        "2/3",
        "0,4,8",
        "-5",
        "0.5,",
        "x:y",
        "a" * 64,
        "file",
        "text",
    ],
}
"""Values that a schema of one key cannot refuse: names that are taken, layers of no model, SQL."""


def toml_of(values: dict[str, Any]) -> str:
    """TOML of plain ``values``."""

    def text(value: Any) -> str:
        if isinstance(value, dict):
            return f"{{{', '.join(f'{json.dumps(k)} = {text(v)}' for k, v in value.items())}}}"
        if isinstance(value, list):
            return f"[{', '.join(map(text, value))}]"
        return json.dumps(value) if isinstance(value, str | bool) else repr(value)

    return "".join(f"{json.dumps(name)} = {text(value)}\n" for name, value in values.items())


def refusal_of_run(values: dict[str, Any], folder: Path) -> str | None:
    """Error of the parser of run.toml against a file with ``values``; None: nothing."""
    return refusal(lambda file: config_from({}, file), values, folder)


def refusal_of_policy(values: dict[str, Any], folder: Path) -> str | None:
    """The same of policy.toml."""
    return refusal(read_policy, values, folder)


def refusal(parse: Callable[[Path], object], values: dict[str, Any], folder: Path) -> str | None:
    file = folder / "file.toml"
    file.write_text(toml_of(values), "utf-8")
    try:
        parse(file)
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize("key", [*DEFAULTS, "layer", ""])
def test_schema_and_parser_take_the_same_values_of_each_key_of_a_run(
    key: str, tmp_path: Path
) -> None:
    schema = validator_of("run")
    taken = 0
    for value in VALUES:
        # With these, every other need of a key is met, and its own are tried below.
        around = (
            {}
            if key in ("signals", "thresholds", "group_by", "screen")
            else {"signals": "neurons", "thresholds": "t", "group_by": "source", "screen": 9}
        )
        if key == "where":
            around["keep_columns"] = "lang"
        values = {**NEEDED, **around, key: value}
        refused = refusal_of_run(values, tmp_path)
        is_loose = value in ONLY_THE_PARSER_KNOWS.get(key, [])
        assert schema.is_valid(values) == (refused is None or is_loose), (value, refused)
        taken += refused is None
    assert (taken > 0) == (key in DEFAULTS)


def test_schema_and_parser_know_what_each_key_of_a_run_needs(tmp_path: Path) -> None:
    schema = validator_of("run")
    others: dict[str, list[Any]] = {
        "signals": ["neurons", "shift", "shift, neurons", "neuronsx"],
        "thresholds": ["t"],
        "group_by": ["source"],
        "screen": [0, 1],
        "top_neurons": [8, 9],
        "neurons_of": ["all", "high"],
        "thresholds_by": ["run", "group"],
        "mean_vectors": [0, 9],
        "duplicates": ["keep", "once"],
        "near_duplicates": [0.8],
        "record": ["all", "summaries"],
    }
    assert {name for need in NEEDS for name in (need.key, need.other)} == others.keys()
    refused = 0
    combined: list[dict[str, Any]] = [{}]
    for key, choices in others.items():
        combined += [{**one, key: value} for one in combined for value in choices]
    for some in combined[::173]:
        values = {**NEEDED, **some}
        error = refusal_of_run(values, tmp_path)
        assert schema.is_valid(values) == (error is None), (values, error)
        refused += error is not None
    assert 0 < refused < len(combined[::173])
    for key in NEEDED:
        lacking = {name: value for name, value in NEEDED.items() if name != key}
        assert not schema.is_valid(lacking) and refusal_of_run(lacking, tmp_path)


def test_the_schema_of_a_run_tells_an_editor_each_key_with_its_meaning_and_default() -> None:
    schema = json.loads(json.dumps(json_schema.run_schema()))
    assert list(schema["properties"]) == [*RunConfig.__dataclass_fields__]
    assert all(of_key["description"] for of_key in schema["properties"].values())
    assert schema["properties"]["screen"]["default"] == 1000
    assert "default" not in schema["properties"]["revision"]


# --- policy.toml

NUMBERS: list[Any] = [
    0, 1, 2, 1000, -1, 0.5, 1.5, -0.5, float("inf"), True, "2%", " 0.5 % ", "2 percent", "%",
    "150%", "-1%",
    "100%", "100.00 %", "100.0001%", "0100%", "00099.5%", "1000%",
    "", "all", "new", "pass", "previous", "week", "weekday", "median:7", "median:1", "3", [], [1],
    "3 mad", " 2.5MAD ", "p99", "P99.5", "p100", "p5", "3 mads", "mad", 28,
]  # fmt: skip
LEVELS: list[Any] = [
    {}, {"warn": 1}, {"fail": 0.5}, {"warn": "1%"}, {"fail": 2}, {"warn": 0, "fail": 1},
    {"warn": -1},
    {"fail": 1, "high": 2}, {"warn": {"fail": 1}}, {"fail": True}, {"warn": "3 mad", "fail": 0.5},
    {"warn": "3 mad", "fail": "2 mad"},
]  # fmt: skip
ORDER_OF_LEVELS = "so no value is a warning alone"
"""A schema cannot say that a warning must come first, which differs with the limit."""


@pytest.mark.parametrize("key", [*WHOLE_LIMITS, *OPTIONS, "kss", ""])
def test_schema_and_parser_take_the_same_values_of_each_key_of_a_policy(
    key: str, tmp_path: Path
) -> None:
    schema = validator_of("policy")
    taken = 0
    for value in [*NUMBERS, *LEVELS]:
        for around in ({}, {"empty_documents": 0, "window": "new"}):
            values = {**around, key: value}
            error = refusal_of_policy(values, tmp_path)
            is_loose = error is not None and ORDER_OF_LEVELS in error
            assert schema.is_valid(values) == (error is None or is_loose), (values, error)
            taken += error is None
    assert (taken > 0) == (key in {**WHOLE_LIMITS, **OPTIONS})


def test_a_share_above_all_is_refused_as_a_percentage_too(tmp_path: Path) -> None:
    for key, is_share in (("junk_share", True), ("ks", True), ("psi", False)):
        for text, is_above in (("100%", False), ("150%", True), ("100.0001%", True)):
            error = refusal_of_policy({key: text}, tmp_path)
            assert (error is not None and "at most 100%" in error) == (is_share and is_above)


@pytest.mark.parametrize("part", list(PART_LIMITS))
def test_schema_and_parser_take_the_same_tables_of_parts(part: str, tmp_path: Path) -> None:
    schema = validator_of("policy")
    taken = 0
    tables: list[Any] = [1, "x", [], {}, {"lang": {}}, {"lang": {"psi": 1}, "ks": 1}]
    tables += ({"min_tokens": 5, **table} for table in ({"psi": 1}, {"psi": -1}, {}))
    for key in ["psi", "ks", "min_tokens_ratio", "min_tokens"]:
        tables += ({key: value} for value in [*NUMBERS, *LEVELS])
    tables += ({key: 1} for key in [*SOURCE_LIMITS, *GROUP_LIMITS, "max_new_types", "lang"])
    tables += [{"lang": table} for table in tables]
    for at, table in enumerate(tables):
        values = {**({"psi": 1} if at % 3 == 0 else {}), part: table}
        error = refusal_of_policy(values, tmp_path)
        is_loose = error is not None and ORDER_OF_LEVELS in error
        assert schema.is_valid(values) == (error is None or is_loose), (values, error)
        taken += error is None
    assert taken


def test_the_policies_of_the_guide_and_of_kubernetes_are_as_the_schema_says() -> None:
    schema = validator_of("policy")
    root = Path(__file__).parents[2]
    texts = fenced((root / "infra/guide/audit.md").read_text(), "toml")
    texts.append((root / "infra/kubernetes/values/policy.toml").read_text())
    assert len(texts) >= 2
    for text in texts:
        schema.validate(tomllib.loads(text))


# --- audit.json


def entries_of(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Paths of all entries in ``value``, down to the first element of each list."""
    if isinstance(value, dict):
        for name in value:
            yield (*path, name)
            yield from entries_of(value[name], (*path, name))
    elif isinstance(value, list) and value:
        yield from entries_of(value[0], (*path, 0))


def test_the_schema_of_a_verdict_takes_what_is_written_and_nothing_that_lacks_an_entry() -> None:
    run = RunFolder(
        "s/runs/r",
        "s",
        "r",
        {
            "config": {"corpus": ["/texts/2026-11-02/"]},
            "model": {"name": "m"},
            "measure": {"id": "x"},
            "counts": {"tokens": 9, "special": 2, "documents": 1},
            "created_at": "",
            "finished_at": "",
        },
    )
    rules = (
        Rule(Limit("psi", 0.1), 0.32, "broken", "/texts/a"),
        Rule(Limit("ks", None, 0.1), None, "warned", None),
        Rule(Limit("js", learned.parse("3 mad")), None, "not judged", None, "few nights"),
        Rule(
            Limit("psi", 0.3, of="group"), 0.1, "held", "de", usual=learned.UsualRange(0.0, 0.3, 9)
        ),
    )
    lost = Losses(9, 1, 1, 0, 0, 1, (("/texts/a", 0.5),), 1, ("/texts/a",))
    found = Audit("broken", rules, run, Baseline(run, None, (run,)), None, lost, ("n",), "new", 4)
    written = json.loads(audit.to_bytes(found))
    schema, strict = validator_of("audit"), strictly("audit")
    strict.validate(written)
    schema.validate({**written, "an entry of a later version": 1})
    lacking = 0
    for path in entries_of(written):
        part = copy.deepcopy(written)
        around = part
        for name in path[:-1]:
            around = around[name]
        value = around.pop(path[-1])
        if path[0] != "counts" or len(path) == 1:
            assert not schema.is_valid(part), path
            lacking += 1
        around[path[-1]] = [[value]]
        assert not schema.is_valid(part), path
    assert lacking > 40
    for name in ("state", "verdict", "window", "schema_version"):
        assert not schema.is_valid({**written, name: "another"})


# --- the command


@pytest.mark.parametrize("name", list(json_schema.SCHEMAS))
def test_the_command_prints_the_schema(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        commands.main(["schema", name])
    assert end.value.code == 0
    assert json.loads(capsys.readouterr().out) == json_schema.SCHEMAS[name]()
