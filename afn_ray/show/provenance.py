"""Provenance of a run in words: software and devices of its shards, and
the command to repeat it.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

from afn_ray import token_rows
from afn_ray.config import RunConfig
from afn_ray.provenance import PACKAGES
from afn_ray.run_info import Maker, RunInfo
from afn_ray.text import count

MOST_CHARS = 2000
"""Longest command that is shown on a terminal, in characters."""


REASONS = {"attention": "why", "norm": "why_eager"}
"""Choices of a model in a commit, each with the entry that has its reason, if there is one."""


def facts(info: RunInfo) -> Iterator[tuple[str, str]]:
    """Names and values of what measured the shards of the run with run.json ``info``.

    Runs of older versions record less, and have fewer facts.
    """
    makers = info.get("makers", {})
    if makers and list(makers) != ["cpu"]:  # older runs name no CPU
        yield "measured on", _by_shards(makers)
    provenance = info.get("provenance", ())
    for name, why in REASONS.items():
        if chosen := _chosen(provenance, name, why):
            yield name, chosen
    if software := _software(provenance):
        yield "software", software
    if info["model"]["depth"] in info["layers"] and (norms := _final_norms(provenance)):
        yield "last layer", norms


def _by_shards(numbers: Mapping[str, int]) -> str:
    """``numbers`` of shards by a text; the text alone if there is one."""
    if len(numbers) == 1:
        return next(iter(numbers))
    return "; ".join(f"{count(n, 'shard')} on {text}" for text, n in numbers.items())


def _chosen(provenance: Sequence[Maker], name: str, why: str) -> str:
    """The choice ``name`` of the models that give its reason ``why``; "" if none does."""
    numbers: Counter[str] = Counter()
    for kind in provenance:
        made_by = kind["made_by"]
        if reason := made_by.get(why):
            numbers[f"{made_by.get(name, '?')}, since {reason}"] += kind["shards"]
    if numbers and len(provenance) == 1:
        return next(iter(numbers))
    return "; ".join(f"{count(n, 'shard')} by {text}" for text, n in numbers.most_common())


def _software(provenance: Sequence[Maker]) -> str:
    """Version of each software, or its versions with their numbers of shards."""
    texts = []
    for name in ("python", *PACKAGES):
        numbers: Counter[str] = Counter()
        for kind in provenance:
            if name in kind["made_by"]:
                numbers[kind["made_by"][name]] += kind["shards"]
        if len(numbers) == 1:
            texts.append(f"{name} {next(iter(numbers))}")
        elif numbers:
            versions = [f"{version} ({count(n, 'shard')})" for version, n in numbers.most_common()]
            texts.append(f"{name} {' and '.join(versions)}")
    return ", ".join(texts)


def _final_norms(provenance: Sequence[Maker]) -> str:
    """Place of the last layer's values by the model's final norm; "" if no commit says it."""
    said = {kind["made_by"].get("final_norm") for kind in provenance} - {None}
    if said == {"left out"}:
        return "read before the model's final norm"
    return "the model has no final norm" if said == {"none"} else ""


def shown_command(config: Mapping[str, Any]) -> str:
    """``command_line`` for a terminal, or where to find one that is too long for it."""
    command = command_line(config)
    if len(command) <= MOST_CHARS:
        return command
    return f"a command of {len(command):,} characters: its options are config in run.json"


def command_line(config: Mapping[str, Any]) -> str:
    """The ``afn run`` command that gives a run's recorded ``config``, quoted for a shell."""
    words = ["afn", "run", *config["corpus"]]
    left_out = {"corpus"}
    if not token_rows.is_complete(config.get("record", token_rows.ALL)):
        left_out.add("screen")  # record implies that it is 0
    for field in fields(RunConfig):
        value = config.get(field.name, field.default)
        if field.name in left_out or (field.default is not MISSING and value == field.default):
            continue
        flag = "--" + field.name.replace("_", "-")
        if not isinstance(value, bool):
            words += [flag, str(value)]
        elif value:
            words.append(flag)
        else:
            words.append(flag.replace("--", "--no-", 1))
    return shlex.join(words)
