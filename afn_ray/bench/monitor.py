"""Measure the cost of recording strengths, one text at a time.

It compares plain forward passes, the same passes with recording, and afn-ray's engine.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table

from afn_ray import model
from afn_ray.bench import machine
from afn_ray.bench.contest import likely_dtype, one_layer
from afn_ray.bench.peers import blocks_of
from afn_ray.bench.texts import Writer, save_bert
from afn_ray.config import RunConfig
from afn_ray.errors import ConfigError, ModelError
from afn_ray.model import attention
from afn_ray.model.signals import Attention, Received, Shift, Signal, Site, Strength
from afn_ray.runs import worker
from afn_ray.runs.measurer import Measurer

LENGTHS = (16, 64, 256, 512)
"""Lengths of the texts, in tokens."""
DISTILLED_LAYERS = 6
"""Number of blocks of the distilled shape."""
SHAPES = ("BERT-base shape", "distilled shape")
WARM_UP = 3
"""Number of texts of each length that come first and are not counted."""
WAYS = {
    "plain": "the model's whole forward pass, float32, torch's own threads",
    "plain again": "the same once more: what it takes more or less is noise",
    "strength": "the same, with the strength of every token read at the layer and brought home",
    "strength, shift": "the same, with the shift too",
    "strength, shift, attention": "the same, with attention received too, computed once more at "
    "the layer",
    "plain to the layer": "the plain pass, ended behind the layer's block",
    "strength to the layer": "the same, with the strength",
    "afn-ray": "afn-ray's engine: the strengths, ended there too, one thread on a CPU",
}
"""Description of each way to process a text, by name."""
ENDS = " to the layer"
"""Suffix of the ways that end after the layer's block."""
PLAIN = {
    way: "plain" + ENDS if way.endswith(ENDS) else "plain"
    for way in WAYS
    if way not in ("plain", "plain" + ENDS)
}
"""Plain way that each way is compared with.

The overhead of a way is its time divided by that of its plain way, minus 1.
"""

Way = Callable[[str], Any]


class _Enough(Exception):
    """Raised after the layer's block, so that the later blocks do not run."""


class _Candidate:
    """One model, and a function for each way to process a text, tokenizing included.

    The recording ways and ``afn-ray`` return the values; the plain ways return no
    values. Raises ``ConfigError`` for a GGUF file, which has no plain forward pass.
    """

    def __init__(self, folder: str, layer_text: str, device: str, store: str) -> None:
        files = model.find_model(folder, None, trust_remote_code=False, allow_pickle=False)
        if files.gguf:
            raise ConfigError(
                f"{folder} is a GGUF file, of which there is no plain forward pass to compare with"
            )
        self.files, self.layer = files, one_layer(layer_text, files.depth)
        self.window = min(files.context_tokens, LENGTHS[-1])
        self.dtype = likely_dtype(device)
        config = RunConfig(
            corpus=("-",),
            model=folder,
            store=store,
            layers=str(self.layer),
            dtype=self.dtype,
            device=device,
            window_tokens=self.window,
            executor="inline",
        )
        self._measurer = Measurer(worker.prepare(config, files, device, self.dtype))
        self._device = device
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(files.folder)
        plain, both = self._load(), [Strength(), Shift()]
        self.ways: dict[str, Way] = {
            "plain": self._plain(plain),
            "plain again": self._plain(plain),
            "strength": self._recording(plain, both[:1]),
            "strength, shift": self._recording(plain, both),
            "plain to the layer": self._recording(plain, [], ends=True),
            "strength to the layer": self._recording(plain, both[:1], ends=True),
            "afn-ray": self._ours,
        }
        self.without = ""  # why attention is not recorded; empty when it is
        try:
            gram = self._gram(config)
        except ModelError as error:
            self.without = str(error)
        else:
            packed = self._load()
            # This implementation uses torch's kernel, and keeps its inputs for ``Received``.
            packed.set_attn_implementation(attention.NAME)
            self.ways["strength, shift, attention"] = self._recording(
                packed, [*both, Received()], gram
            )

    def _load(self) -> Any:
        loaded = transformers.AutoModel.from_pretrained(self.files.folder, dtype=torch.float32)
        return loaded.to(self._device).eval()

    def _gram(self, config: RunConfig) -> torch.Tensor:
        """The Gram matrices of the attention's output projection at the layer, from the engine.

        Their shape is [heads, size, size]: see ``attention.value_norms``.
        """
        config = replace(config, signals="attention", dtype="float32")
        engine = Measurer(worker.prepare(config, self.files, self._device, "float32")).model
        gram = engine.places[engine.blocks[self.layer - 1]].gram
        assert gram is not None
        return gram

    def _encode(self, text: str) -> Any:
        encoded = self._tokenizer(
            text, truncation=True, max_length=self.window, return_tensors="pt"
        )
        return encoded.to(self._device)

    def _plain(self, plain: Any) -> Way:
        def run(text: str) -> None:
            with torch.inference_mode():
                plain(**self._encode(text))
            if self._device == "cuda":
                torch.cuda.synchronize()

        return run

    def _recording(
        self,
        plain: Any,
        signals: list[Signal],
        gram: torch.Tensor | None = None,
        *,
        ends: bool = False,
    ) -> Way:
        block = blocks_of(plain, self.files.depth)[self.layer - 1]

        def run(text: str) -> Any:
            values = np.empty(0, np.float32)
            inputs = self._encode(text)
            n = inputs["input_ids"].shape[1]
            layout = attention.Layout([n], n, torch.device(self._device))
            before: list[torch.Tensor] = []

            def enter(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
                before.append(args[0] if args else kwargs["hidden_states"])
                layout.watched = gram is not None

            def leave(module: torch.nn.Module, args: Any, output: Any) -> None:
                nonlocal values
                layout.watched = False
                hidden = output[0] if isinstance(output, tuple) else output
                site = Site(self.layer, hidden, before[0])
                if gram is not None and (seen := layout.seen) is not None:
                    of_others, own = attention.received(seen, layout)
                    norms = attention.value_norms(seen, gram)
                    site.attention = Attention(of_others[:, None], own[:, None], norms[:, None])
                if signals:
                    columns: list[torch.Tensor] = []
                    for signal in signals:
                        columns += signal.measure(site)
                    values = torch.stack(columns).cpu().numpy()[:, 0]
                if ends:
                    raise _Enough

            handles = (
                block.register_forward_pre_hook(enter, with_kwargs=True),
                block.register_forward_hook(leave),
            )
            try:
                with torch.inference_mode(), attention.packed(layout), contextlib.suppress(_Enough):
                    plain(**inputs)
            finally:
                for handle in handles:
                    handle.remove()
            if self._device == "cuda":
                torch.cuda.synchronize()
            return values

        return run

    def _ours(self, text: str) -> Any:
        return self._measurer.measure([text], [False]).strengths

    def texts(self, length: int, n: int) -> list[str]:
        """``n`` texts of ``length`` tokens."""
        written = Writer(model.load_tokenizer(self.files), length).write(
            "full", n * length, length, causal=False
        )
        return [text.text for text in written]

    def time(self, text: str, turn: int) -> dict[str, float]:
        """Milliseconds that each way takes for ``text``, by way.

        The ways run one after the other; ``turn`` decides which one is first.
        """
        found = {}
        names = [way for way in WAYS if way in self.ways]
        for way in (*names[turn % len(names) :], *names[: turn % len(names)]):
            began = time.perf_counter()
            self.ways[way](text)
            found[way] = 1e3 * (time.perf_counter() - began)
        return found


class WayTimes(TypedDict):
    """Milliseconds per text in one way."""

    median_ms: float
    p95_ms: float


class LengthTimes(TypedDict):
    """Times of texts of one length, and how much more they are than without a monitor."""

    ways: dict[str, WayTimes]
    overheads: dict[str, float]


class ModelTimes(TypedDict):
    """Times of one model."""

    layer: int
    depth: int
    dtype: str
    without: str
    lengths: dict[str, LengthTimes]


class MonitorResult(machine.MachineFacts):
    """Milliseconds per text, as ``--json`` writes them."""

    model: str
    device: str
    texts: int
    foreign: float
    models: dict[str, ModelTimes]
    distilled_speedup: NotRequired[dict[str, dict[str, float]]]  # of two shapes


def measure(name: str | None, layer: str, num_texts: int, device: str) -> MonitorResult:
    """Milliseconds per text of the model ``name``.

    Without a name, it measures BERT-base's shape and a distilled shape.
    """
    device = model.choose_device(device)
    with tempfile.TemporaryDirectory(prefix="afn-bench-") as scratch:
        if name is None:
            base, distilled = (Path(scratch) / shape for shape in ("base", "distilled"))
            folders = [save_bert(base), save_bert(distilled, num_hidden_layers=DISTILLED_LAYERS)]
            named = dict(zip(SHAPES, map(str, folders), strict=True))
        else:
            named = {name: name}
        store = str(Path(scratch) / "store")
        candidates = {
            label: _Candidate(folder, layer, device, store) for label, folder in named.items()
        }
        taken: dict[str, dict[int, dict[str, list[float]]]] = {label: {} for label in candidates}
        window = min(candidate.window for candidate in candidates.values())
        first, *_ = candidates.values()
        with machine.Watch([os.getpid()]) as watch:
            for length in [n for n in LENGTHS if n <= window]:
                texts = first.texts(length, WARM_UP + num_texts)
                for at, text in enumerate(texts):
                    for label, candidate in candidates.items():
                        by_way = taken[label].setdefault(
                            length, {way: [] for way in WAYS if way in candidate.ways}
                        )
                        for way, milliseconds in candidate.time(text, at).items():
                            if at >= WARM_UP:
                                by_way[way].append(milliseconds)
        models: dict[str, ModelTimes] = {}
        for label, candidate in candidates.items():
            models[label] = {
                "layer": candidate.layer,
                "depth": candidate.files.depth,
                "dtype": candidate.dtype,
                "without": candidate.without,
                "lengths": {str(n): _figures(times) for n, times in taken[label].items()},
            }
        facts = machine.facts(device)
        result: MonitorResult = {
            "machine": facts["machine"],
            "cores": facts["cores"],
            "python": facts["python"],
            "versions": facts["versions"],
            "model": name or " and ".join(SHAPES),
            "device": device,
            "texts": num_texts,
            "foreign": round(watch.foreign, 3),
            "models": models,
        }
    if len(named) == 2:
        of_base, of_distilled = (taken[shape] for shape in SHAPES)
        speedup = {}
        for n, times in of_base.items():
            speedup[str(n)] = {way: _paired(times[way], of_distilled[n][way]) for way in times}
        result["distilled_speedup"] = speedup
    return result


def _paired(slower: list[float], faster: list[float]) -> float:
    """Median over texts of the time in ``slower`` divided by the time in ``faster``."""
    return statistics.median(a / b for a, b in zip(slower, faster, strict=True))


def _figures(times: dict[str, list[float]]) -> LengthTimes:
    ways: dict[str, WayTimes] = {
        way: {"median_ms": statistics.median(ms), "p95_ms": float(np.quantile(ms, 0.95))}
        for way, ms in times.items()
    }
    overheads = {
        way: _paired(times[way], times[plain]) - 1 for way, plain in PLAIN.items() if way in times
    }
    return {"ways": ways, "overheads": overheads}


def render(result: MonitorResult, console: Console) -> None:
    """Print a table per model, and how much faster the distilled shape is."""
    machine.print_facts(result, console)
    for label, found in result["models"].items():
        title = (
            f"\n{label}: layer {found['layer']} of {found['depth']}; ms per text, and how much "
            "more than plain"
        )
        table = Table(
            box=None, pad_edge=False, title=title, title_justify="left", title_style="bold"
        )
        table.add_column("tokens", no_wrap=True)
        for length in found["lengths"]:
            table.add_column(length, justify="right", no_wrap=True)
        for way in next(iter(found["lengths"].values()))["ways"]:
            cells = []
            for f in found["lengths"].values():
                overhead = f"{f['overheads'][way]:+.1%}" if way in f["overheads"] else ""
                cells.append(f"{f['ways'][way]['median_ms']:.2f} {overhead:>7}")
            table.add_row(way, *cells)
        console.print(table)
        if found["without"]:
            console.print(f"attention is not recorded: {found['without']}", markup=False)
    if speedup := result.get("distilled_speedup"):
        by_length = ", ".join(
            f"{way['plain']:.2f}x at {length} tokens" for length, way in speedup.items()
        )
        console.print(f"\nThe {SHAPES[1]} is faster: {by_length} (plain)", markup=False)
    console.print()
    for way, what in WAYS.items():
        console.print(f"{way}: {what}", markup=False)
    console.print(
        f"{result['texts']} texts of each length, one at a time, tokenizing included; all ways "
        "and models take turns on each text. Times, ratios and overheads are medians over texts; "
        "an overhead is against plain, of what ends at the layer against what plainly does. "
        f"Others took {result['foreign']:.0%} of the cores meanwhile.",
        markup=False,
    )
