"""The variants of afn-ray: the engine alone, and the whole job with its files.

Both work as in a long run: the model is loaded, and the shards are planned.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from afn_ray.bench.peers import Norms, Outcome, Spec
from afn_ray.bench.texts import Text
from afn_ray.config import RunConfig
from afn_ray.runs import measurer, plan, worker
from afn_ray.runs.progress import Counters
from afn_ray.schema import Document, strength_column
from afn_ray.store import plans, shard_files

STAGES = ("read_s", "tokenize_s", "wait_s", "model_s", "write_s")


class _Ours:
    def __init__(self, spec: Spec) -> None:
        folder = Path(spec.folder)
        self._layer = spec.layer
        self._config = RunConfig(
            corpus=(str(folder / "corpus"),),
            model=spec.model,
            store=str(folder / "store"),
            layers=str(spec.layer),
            dtype=spec.dtype,
            device=spec.device,
            batch_tokens=spec.batch_tokens,
            window_tokens=spec.window_tokens,
            tokenizer_workers=spec.tokenizer_workers,
            executor="inline",
            scratch=spec.folder,
        )
        files = measurer.find_model(self._config)
        self._task = worker.prepare(self._config, files, spec.device, spec.dtype)
        self._processor = worker.Processor(self._task)

    def _outcome(self, before: Counters, strengths: list[Norms]) -> Outcome:
        now = self._processor.counters
        forward_tokens = now.forward_tokens - before.forward_tokens
        stages = {name: getattr(now, name) - getattr(before, name) for name in STAGES}
        return Outcome(strengths, forward_tokens, stages)

    def close(self) -> None:
        self._processor.close()


class Engine(_Ours):
    """The engine on texts in memory: tokenizing, windows, packing and the model, but no files."""

    def run(self, texts: Sequence[Text]) -> Outcome:
        before = replace(self._processor.counters)
        documents = (Document("bench", i, text.text) for i, text in enumerate(texts))
        strengths: list[Norms] = []
        with self._processor.feed.chunks(documents) as chunks:  # as for a shard
            for chunk in chunks:
                values = self._processor.measurer.values(chunk.prepared)
                bounds = chunk.prepared.encoded.bounds
                strengths += np.split(values.series[0], bounds[1:-1])
        return self._outcome(before, strengths)


class Job(_Ours):
    """The whole job: it reads shards from disk, measures them and commits them to a fresh store.

    The worker is loaded and the shards are planned before the first run.
    """

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self._plans: dict[str, plans.Plan] = {}
        self._num_runs = 0
        for profile, file in spec.texts.items():
            corpus = Path(spec.folder) / "corpus" / profile
            _write_corpus(corpus, Path(file))
            config = replace(self._config, corpus=(str(corpus),))
            self._plans[profile] = plan.make_plan(config)

    def run_profile(self, profile: str) -> Outcome:
        """Process the shards of ``profile`` once.

        The outcome has no strengths: ``read_back`` reads them from the store.
        """
        before = replace(self._processor.counters)
        self._num_runs += 1
        config = replace(self._config, store=self._store_of_run())
        self._processor.task = replace(self._task, config=config)
        for shard in self._plans[profile].shards:
            self._processor.process(shard)
        return self._outcome(before, [])

    def read_back(self, profile: str) -> list[Norms]:
        """The strengths that the last run committed, by text. Removes the store of that run."""
        store = self._store_of_run()
        measure_id = self._task.measure.id
        column = strength_column(self._layer)
        strengths: list[Norms] = []
        for shard in self._plans[profile].shards:
            commit = shard_files.read_commit(store, measure_id, shard.id)
            assert commit is not None
            folder = Path(shard_files.shard_uri(store, measure_id, shard.id))
            file = folder / commit.files["tokens"]["name"]
            table = pq.read_table(file, columns=["doc", column])
            bounds = np.flatnonzero(np.diff(table["doc"].to_numpy())) + 1
            strengths += np.split(table[column].to_numpy(), bounds)
        shutil.rmtree(store)
        return strengths

    def _store_of_run(self) -> str:
        """The store of the last run."""
        return str(Path(self._config.store) / str(self._num_runs))


def _write_corpus(folder: Path, texts: Path) -> None:
    """Write the texts in the file ``texts`` as a corpus of one JSONL file in ``folder``."""
    folder.mkdir(parents=True)
    with (folder / "part.jsonl").open("w", encoding="utf-8") as lines:
        for text, _ in json.loads(texts.read_text("utf-8")):
            lines.write(json.dumps({"text": text}) + "\n")
