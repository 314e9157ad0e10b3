"""Flags and TOML say the same, and whatever is wrong is named before any work begins."""

from __future__ import annotations

import codecs
import json
import os
import time
from dataclasses import MISSING, asdict, fields
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afn_ray.analysis.policy import read_policy
from afn_ray.config import HINTS, RunConfig, resolve_layers
from afn_ray.errors import ConfigError
from afn_ray.option_rules import (
    CHOICES,
    LANGUAGE,
    MOST_MEAN_VECTORS,
    MOST_QUARANTINED,
    MOST_WORKERS_PER_GPU,
    SERIES,
)
from afn_ray.runs.prices import read_prices
from afn_ray.runs.rates import read_rate
from afn_ray.store.settings import MOST_BYTES, config_from
from conftest import write_new

NEEDED: dict[str, Any] = {"corpus": ("a.txt",), "model": "m", "store": "s"}
KEYS = [f.name for f in fields(RunConfig)]

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
COUNTS = st.integers(1024, 2**40)


def _values(name: str) -> st.SearchStrategy[Any]:
    if name == "thresholds_by":
        return st.just("run")  # group wants group_by
    if name in CHOICES:
        return st.sampled_from(CHOICES[name])
    if name == "corpus":
        return st.lists(NAMES, min_size=1, max_size=3).map(tuple)
    if name == "layers":
        return st.sampled_from(["8", "2/3", "0,4,8", "all", "0.5"])
    if name == "signals":
        return st.sampled_from(["strength", "strength,shift", "strength,attention,shift"])
    if name == "keep_columns":
        return st.sampled_from(["lang", "lang,year:int64"])
    if name == "encoding":
        return st.sampled_from(["cp1251", "gb18030"])
    if name == "group_by":
        return st.sampled_from(["source", "lang"])
    if name == "sample":
        return st.sampled_from(["1%", "0.05%"])
    if name == "record":
        return st.just("all")  # others ask for no scan
    if name == "where":
        return st.sampled_from(["lang = 'de'", "lang IS NULL"])
    if name == "series":
        return st.from_regex(SERIES, fullmatch=True)
    if name == "language":
        return st.from_regex(LANGUAGE, fullmatch=True)
    if name == "near_duplicates":
        return st.floats(0.5, 1)
    if name == "workers_per_gpu":
        return st.integers(1, MOST_WORKERS_PER_GPU)
    if name == "top_neurons":
        return st.just(8)  # others want the signal
    if name == "mean_vectors":
        return st.integers(0, MOST_MEAN_VECTORS)
    if name == "allow_quarantined":
        return st.integers(0, MOST_QUARANTINED)
    if HINTS[name] in (float, float | None):
        return st.floats(1.5, 1e6) | st.integers(2, 100)
    return {bool: st.booleans(), int: COUNTS, int | None: COUNTS}.get(HINTS[name], NAMES)


def _has_what_it_needs(request: dict[str, Any]) -> bool:
    """True if no value asks for others beside it."""
    if request.get("mean_vectors") and request.get("duplicates", "keep") != "keep":
        return False
    if "where" in request and "keep_columns" not in request:
        return False
    return request.get("neurons_of") != "high"


REQUESTS = st.fixed_dictionaries(
    {name: _values(name) for name in NEEDED},
    optional={name: _values(name) for name in KEYS if name not in NEEDED},
).filter(lambda r: _has_what_it_needs(r))


def _toml(values: dict[str, Any]) -> str:
    """TOML of plain values; its basic strings are JSON's, but for DEL."""

    def text(value: Any) -> str:
        if isinstance(value, tuple):
            return f"[{', '.join(map(text, value))}]"
        return (
            json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
            if isinstance(value, str | bool)
            else repr(value)
        )

    return "".join(f"{name} = {text(value)}\n" for name, value in values.items())


@given(REQUESTS, st.sets(st.sampled_from(KEYS)))
def test_toml_and_flags_are_two_ways_to_say_the_same(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any], in_file: set[str]
) -> None:
    file = tmp_path_factory.getbasetemp() / "config.toml"
    file.write_text(_toml({k: v for k, v in values.items() if k in in_file}), "utf-8")
    mixed = config_from({k: v for k, v in values.items() if k not in in_file}, file)
    assert mixed == RunConfig(**values) == config_from(values)
    assert json.dumps(asdict(mixed)) == json.dumps(asdict(RunConfig(**values)))
    assert {k: asdict(mixed)[k] for k in values} == values


def test_a_whole_number_is_the_same_factor_as_a_decimal_one() -> None:
    """Runs are told apart by the JSON of what was asked."""
    assert json.dumps(RunConfig(**NEEDED, sink_factor=10).sink_factor) == "10.0"


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('corpus = "one.txt"\nmodel = "m"\nstore = "s"\nworkers = 3\n')
    assert config_from({"workers": 5}, file) == RunConfig(
        corpus=("one.txt",), model="m", store="s", workers=5
    )


def test_an_unknown_key_is_named_and_the_known_ones_are_listed(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("layer = 8\n")
    with pytest.raises(ConfigError) as caught:
        config_from(NEEDED, file)
    assert f"unknown key in {file}: layer (did you mean layers?);" in str(caught.value)
    assert str(caught.value).endswith("known keys: " + ", ".join(KEYS))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read: No such file"),
        (b"a = ", "is not TOML"),
        (b"a = '\xff'", "is not TOML"),
        (b"", "missing: corpus, model, store"),
        (b"corpus = 'x'\nstore = 's'", "missing: model"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, content: bytes | None, says: str) -> None:
    file = tmp_path / "c.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        config_from({}, file)


WRONG_TYPES = {
    "corpus": (["a"], (1,), "a"), "model": (1, None, True), "layers": (8, None),
    "sink_factor": ("10", True, None),
    "workers": (1.0, "1", True), "shard_bytes": ("auto", 2.0**20, True),
    "offsets": (1, "yes", None),
    "revision": (1, False), "id_column": (0,), "trust_remote_code": ("false", 0),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"), [(k, v) for k, values in WRONG_TYPES.items() for v in values]
)
def test_a_wrong_type_names_key_value_and_type(name: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig(**{**NEEDED, name: value})
    assert str(caught.value).startswith(f"{name} is {value!r} ({type(value).__name__}); expected ")


BOUNDS = {
    "window_tokens": 8,
    "workers": 1,
    "batch_tokens": 16,
    "shard_bytes": 1024,
    "max_document_bytes": 1,
    "overlap_tokens": 0,
}


@pytest.mark.parametrize(("name", "least"), BOUNDS.items())
def test_every_number_has_a_least_value(name: str, least: int) -> None:
    assert getattr(RunConfig(**NEEDED | {name: least}), name) == least
    with pytest.raises(ConfigError, match=rf"{name} is {least - 1}; expected (at least )?{least}"):
        RunConfig(**NEEDED | {name: least - 1})


@pytest.mark.parametrize("value", [1, 1.0, 0, -3.0, float("nan"), float("inf"), 10**400])
def test_a_sink_factor_is_finite_and_over_1(value: float) -> None:
    with pytest.raises(ConfigError, match="sink_factor"):
        RunConfig(**NEEDED, sink_factor=value)


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_lists_what_it_may_be(name: str) -> None:
    with pytest.raises(
        ConfigError, match=f"{name} is 'no'; expected one of {', '.join(CHOICES[name])}"
    ):
        RunConfig(**NEEDED | {name: "no"})


@pytest.mark.parametrize("name", ["corpus", "model", "store", "text_column", "language"])
def test_nothing_that_is_needed_may_be_empty(name: str) -> None:
    for empty in [(), ("",), ("a", "")] if name == "corpus" else [""]:
        with pytest.raises(ConfigError, match=f"{name} is empty"):
            RunConfig(**(NEEDED | {name: empty}))


@pytest.mark.parametrize(
    "language", ["english", "e", "en-", "en us", "en/x", "日本", "en-GB-a-b-c"]
)
def test_a_language_is_a_code(language: str) -> None:
    with pytest.raises(
        ConfigError, match=r"language is .*; expected auto, or a code of ISO 639, such as en"
    ):
        RunConfig(**NEEDED | {"language": language})
    for valid in ("auto", "en", "pt-BR", "zh_Hans_CN", "yue"):
        assert RunConfig(**NEEDED | {"language": valid}).language == valid


def test_every_field_has_a_help_and_all_but_three_a_default() -> None:
    assert all(f.metadata["help"] for f in fields(RunConfig))
    assert [f.name for f in fields(RunConfig) if f.default is MISSING] == [
        "corpus",
        "model",
        "store",
    ]


@pytest.mark.parametrize(("depth", "layers"), [(12, (0, 8)), (6, (0, 4)), (1, (0, 1)), (0, (0,))])
def test_unless_asked_otherwise_the_control_is_recorded(
    depth: int, layers: tuple[int, ...]
) -> None:
    config = RunConfig(corpus=("c",), model="m", store="s")
    assert resolve_layers(config.layers, depth) == layers


@pytest.mark.parametrize(
    ("spec", "depth", "layers"),
    [
        ("8", 12, (8,)), ("2/3", 12, (8,)), ("2/3", 6, (4,)), ("2/3", 30, (20,)), ("2/3", 1, (1,)),
        ("0,2/3", 12, (0, 8)), ("all", 3, (0, 1, 2, 3)), (" all ", 1, (0, 1)),
        ("4,8,12", 12, (4, 8, 12)),
        ("12, 4,4", 12, (4, 12)), ("0.5", 12, (6,)), ("0.5", 5, (3,)), ("1/1", 12, (12,)),
        ("0", 12, (0,)),
        ("0.0", 12, (0,)), ("8,2/3", 12, (8,)),
    ],
)  # fmt: skip
def test_layers_are_numbers_shares_of_the_depth_or_all(
    spec: str, depth: int, layers: tuple[int, ...]
) -> None:
    assert resolve_layers(spec, depth) == layers


@pytest.mark.parametrize("spec", ["13", "-1", "3/2", "-1/3", "1.5", "8.0", "999999999", "8,13"])
def test_a_layer_that_is_not_there_says_which_are(spec: str) -> None:
    with pytest.raises(
        ConfigError, match=r"does not exist; the model has layers 0 \(embeddings\) to 12"
    ):
        resolve_layers(spec, 12)


@pytest.mark.parametrize(
    "spec",
    ["x", "", ",", "8,", "1/0", "1e9", "5e-1", "1e999999999", "1e-999999999", "9" * 5000,
     "1/" + "9" * 5000, "1_0",
     "٣", "nan", "inf", "all,8", "2/3/4", "0x8", "2 / 3"],
)  # fmt: skip
def test_what_is_no_layer_is_refused_at_once_and_shows_how_to_say_it(spec: str) -> None:
    began = time.monotonic()
    for refuse in (lambda: resolve_layers(spec, 12), lambda: RunConfig(**NEEDED, layers=spec)):
        with pytest.raises(
            ConfigError, match=r"expected numbers, fractions of the depth or 'all', as in 8, 2/3"
        ):
            refuse()
    assert time.monotonic() - began < 2


@given(st.fractions(0, 1, max_denominator=60), st.integers(1, 200))
def test_a_share_is_the_nearest_layer(share: Fraction, depth: int) -> None:
    (layer,) = resolve_layers(f"{share.numerator}/{share.denominator}", depth)
    assert abs(layer - share * depth) <= Fraction(1, 2)


# --- behind a URL
# ----------------------------------------------------------------------------------------


def test_a_config_behind_a_url_is_the_file(quiet_place: str, tmp_path: Path) -> None:
    text = (
        'corpus = ["s3://b/one", "/two"]\nmodel = "a/hub-name"\nstore = "gs://b/s"\nworkers = 3\n'
    )
    write_new(f"{quiet_place}/run.toml", text.encode())
    (tmp_path / "run.toml").write_text(text)
    found = config_from({"workers": 5}, f"{quiet_place}/run.toml")
    assert found == config_from({"workers": 5}, tmp_path / "run.toml")
    assert (found.corpus, found.model, found.workers) == (("s3://b/one", "/two"), "a/hub-name", 5)
    with pytest.raises(ConfigError, match=r"config file .*none\.toml.*: [Nn]o such file"):
        config_from({}, f"{quiet_place}/none.toml")


@pytest.mark.parametrize("name", ["corpus", "store", "scratch", "thresholds"])
def test_a_relative_place_behind_a_url_is_refused(name: str, memory: str, tmp_path: Path) -> None:
    """Its target would depend on the machine. In a file of this machine, and as a flag, it may
    be.
    """
    text = _toml({"corpus": "/c", "store": "/s", "model": "m", name: "results/here"})
    write_new(f"{memory}/run.toml", text.encode())
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(
        ConfigError,
        match=rf"^{name} in {memory}/run.toml is 'results/here', which is another place",
    ):
        config_from({}, f"{memory}/run.toml")
    flag = ("results/here",) if name == "corpus" else "results/here"
    assert config_from({name: flag}, f"{memory}/run.toml") == config_from({}, tmp_path / "run.toml")


def test_a_file_that_nobody_wrote_by_hand_is_refused_before_it_is_read_whole(memory: str) -> None:
    write_new(f"{memory}/run.toml", b"#" * (MOST_BYTES + 1))
    for file, why in (
        (f"{memory}/run.toml", "has more than 1,048,576 bytes"),
        ("/dev/zero", "cannot be read: it is a pipe, a device or a socket"),
    ):
        with pytest.raises(ConfigError, match=rf"config file {file} {why}"):
            config_from(NEEDED, file)
        with pytest.raises(ConfigError, match=rf"policy {file} {why}"):
            read_policy(file)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_config_of_an_editor_on_windows_is_the_same(encoding: str, tmp_path: Path) -> None:
    """Files with a byte order mark and its line ends; the other order of bytes too."""
    text = 'corpus = "caf\u00e9"\nmodel = "m"\nstore = "s"\n'
    file = tmp_path / "run.toml"
    data = text.replace("\n", "\r\n").encode(encoding)
    swapped = {"utf-16": codecs.BOM_UTF16_BE, "utf-32": codecs.BOM_UTF32_BE}.get(encoding, b"")
    other = swapped + text.encode(f"{encoding}-be") if swapped else data
    for content in (data, other):
        file.write_bytes(content)
        assert config_from({}, file) == config_from(
            {"corpus": ("caf\u00e9",), "model": "m", "store": "s"}
        )
    file.write_bytes(text.encode("utf-16-le"))  # without a mark nobody can tell
    with pytest.raises(ConfigError, match="is not TOML"):
        config_from({}, file)


def test_a_config_may_come_through_a_pipe() -> None:
    reader, writer = os.pipe()
    os.write(writer, _toml(NEEDED).encode())
    os.close(writer)
    assert config_from({}, f"/dev/fd/{reader}") == RunConfig(**NEEDED)
    os.close(reader)


def test_a_pipe_that_no_shell_has_opened_is_refused(tmp_path: Path) -> None:
    pipe = tmp_path / "p"
    os.mkfifo(pipe)
    for read in (read_prices, read_rate, read_policy, partial(config_from, {})):
        with pytest.raises(ConfigError, match="p cannot be read: it is a pipe"):
            read(pipe)


def test_credentials_in_the_url_of_a_config_are_not_repeated() -> None:
    with pytest.raises(ConfigError, match="holds credentials") as caught:
        config_from({}, "s3://key:hush@bucket/run.toml")
    assert "hush" not in str(caught.value)
