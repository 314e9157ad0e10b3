"""JSON Schemas (draft 2020-12) of files that users write, from the tables that parse them.

A schema says what JSON Schema can say. What it refuses, the parser refuses. The parser also refuses
what only it knows, such as a layer that no model has.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import MISSING, fields
from types import UnionType
from typing import Annotated, Any, get_args, get_origin, get_type_hints, is_typeddict

from afn_ray import option_rules
from afn_ray.analysis import learned, limits, policy
from afn_ray.analysis.limits import PART_LIMITS, WHOLE_LIMITS, Limit
from afn_ray.config import DEFAULTS, HINTS, LAYER, SIGNAL, RunConfig
from afn_ray.errors import ConfigError

Schema = dict[str, Any]
DRAFT = "https://json-schema.org/draft/2020-12/schema"
TYPES = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    type(None): "null",
}
"""Types in JSON Schema, by those of Python."""


def run_schema() -> Schema:
    """Schema of ``run.toml``: a config that needs no flags beside it."""
    return {
        "$schema": DRAFT,
        "title": "run.toml of afn-ray: the config of 'afn run' and 'afn audit'",
        "type": "object",
        "properties": {f.name: _of_key(f.name, f.metadata["help"]) for f in fields(RunConfig)},
        "required": [name for name, default in DEFAULTS.items() if default is MISSING],
        "additionalProperties": False,
        "allOf": [_of_need(need) for need in option_rules.NEEDS],
    }


def policy_schema() -> Schema:
    """Schema of ``policy.toml``."""
    of_parts = {part: _of_part(part) for part in PART_LIMITS}
    by_key = {"type": "object", "minProperties": 1, "maxProperties": 1}
    known = [*PART_LIMITS["group"], *policy.PART_OPTIONS["group"]]
    by_key |= {
        "propertyNames": {"not": {"enum": known}},
        "additionalProperties": of_parts["group"],
    }
    of_parts["group"] = {"anyOf": [of_parts["group"], by_key]}
    return {
        "$schema": DRAFT,
        "title": "policy.toml of afn-ray: the limits of 'afn audit'",
        "type": "object",
        "properties": {
            **{key: _of_limit(Limit(key, None)) for key in WHOLE_LIMITS},
            **{key: _of_option(key) for key in policy.OPTIONS},
            **of_parts,
        },
        "additionalProperties": False,
        "allOf": [_of_baselines(window) for window in policy.BASELINES],
        **_with_a_limit(),
    }


def audit_schema() -> Schema:
    """Schema of ``audit.json``; later versions of afn-ray may add entries."""
    from afn_ray.analysis.audit import AuditJson  # with all that makes it, which --help needs not

    title = "audit.json of afn-ray: the verdict of 'afn audit'"
    return {"$schema": DRAFT, "title": title, **of_type(AuditJson)}


SCHEMAS: dict[str, Callable[[], Schema]] = {
    "run": run_schema,
    "policy": policy_schema,
    "audit": audit_schema,
}
"""Schemas by the name of what they describe."""


def schema_of(name: str) -> Schema:
    """The JSON Schema (draft 2020-12) of ``name``: run (run.toml), policy (policy.toml) or audit.

    Raises ``ConfigError`` for any other name.
    """
    if name not in SCHEMAS:
        raise ConfigError(f"there is no schema of {name!r}; there are {', '.join(SCHEMAS)}")
    return SCHEMAS[name]()


# --- run.toml


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
    if name in option_rules.CHOICES:
        schema["enum"] = list(option_rules.CHOICES[name])
    if name in option_rules.NOT_EMPTY:
        schema["minLength"] = 1
    if name in PATTERNS:
        schema["pattern"] = PATTERNS[name]
    for bound, table in (("minimum", option_rules.LEAST), ("maximum", option_rules.MOST)):
        if name in table:
            schema[bound] = table[name]
    if name in option_rules.ABOVE:
        schema |= {"exclusiveMinimum": option_rules.ABOVE[name], "maximum": sys.float_info.max}
    return schema


def _of_need(need: option_rules.Need) -> Schema:
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
    **{name: _whole(form.pattern.pattern) for name, form in option_rules.FORMS.items()},
    "layers": _whole(rf"\s*all\s*|{_list_of(LAYER)}"),
    "signals": _whole(_list_of(SIGNAL)),
}
"""Patterns of texts in ``run.toml``, by key."""


# --- policy.toml


def _in_any_case(pattern: str) -> str:
    """``pattern`` for small letters and for capitals, without names of its groups."""
    unnamed = re.sub(r"\(\?P<\w+>", "(", pattern)
    return re.sub(r"(?<!\\)[a-z]", lambda letter: f"[{letter[0]}{letter[0].upper()}]", unnamed)


PERCENT = {"type": "string", "pattern": _whole(rf"\s*{limits.PERCENT.pattern}\s*")}
"""A number as a percentage."""
SHARE = {"type": "string", "pattern": _whole(rf"\s*{limits.AT_MOST_ALL.pattern}\s*")}
"""The same up to 100 %."""
LEARNED = {
    "type": "string",
    "pattern": _whole(rf"\s*(?:{_in_any_case(learned.FORM.pattern)})\s*"),
}
"""A limit that learns from earlier nights."""


def _of_limit(limit: Limit) -> Schema:
    """Schema of one limit: a level, which is a number or text, or two levels."""
    number: Schema = {"type": "integer" if limit.is_whole else "number", "minimum": 0}
    if limit.key in limits.SHARES:
        number["maximum"] = 1
    kinds = [number, LEARNED]
    if not limit.is_whole:
        number.setdefault("maximum", sys.float_info.max)  # infinity limits nothing
        kinds.append(SHARE if limit.key in limits.SHARES else PERCENT)
    level = {"anyOf": kinds}
    levels = {
        "type": "object",
        "properties": {"warn": level, "fail": level},
        "additionalProperties": False,
        "minProperties": 1,
    }
    return {"description": limit.meaning, "anyOf": [level, levels]}


def _of_part(part: str) -> Schema:
    """Schema of the table of limits on each source or group."""
    options = {
        key: {"description": meaning, "type": "integer", "minimum": 0}
        for key, meaning in policy.PART_OPTIONS[part].items()
    }
    of_limits = {key: _of_limit(Limit(key, None, of=part)) for key in PART_LIMITS[part]}
    return {"type": "object", "properties": of_limits | options, "additionalProperties": False}


def _of_option(key: str) -> Schema:
    """Schema of an option beside the limits."""
    schema: Schema = {"description": policy.OPTIONS[key]}
    if key in policy.CHOICES:
        return schema | {"enum": list(policy.CHOICES[key])}
    if key in policy.LEAST:
        return schema | {"type": "integer", "minimum": policy.LEAST[key]}
    return schema | {"type": "string"}


def _of_baselines(window: str) -> Schema:
    """Schema of the baselines that a policy with ``window`` may have."""
    kinds: list[Schema] = [{"enum": list(policy.BASELINES[window])}]
    if window == "new":
        kinds.append({"pattern": _whole(policy.MEDIAN.pattern)})
    is_window: Schema = {"properties": {"window": {"const": window}}}
    if window != "all":  # the default
        is_window["required"] = ["window"]
    return {"if": is_window, "then": {"properties": {"baseline": {"anyOf": kinds}}}}


def _with_a_limit() -> Schema:
    """Schema of a policy with at least one limit, of the whole run or of a part."""
    in_parts = {part: _one_of(PART_LIMITS[part]) for part in PART_LIMITS}
    by_key = {"minProperties": 1, "additionalProperties": in_parts["group"]}
    in_parts["group"] = {"anyOf": [in_parts["group"], by_key]}
    in_tables = [
        {"properties": {part: schema}, "required": [part]} for part, schema in in_parts.items()
    ]
    return {"anyOf": [_one_of(WHOLE_LIMITS), *in_tables]}


def _one_of(keys: Iterable[str]) -> Schema:
    """Schema of a table with at least one of ``keys``."""
    return {"type": "object", "anyOf": [{"required": [key]} for key in keys]}


# --- audit.json


def of_type(kind: Any) -> Schema:
    """Schema of the values of ``kind``: a ``TypedDict`` with what it is made of.

    ``Annotated`` adds a description, and perhaps a tuple of all values.
    """
    if is_typeddict(kind):
        hints = get_type_hints(kind, include_extras=True)
        of_entries = {name: of_type(hint) for name, hint in hints.items()}
        return {"type": "object", "properties": of_entries, "required": list(hints)}
    if kind in TYPES:
        return {"type": TYPES[kind]}
    if get_origin(kind) is Annotated:
        plain, description, *values = get_args(kind)
        schema = {"description": description, **of_type(plain)}
        return schema | {"enum": list(values[0])} if values else schema
    if isinstance(kind, UnionType):
        return {"anyOf": [of_type(one) for one in get_args(kind)]}
    if get_origin(kind) is list:
        return {"type": "array", "items": of_type(*get_args(kind))}
    assert get_origin(kind) is dict, kind
    return {"type": "object", "additionalProperties": of_type(get_args(kind)[1])}
