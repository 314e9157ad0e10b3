"""The variants that users write instead of afn-ray.

They are a Hugging Face loop, a tuned pipeline, Ray Data and sentence-transformers.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

from afn_ray.bench.texts import Piece, Text, budgeted, share
from afn_ray.errors import ConfigError

LOOP_BATCH = 32
"""Texts in a batch of the loop and of sentence-transformers."""
Norms = npt.NDArray[np.float32]
"""Strengths of the tokens of one text or window: float32 [tokens]."""


@dataclass(frozen=True, slots=True)
class Spec:
    """Settings of one process of a variant; plain values, because they are sent as JSON."""

    variant: str
    model: str  # folder
    layer: int
    depth: int
    device: str
    dtype: str
    batch_tokens: int
    tokenizer_workers: int  # for afn-ray only
    window_tokens: int
    workers: int  # processes that share the work
    folder: str  # for the files of this process
    texts: dict[str, str]  # profile -> file with this process's texts
    least_s: float = 0.0  # shortest timed measurement of a variant of afn-ray, in seconds


@dataclass(slots=True)
class Outcome:
    """The result of one pass over some texts."""

    strengths: list[Norms]  # by text
    forward_tokens: int = 0  # including padding or filler
    stages: dict[str, float] = field(default_factory=dict)  # seconds
    # The variant's own time, when the caller's clock would include more than its work.
    seconds: float | None = None


def _joined(texts: Sequence[Text], norms: Sequence[Norms]) -> list[Norms]:
    """Strengths of each text, joined from those of its windows, in order."""
    rest = iter(norms)
    strengths: list[Norms] = []
    for text in texts:
        kept = [next(rest)[piece.keep_start : piece.keep_end] for piece in text.pieces]
        strengths.append(np.concatenate(kept))
    return strengths


def _pieces(texts: Sequence[Text]) -> list[Piece]:
    return [piece for text in texts for piece in text.pieces]


def _tokenizer(spec: Spec) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(spec.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


class Loop:
    """The plain loop: batches in the order of the texts, all layers and all hidden states.

    ``last`` is the strengths of the last hidden states. Those of sentence-transformers are
    compared with them.
    """

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self._tokenizer = _tokenizer(spec)
        self._model = (
            transformers.AutoModel.from_pretrained(spec.model, dtype=torch.float32)
            .to(spec.device)
            .eval()
        )
        self.last: list[Norms] = []

    def run(self, texts: Sequence[Text]) -> Outcome:
        pieces = _pieces(texts)
        norms: list[Norms] = []
        last: list[Norms] = []
        outcome = Outcome([], stages={"tokenize_s": 0.0, "model_s": 0.0})
        for at in range(0, len(pieces), LOOP_BATCH):
            began = time.monotonic()
            batch = [p.text for p in pieces[at : at + LOOP_BATCH]]
            inputs = self._tokenizer(
                batch,
                padding=True,
                truncation=True,
                max_length=self._spec.window_tokens,
                return_tensors="pt",
            ).to(self._spec.device)
            encoded = time.monotonic()
            with torch.no_grad():
                states = self._model(**inputs, output_hidden_states=True).hidden_states
            chosen = states[self._spec.layer].norm(dim=-1).cpu().numpy()
            final = states[-1].norm(dim=-1).cpu().numpy()
            lengths = inputs["attention_mask"].sum(dim=1).tolist()
            norms += [row[:n] for row, n in zip(chosen, lengths, strict=True)]
            last += [row[:n] for row, n in zip(final, lengths, strict=True)]
            outcome.forward_tokens += inputs["input_ids"].numel()
            outcome.stages["tokenize_s"] += encoded - began
            outcome.stages["model_s"] += time.monotonic() - encoded
        outcome.strengths = _joined(texts, norms)
        self.last = _joined(texts, last)
        return outcome


class _Enough(Exception):
    """Raised after the layer's block, so that the later blocks do not run."""


class Tuned:
    """The tuned pipeline: sorted by length, batches of a token budget, no block after the layer.

    It computes in the spec's dtype.
    """

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self._tokenizer = _tokenizer(spec)
        dtype = getattr(torch, spec.dtype)
        self._model = (
            transformers.AutoModel.from_pretrained(spec.model, dtype=dtype).to(spec.device).eval()
        )
        blocks = blocks_of(self._model, spec.depth)
        for block in blocks[spec.layer :]:
            block.to("meta")  # never runs, so it needs no memory
        blocks[spec.layer - 1].register_forward_hook(self._stop)
        self._norms = torch.empty(0)

    def _stop(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        self._norms = torch.linalg.vector_norm(hidden, dim=-1, dtype=torch.float32)
        raise _Enough

    def run(self, texts: Sequence[Text]) -> Outcome:
        norms, outcome = self.measure([p.text for p in _pieces(texts)])
        return replace(outcome, strengths=_joined(texts, norms))

    def measure(self, texts: Sequence[str]) -> tuple[list[Norms], Outcome]:
        """Strengths of every token of ``texts``, each of which fits in a window."""
        began = time.monotonic()
        outcome = Outcome([])
        ids = self._tokenizer(
            list(texts),
            truncation=True,
            max_length=self._spec.window_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
        encoded = time.monotonic()
        found: list[tuple[list[int], torch.Tensor]] = []
        with torch.inference_mode():
            for group in budgeted([len(i) for i in ids], self._spec.batch_tokens):
                found.append((group, self._forward([ids[i] for i in group])))
                outcome.forward_tokens += found[-1][1].numel()
        norms: list[Norms] = [np.empty(0, np.float32)] * len(ids)
        for group, values in found:  # not in the loop above, which would then wait for the GPU
            for i, row in zip(group, values.cpu().numpy(), strict=True):
                norms[i] = row[: len(ids[i])]
        outcome.stages = {"tokenize_s": encoded - began, "model_s": time.monotonic() - encoded}
        return norms, outcome

    def _forward(self, ids: list[list[int]]) -> torch.Tensor:
        lengths = [len(i) for i in ids]
        matrix = np.full((len(ids), max(lengths)), self._tokenizer.pad_token_id or 0, np.int64)
        for row, i in zip(matrix, ids, strict=True):
            row[: len(i)] = i
        inputs = {"input_ids": torch.from_numpy(matrix).to(self._spec.device, non_blocking=True)}
        if min(lengths) < max(lengths):  # attention is faster without a mask
            mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
            inputs["attention_mask"] = torch.from_numpy(mask.astype(np.int64)).to(
                self._spec.device, non_blocking=True
            )
        try:
            self._model(**inputs)
        except _Enough:
            return self._norms
        raise ConfigError(
            f"the model ended without its block {self._spec.layer}; `tuned` cannot read it"
        )


def blocks_of(model: torch.nn.Module, depth: int) -> list[torch.nn.Module]:
    """The ``depth`` blocks of ``model``.

    Raises ``ConfigError`` when the model has no ``ModuleList`` of that length.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == depth:
            return list(module)
    raise ConfigError(
        f"{type(model).__name__} keeps its {depth} blocks in no list; choose other --variants or "
        "--model"
    )


class SentenceTransformers:
    """Token embeddings of sentence-transformers, after all layers, and their norms."""

    def __init__(self, spec: Spec) -> None:
        import sentence_transformers

        self._model = sentence_transformers.SentenceTransformer(
            spec.model,
            device=spec.device,
            local_files_only=True,
            model_kwargs={"dtype": torch.float32},
        )
        self._model.max_seq_length = spec.window_tokens

    def run(self, texts: Sequence[Text]) -> Outcome:
        began = time.monotonic()
        found = self._model.encode(
            [p.text for p in _pieces(texts)],
            output_value="token_embeddings",
            batch_size=LOOP_BATCH,
            show_progress_bar=False,
        )
        norms = [torch.linalg.vector_norm(values, dim=-1).cpu().numpy() for values in found]
        # ``encode`` sorts texts by characters, longest first: count its padding in that order.
        lengths = [p.length for p in sorted(_pieces(texts), key=lambda p: -len(p.text))]
        batches = [lengths[i : i + LOOP_BATCH] for i in range(0, len(lengths), LOOP_BATCH)]
        forward_tokens = sum(len(b) * max(b) for b in batches)
        return Outcome(_joined(texts, norms), forward_tokens, {"model_s": time.monotonic() - began})


class RayData:
    """``map_batches`` over a pool of actors, with this process as the driver.

    Ray runs only during a measurement: its idle processes would slow the other variants.
    """

    def __init__(self, spec: Spec) -> None:
        from afn_ray.runs.cluster import access

        access.choose_token(own=True)
        import ray.data  # noqa: F401

        self._spec = spec

    def run(self, texts: Sequence[Text]) -> Outcome:
        import ray

        from afn_ray.runs.cluster import access
        from afn_ray.runs.cluster.connection import WORKER_ENV

        gpu = self._spec.device == "cuda"
        access.start_local(
            num_cpus=self._spec.workers,
            object_store_memory=1 << 29,
            runtime_env={"env_vars": {} if gpu else WORKER_ENV},
        )
        try:
            return self._map(texts, gpu)
        finally:
            ray.shutdown()

    def _map(self, texts: Sequence[Text], gpu: bool) -> Outcome:
        import ray.data

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.wait_for_min_actors_s = 600  # all actors are ready before the first batch
        pieces = _pieces(texts)
        for old in Path(self._spec.folder).glob("*.jsonl"):
            old.unlink()
        # One batch per worker, all with about the same number of tokens. That gives the least
        # padding and the least overhead of Ray, as batches of thousands of texts do in a long run.
        warm_up = [p.text for p in pieces[:: 4 * self._spec.workers]]
        shares = share(texts, self._spec.workers)
        first = np.cumsum([0, *(len(text.pieces) for text in texts)])
        items: list[dict[str, object]] = []
        for part in shares:
            for at in part:
                for i in range(first[at], first[at + 1]):
                    items.append({"piece": i, "text": pieces[i].text})
        norms_of = ray.data.from_items(items, override_num_blocks=self._spec.workers).map_batches(
            _Mapped,
            fn_constructor_args=(self._spec, warm_up),
            batch_size=None,
            compute=ray.data.ActorPoolStrategy(size=self._spec.workers),
            num_cpus=0 if gpu else 1,
            num_gpus=1 if gpu else 0,
        )
        found = list(norms_of.iter_batches(batch_size=None, batch_format="numpy"))
        ended = time.monotonic()
        piece_of = np.concatenate([batch["piece"] for batch in found])
        values = np.concatenate([batch["strength"] for batch in found])
        order = np.argsort(piece_of, kind="stable")
        ends = np.cumsum([piece.length for piece in pieces])
        norms = np.split(values[order], ends[:-1])
        lines: list[dict[str, Any]] = []
        for log in Path(self._spec.folder).glob("*.jsonl"):
            lines += [json.loads(line) for line in log.read_text().splitlines()]
        stages = {}
        for name in ("tokenize_s", "model_s"):
            stages[name] = sum(line["stages"][name] for line in lines)
        forward_tokens = sum(line["forward_tokens"] for line in lines)
        seconds = ended - min(line["began"] for line in lines)
        return Outcome(_joined(texts, norms), forward_tokens, stages, seconds)


class _Mapped:
    """The state of each actor: the tuned pipeline, warmed up."""

    def __init__(self, spec: Spec, warm_up: list[str]) -> None:
        self._tuned = Tuned(spec)
        self._tuned.measure(warm_up)
        # Timings are written to a file, so that the batches hold only a user's columns.
        self._log = Path(spec.folder) / f"{os.getpid()}.jsonl"

    def __call__(self, batch: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        began = time.monotonic()
        norms, outcome = self._tuned.measure(batch["text"].tolist())
        with self._log.open("a") as log:
            line = {
                "began": began,
                "forward_tokens": outcome.forward_tokens,
                "stages": outcome.stages,
            }
            log.write(json.dumps(line) + "\n")
        return {
            "piece": np.repeat(batch["piece"], [len(n) for n in norms]),
            "strength": np.concatenate(norms),
        }
