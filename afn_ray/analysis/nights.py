"""Settings of one night's audit: its baseline, its partition, and whether it begins a series."""

from __future__ import annotations

from dataclasses import dataclass, replace

from afn_ray.analysis.policy import Policy
from afn_ray.config import RunConfig
from afn_ray.corpus import partitions
from afn_ray.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Night:
    """Settings of one night's audit beside the policy."""

    baseline: str | None = None
    """Kind of baseline as in the policy, or the URI of a run; None: the policy's kind."""
    partition: str | None = None
    """Date of the partition to measure, or "latest"; None: the latest if the window is "new"."""
    first_night: bool = False
    """True if limits may stay unjudged because the series has no baseline yet."""
    frozen: bool = False
    """True: label with the thresholds of the runs before."""


@dataclass(frozen=True, slots=True)
class Covered:
    """The part of the corpus that one night measures."""

    config: RunConfig
    """The config of the run, whose corpus is what the night covers."""
    message: str | None
    """Sentence that names the chosen partition; None if the night covers the whole corpus."""
    is_late: bool
    """True if a part of a newer partition is there, but not all of it."""


def choose_partition(config: RunConfig, policy: Policy, night: Night) -> Covered:
    """The part of ``config``'s corpus that ``night`` measures: with the window "new", one
    partition.

    Raises ``ConfigError`` for a partition that the window or the corpus does not have.
    """
    if policy.window == "all":
        if night.partition is not None:
            raise ConfigError(
                f"partition is {night.partition!r}, but the policy's window is all, the whole "
                'corpus; give the policy window = "new", or leave the partition out'
            )
        return Covered(config, None, is_late=False)
    chosen = partitions.choose(
        config.corpus, partitions.LATEST if night.partition is None else night.partition
    )
    message = f"partition {chosen.day}: {', '.join(chosen.corpus)}"
    if chosen.incomplete is not None:
        message += f"; a part of {chosen.incomplete} is there, but not in every glob of the corpus"
    covered = replace(config, corpus=chosen.corpus)
    return Covered(covered, message, is_late=chosen.incomplete is not None)
