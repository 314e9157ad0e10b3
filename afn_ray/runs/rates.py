"""The speed of a worker, as 'afn bench rate' wrote it, and what it was measured for."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from afn_ray.errors import ConfigError
from afn_ray.fingerprints import fingerprint
from afn_ray.runs.prices import is_finite_number
from afn_ray.runs.task import Task
from afn_ray.store import settings


class Speed(TypedDict, total=False):
    """The inputs of a worker's tokens per second, except the machine and the texts."""

    model: str  # fingerprint
    layers: list[int]
    signals: list[str]
    top_neurons: int
    dtype: str
    device: str
    window_tokens: int
    overlap_tokens: int
    batch_tokens: int | None
    tokenizer_workers: int


@dataclass(frozen=True, slots=True)
class Rate:
    """Speed of one worker, as ``afn bench rate`` measured it."""

    tokens_per_second: float
    load_s: float  # seconds until a process has loaded the model
    where: str  # machine, versions, n and spread
    speed: Speed = field(default_factory=Speed)  # what it was measured for

    def check(self, speed: Speed, file: Path) -> None:
        """Raise ``ConfigError`` unless the rate was measured for ``speed``."""
        differing = []
        for key, asked in speed.items():
            known = self.speed.get(key)
            if known != asked:
                differing.append(f"{key}: it has {known}, this run asks for {asked}")
        if differing:
            raise ConfigError(
                f"--rate {file} was measured for something else: {'; '.join(differing)}; measure "
                "this run's: 'afn bench rate RUN_TOML --json FILE'"
            )


def speed_of(task: Task) -> Speed:
    """The speed that a rate for ``task`` must have been measured for.

    A worker on a GPU whose number of tokenizer processes its node decides has no
    ``tokenizer_workers``: a rate says with how many it was measured.
    """
    measure = task.measure
    tokenizers = task.config.tokenizer_workers
    if tokenizers is None and task.device == "cpu":
        tokenizers = 0
    speed: Speed = {
        "model": fingerprint(dict(measure.model)),
        "layers": list(measure.layers),
        "signals": list(measure.signals),
        "top_neurons": measure.top_neurons,
        "dtype": measure.dtype,
        "device": task.device,
        "window_tokens": measure.window_tokens,
        "overlap_tokens": measure.overlap_tokens,
        "batch_tokens": task.config.batch_tokens,
    }
    if tokenizers is not None:
        speed["tokenizer_workers"] = tokenizers
    return speed


def _are_rates(value: Any) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return all(is_finite_number(rate) and rate for rate in value)


RATE_KEYS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "speed": (lambda v: isinstance(v, dict), "an object"),
    "tokens_per_second": (_are_rates, "a list of numbers over 0"),
    "load_s": (is_finite_number, "a number, 0 or more"),
    "machine": (lambda v: isinstance(v, str), "a text"),
    "versions": (
        lambda v: isinstance(v, dict) and isinstance(v.get("torch"), str),
        "an object with that of torch",
    ),
    "foreign": (is_finite_number, "a number, 0 or more"),
}
"""Keys that are read from a file by ``afn bench rate --json``: a check and the expected value."""


def read_rate(path: Path) -> Rate:
    """The rate in ``path``. Raises ``ConfigError`` unless ``afn bench rate --json`` wrote it."""
    try:
        value = json.loads(settings.decode(settings.read_local(path)))
    except OSError as error:
        raise ConfigError(f"--rate {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"--rate {path} is not what 'afn bench rate --json' writes: {error!r}"
        ) from error
    found: dict[str, Any] = value if isinstance(value, dict) else {}
    for key, (is_right, expected) in RATE_KEYS.items():
        if not is_right(found.get(key)):
            raise ConfigError(
                f"--rate {path} is not what 'afn bench rate --json' writes: {key} is "
                f"{found.get(key)!r}; expected {expected}"
            )
    rates = found["tokens_per_second"]
    tokenizers = found["speed"].get("tokenizer_workers")
    plural = "" if tokenizers == 1 else "es"
    fed = f", {tokenizers} tokenizer process{plural}" if tokenizers else ""
    where = (
        f"on {found['machine']}, torch {found['versions']['torch']}{fed}, n = {len(rates)}, "
        f"{min(rates):,.0f}-{max(rates):,.0f}, others took {found['foreign']:.0%} of its cores"
    )
    return Rate(statistics.median(rates), found["load_s"], where, found["speed"])
