"""Placement of workers on the nodes of a Ray cluster: their number, tokenizers and shortages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from afn_ray import model
from afn_ray.config import RunConfig
from afn_ray.text import count

MOST_TOKENIZERS = 15
"""Largest default number of tokenizer processes of a worker on a GPU.

As many feed a model of 3 M tokens a second with the slowest tokenizers, of which each process
prepares 0.22 M; BERT's and byte-level ones prepare ten times as many. More would only take memory.
"""
GPU_PARTS = 10_000
"""Number of parts of a GPU that Ray counts."""
NO_NODE = (
    "no node with a GPU is up yet, so workers get no tokenizer processes: set --tokenizer-workers "
    "to the CPUs of a node divided by its workers, less 1"
)
"""Notice of a cluster that may grow, where nothing decides the number of tokenizer processes."""
NOT_SHARED = "--workers-per-gpu has no effect: {} has no GPU that workers share"
"""Notice of a run that cannot have several workers on a GPU."""


@dataclass(frozen=True, slots=True)
class Node:
    """Resources of a machine, whole ones."""

    num_cpus: int
    num_gpus: int


@dataclass(frozen=True, slots=True)
class Placement:
    """Workers of a run and their resources."""

    num_workers: int  # as configured, else as many as fit; at least 1
    tokenizer_workers: int  # tokenizer processes of each
    # messages for people; their texts do not depend on how many nodes of a kind there are
    notices: tuple[str, ...] = ()


def nodes() -> list[Node]:
    """The nodes of the Ray that this process has joined."""
    import ray

    found = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(int(has.get("CPU", 0)), int(has.get("GPU", 0))) for has in found]


def this_machine() -> Node:
    """The resources that a local Ray would have, before it starts."""
    return Node(model.count_devices("cpu"), model.count_devices("cuda"))


def gpu_share(config: RunConfig) -> float:
    """Share of a GPU that one worker takes, as Ray counts it; rounded down, so that all fit."""
    return math.floor(GPU_PARTS / config.workers_per_gpu) / GPU_PARTS


def place(
    config: RunConfig, nodes: Sequence[Node], device: str, known: Placement | None = None
) -> Placement:
    """Place workers on ``nodes``. A node without GPUs has no place for a worker on "cuda".

    ``known``: an earlier placement of the same run, whose number of tokenizer processes holds for
    workers on nodes that came later, too.
    """
    if device == "cuda":
        return _on_gpus(config, [node for node in nodes if node.num_gpus], known)
    tokenizers = config.tokenizer_workers or 0
    fit = sum(node.num_cpus // (1 + tokenizers) for node in nodes)
    notices = (NOT_SHARED.format("a run on CPUs"),) if config.workers_per_gpu > 1 else ()
    return Placement(config.workers or max(1, fit), tokenizers, notices)


def place_inline(config: RunConfig) -> Placement:
    """Place the one worker of a run in this process."""
    notices = (NOT_SHARED.format("a run in one process"),) if config.workers_per_gpu > 1 else ()
    return Placement(1, config.tokenizer_workers or 0, notices)


def _on_gpus(config: RunConfig, nodes: Sequence[Node], known: Placement | None) -> Placement:
    """Place workers on ``nodes``, which have GPUs."""
    tokenizers = config.tokenizer_workers
    if tokenizers is None and known is not None:
        tokenizers = known.tokenizer_workers
    elif tokenizers is None:
        tokenizers = min((_tokenizers(config, node) for node in nodes), default=0)
    fit = sum(_num_fit(config, node, tokenizers) for node in nodes)
    notices: list[str] = []
    if not nodes and config.tokenizer_workers is None:
        notices.append(NO_NODE)
    if config.workers is None or fit < config.workers:
        for node in dict.fromkeys(nodes):
            if notice := _too_few_cpus(config, node, tokenizers):
                notices.append(notice)
    elif notice := _idle_gpus(config, nodes):
        notices.append(notice)
    return Placement(config.workers or max(1, fit), tokenizers, tuple(notices))


def _num_wanted(config: RunConfig, node: Node) -> int:
    """Number of workers for which ``node`` has GPUs."""
    return node.num_gpus * config.workers_per_gpu


def _num_fit(config: RunConfig, node: Node, tokenizers: int) -> int:
    """Number of workers for which ``node`` has GPUs and CPUs."""
    return min(_num_wanted(config, node), node.num_cpus // (1 + tokenizers))


def _tokenizers(config: RunConfig, node: Node) -> int:
    """Tokenizer processes of a worker that share the CPUs of ``node`` and displace no worker."""
    num_workers = min(_num_wanted(config, node), config.workers or node.num_cpus, node.num_cpus)
    return min(MOST_TOKENIZERS, node.num_cpus // num_workers - 1) if num_workers else 0


def _too_few_cpus(config: RunConfig, node: Node, tokenizers: int) -> str:
    """Notice about nodes like ``node`` that lack CPUs for their GPUs; empty if they do not."""
    wanted = _num_wanted(config, node)
    fit = _num_fit(config, node, tokenizers)
    given = config.tokenizer_workers is not None
    if fit == wanted and (given or tokenizers or node.num_cpus > wanted):
        return ""
    cpus = count(1 + tokenizers, "CPU")
    found = (
        f"each node with {count(node.num_gpus, 'GPU')} and {count(node.num_cpus, 'CPU')} has room "
        f"for {fit} of {count(wanted, 'worker')}"
    )
    if given and tokenizers:
        return f"{found}, since a worker takes {cpus}: give fewer --tokenizer-workers"
    if tokenizers:
        return (
            f"{found}, since a worker takes {cpus}, as many as fit on the nodes that were up "
            "first: set a smaller number for all with --tokenizer-workers"
        )
    return (
        f"{found}, with {cpus} each: that is too few CPUs for the GPUs, whose models may wait for "
        "text"
    )


def _idle_gpus(config: RunConfig, nodes: Sequence[Node]) -> str:
    """Notice of GPUs on ``nodes`` that stay idle, since the others are shared; empty if none do.

    Ray fills one GPU with its workers before it takes the next one of a node.
    """
    per_gpu, num_workers = config.workers_per_gpu, config.workers or 0
    num_filled = math.ceil(num_workers / per_gpu)
    if per_gpu == 1 or num_filled >= sum(node.num_gpus for node in nodes):
        return ""
    return (
        f"{count(num_workers, 'worker')} with --workers-per-gpu {per_gpu} may take only "
        f"{count(num_filled, 'GPU')}, and the others stay idle: give more --workers, or "
        "leave it out"
    )


def describe(config: RunConfig, placement: Placement, device: str) -> str:
    """The workers of ``placement`` and their resources, for people."""
    workers = count(placement.num_workers, "worker")
    if device == "cuda" and config.workers_per_gpu > 1:
        workers += f", {config.workers_per_gpu} on a GPU"
    elif device == "cuda":
        workers += ", each on a GPU"
    if not placement.tokenizer_workers:
        return workers
    plural = "" if placement.tokenizer_workers == 1 else "es"
    return f"{workers}, each with {placement.tokenizer_workers} tokenizer process{plural}"
