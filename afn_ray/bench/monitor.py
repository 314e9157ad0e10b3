"""What recording costs one text at a time: a plain forward pass, the same one recording, and afn-ray's own."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table

from afn_ray import model, pipeline
from afn_ray.bench import machine
from afn_ray.bench.contest import one_layer
from afn_ray.bench.peers import find_blocks
from afn_ray.bench.texts import Writer, save_bert
from afn_ray.config import RunConfig
from afn_ray.errors import ConfigError
from afn_ray.signals import norm

LENGTHS = (16, 64, 256, 512)
DISTILLED_LAYERS = 6
SHAPES = ("BERT-base shape", "distilled shape")
WARM_UP = 3
WAYS = {
    "plain": "the model's whole forward pass, float32, torch's own threads",
    "recording": "the same, with the strength of every token read at the layer and brought home",
    "afn-ray": "afn-ray's engine: the same strengths, stopped at the layer, one thread on a CPU",
}

Way = Callable[[str], Any]


class _Candidate:
    """One model in its three ways; each takes a text and returns what it found, tokenizing included."""

    def __init__(self, folder: str, layer_text: str, device: str, store: str) -> None:
        files = model.find_model(folder, None, trust_remote_code=False, allow_pickle=False)
        if files.gguf:
            raise ConfigError(f"{folder} is a GGUF file, of which there is no plain forward pass to compare with")
        self.files, self.layer = files, one_layer(layer_text, files.depth)
        self.window = min(files.context_tokens, LENGTHS[-1])
        fast = model.has_fast_products("bfloat16", device)
        self.dtype = "bfloat16" if fast else "float32"
        config = RunConfig(
            corpus=("-",), model=folder, store=store, layers=str(self.layer), dtype=self.dtype, device=device,
            window_tokens=self.window, executor="inline",
        )  # fmt: skip
        self._processor = pipeline.Processor(pipeline.prepare(config, files, device, self.dtype)[0])
        self._device = device
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(files.folder)
        self._model = transformers.AutoModel.from_pretrained(files.folder, dtype=torch.float32).to(device).eval()
        self._strengths = np.empty(0, np.float32)
        self.ways: dict[str, Way] = {"plain": self._plain, "recording": self._recording, "afn-ray": self._ours}

    def _forward(self, text: str) -> None:
        inputs = self._tokenizer(text, truncation=True, max_length=self.window, return_tensors="pt")
        with torch.inference_mode():
            self._model(**inputs.to(self._device))

    def _plain(self, text: str) -> None:
        self._forward(text)
        if self._device == "cuda":
            torch.cuda.synchronize()

    def _recording(self, text: str) -> Any:
        def read(module: torch.nn.Module, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            self._strengths = norm(hidden).cpu().numpy()[0]

        handle = find_blocks(self._model, self.files.depth)[self.layer - 1].register_forward_hook(read)
        try:
            self._forward(text)
        finally:
            handle.remove()
        if self._device == "cuda":
            torch.cuda.synchronize()
        return self._strengths

    def _ours(self, text: str) -> Any:
        return self._processor.measure([text], [False]).strengths[0]

    def texts(self, length: int, n: int) -> list[str]:
        """``n`` texts of ``length`` tokens."""
        written = Writer(model.load_tokenizer(self.files), length).write("full", n * length, length, causal=False)
        return [text.text for text in written]

    def time(self, text: str) -> dict[str, float]:
        """Milliseconds that each way takes for ``text``, one after the other."""
        found = {}
        for way, call in self.ways.items():
            began = time.perf_counter()
            call(text)
            found[way] = 1e3 * (time.perf_counter() - began)
        return found

    def close(self) -> None:
        self._processor.close()


def measure(name: str | None, layer: str, num_texts: int, device: str) -> dict[str, Any]:
    """Milliseconds per text of ``name``, or of BERT-base and a distilled shape, as ``--json`` writes them."""
    device = model.choose_device(device)
    with tempfile.TemporaryDirectory(prefix="afn-bench-") as scratch:
        if name is None:
            base, distilled = (Path(scratch) / shape for shape in ("base", "distilled"))
            folders = [save_bert(base), save_bert(distilled, num_hidden_layers=DISTILLED_LAYERS)]
            named = dict(zip(SHAPES, map(str, folders), strict=True))
        else:
            named = {name: name}
        store = str(Path(scratch) / "store")
        candidates = {label: _Candidate(folder, layer, device, store) for label, folder in named.items()}
        taken: dict[str, dict[int, dict[str, list[float]]]] = {label: {} for label in candidates}
        window = min(c.window for c in candidates.values())
        with machine.Watch([os.getpid()]) as watch:
            for length in [n for n in LENGTHS if n <= window]:
                texts = next(iter(candidates.values())).texts(length, WARM_UP + num_texts)
                for at, text in enumerate(texts):
                    for label, candidate in candidates.items():
                        by_way = taken[label].setdefault(length, {way: [] for way in WAYS})
                        for way, milliseconds in candidate.time(text).items():
                            if at >= WARM_UP:
                                by_way[way].append(milliseconds)
        result: dict[str, Any] = {
            **machine.facts(device), "model": name or " and ".join(SHAPES), "device": device, "texts": num_texts,
            "foreign": round(watch.foreign, 3),
            "models": {
                label: {
                    "layer": candidate.layer, "depth": candidate.files.depth, "dtype": candidate.dtype,
                    "lengths": {str(n): _figures(times) for n, times in taken[label].items()},
                }
                for label, candidate in candidates.items()
            },
        }  # fmt: skip
        for candidate in candidates.values():
            candidate.close()
    if len(named) == 2:
        result["distilled_speedup"] = {
            str(n): {way: _paired(times[way], taken[SHAPES[1]][n][way]) for way in WAYS}
            for n, times in taken[SHAPES[0]].items()
        }
    return result


def _paired(slower: list[float], faster: list[float]) -> float:
    """Median over texts of how many times longer ``slower`` took than ``faster`` right beside it."""
    return statistics.median(a / b for a, b in zip(slower, faster, strict=True))


def _figures(times: dict[str, list[float]]) -> dict[str, Any]:
    ways = {
        way: {"median_ms": statistics.median(ms), "p95_ms": float(np.quantile(ms, 0.95))} for way, ms in times.items()
    }
    return {**ways, "recording_overhead": _paired(times["recording"], times["plain"]) - 1}


def render(result: dict[str, Any], console: Console) -> None:
    """One table per model, and how much faster the distilled shape is."""
    machine.print_facts(result, console)
    for label, found in result["models"].items():
        title = f"\n{label}: layer {found['layer']} of {found['depth']}; ms per text, median (p95)"
        table = Table(box=None, pad_edge=False, title=title, title_justify="left", title_style="bold")
        for heading in ("tokens", *WAYS, "recording costs"):
            table.add_column(heading, justify="right", no_wrap=True)
        for length, f in found["lengths"].items():
            times = [f"{f[way]['median_ms']:.1f} ({f[way]['p95_ms']:.1f})" for way in WAYS]
            table.add_row(length, *times, f"{f['recording_overhead']:+.1%}")
        console.print(table)
    if speedup := result.get("distilled_speedup"):
        by_length = ", ".join(f"{way['plain']:.2f}x at {length} tokens" for length, way in speedup.items())
        console.print(f"\nThe {SHAPES[1]} is faster: {by_length} (plain)", markup=False)
    console.print()
    for way, what in WAYS.items():
        console.print(f"{way}: {what}", markup=False)
    console.print(
        f"{result['texts']} texts of each length, one at a time, tokenizing included; all ways and models take turns "
        f"on each text, and overheads and ratios are medians over texts. Others took {result['foreign']:.0%} of the "
        "cores meanwhile.", markup=False,
    )  # fmt: skip
