"""JSON Schemas (draft 2020-12) of files that users write, from the tables that parse them.

A schema says what JSON Schema can say. What it refuses, the parser refuses. The parser also refuses
what only it knows, such as a layer that no model has.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any

from afn_ray import config
from afn_ray.config import DEFAULTS, HINTS, RunConfig

Schema = dict[str, Any]
DRAFT = "https://json-schema.org/draft/2020-12/schema"
TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}
"""Types in JSON Schema, by those of config keys."""


def run_schema() -> Schema:
    """Schema of ``run.toml``: a config that needs no flags beside it."""
    return {
        "$schema": DRAFT,
        "title": "run.toml of afn-ray: the config of 'afn run' and 'afn audit'",
        "type": "object",
        "properties": {f.name: _of_key(f.name, f.metadata["help"]) for f in fields(RunConfig)},
        "required": [name for name, default in DEFAULTS.items() if default is MISSING],
        "additionalProperties": False,
        "allOf": [_of_need(need) for need in config.NEEDS],
    }


SCHEMAS: dict[str, Callable[[], Schema]] = {"run": run_schema}
"""Schemas by the name of what they describe."""


def _of_key(name: str, help: str) -> Schema:
    """Schema of the value of one key of ``RunConfig``."""
    schema: Schema = {"description": help}
    if DEFAULTS[name] not in (MISSING, None):
        schema["default"] = DEFAULTS[name]
    if name == "corpus":
        one = {"type": "string", "minLength": 1}
        return schema | {"anyOf": [one, {"type": "array", "items": one, "minItems": 1}]}
    (schema["type"],) = (
        title for kind, title in TYPES.items() if HINTS[name] in (kind, kind | None)
    )
    if name in config.CHOICES:
        schema["enum"] = list(config.CHOICES[name])
    if name in config.NOT_EMPTY:
        schema["minLength"] = 1
    if name in PATTERNS:
        schema["pattern"] = PATTERNS[name]
    for bound, table in (("minimum", config.LEAST), ("maximum", config.MOST)):
        if name in table:
            schema[bound] = table[name]
    if name in config.ABOVE:
        schema |= {"exclusiveMinimum": config.ABOVE[name], "maximum": sys.float_info.max}
    return schema


def _of_need(need: config.Need) -> Schema:
    """Schema that a key with another value than its default sets for another key."""
    default = DEFAULTS[need.key]
    is_set: Schema = {} if default is None else {"not": {"const": default}}
    then: Schema = {"properties": {need.other: need.rule}}
    if DEFAULTS[need.other] is None or not need.is_met_by(DEFAULTS[need.other]):
        then["required"] = [need.other]
    return {"if": {"properties": {need.key: is_set}, "required": [need.key]}, "then": then}


def _whole(pattern: str) -> str:
    """The pattern of a text that matches ``pattern`` as a whole."""
    return f"^(?:{pattern})$"


def _list_of(entry: re.Pattern[str]) -> str:
    """The pattern of a list of entries with commas between."""
    spaced = rf"\s*(?:{entry.pattern})\s*"
    return f"{spaced}(?:,{spaced})*"


PATTERNS = {
    **{name: _whole(form.pattern.pattern) for name, form in config.FORMS.items()},
    "layers": _whole(rf"\s*all\s*|{_list_of(config.LAYER)}"),
    "signals": _whole(_list_of(config.SIGNAL)),
}
"""Patterns of texts in ``run.toml``, by key."""
