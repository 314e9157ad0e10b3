"""The variants of afn-ray: the engine alone, and the whole job with its files.

Both work as in a long run: the model is loaded, and the shards are planned.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from afn_ray.bench.peers import Norms, Outcome, Spec
from afn_ray.bench.texts import Text
from afn_ray.config import RunConfig
from afn_ray.corpus_values import Document
from afn_ray.runs import measurer, plan, worker
from afn_ray.runs.deadlines import SLOTS
from afn_ray.runs.progress import Counters
from afn_ray.schema import strength_column
from afn_ray.store import plans, shard_files
from afn_ray.store.commits import Commit
from afn_ray.store.shard_tables import DOC

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
        files = measurer.find_model_files(self._config)
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

    def run(self, texts: Sequence[Text], passes: int = 1) -> Outcome:
        """Measure ``texts`` so often without a pause; the strengths are those of the first pass."""
        before = replace(self._processor.counters)
        every = itertools.chain.from_iterable(itertools.repeat(texts, passes))
        documents = (Document("bench", i, text.text) for i, text in enumerate(every))
        strengths: list[Norms] = []
        with self._processor.feed.chunks(documents) as chunks:  # as for a shard
            flow = self._processor.measurer.flow(chunks, 0)
            with closing(flow.measure()) as measured:
                for chunk, values in measured:
                    if len(strengths) < len(texts):
                        bounds = chunk.prepared.encoded.bounds
                        strengths += np.split(values.series[0], bounds[1:-1])
        return self._outcome(before, strengths[: len(texts)])


class Job(_Ours):
    """The whole job: it reads shards from disk, measures them and commits them to a fresh store.

    The worker is loaded and the shards are planned before the first run.
    """

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self._spec = spec
        self._plans: dict[tuple[str, int], plans.Plan] = {}  # by profile and number of passes
        self._num_runs = 0
        self._last: list[Commit] = []  # of the last run, in the order of its texts
        for profile in spec.texts:
            self._plan(profile, 1)

    def _plan(self, profile: str, passes: int) -> plans.Plan:
        """The shards of the texts of ``profile``, ``passes`` times one after another."""
        planned = self._plans.get((profile, passes))
        if planned is None:
            corpus = Path(self._spec.folder) / "corpus" / f"{profile}-{passes}"
            _write_corpus(corpus, Path(self._spec.texts[profile]), passes)
            config = replace(self._config, corpus=(str(corpus),))
            planned = self._plans[profile, passes] = plan.make_plan(config)
        return planned

    def run_profile(self, profile: str, passes: int = 1) -> Outcome:
        """Process the shards of ``profile``, several at a time, as a run's worker does.

        The outcome has no strengths: ``read_back`` reads them from the store.
        """
        shards = self._plan(profile, passes).shards
        before = replace(self._processor.counters)
        self._num_runs += 1
        config = replace(self._config, store=self._store_of_run())
        self._processor.task = replace(self._task, config=config)
        with ThreadPoolExecutor(SLOTS) as pool:
            self._last = list(pool.map(self._processor.process, shards))
        return self._outcome(before, [])

    def read_back(self, num_texts: int) -> list[Norms]:
        """The strengths that the last run committed for its first texts; removes its store."""
        store = self._store_of_run()
        column = strength_column(self._layer)
        strengths: list[Norms] = []
        for commit in self._last:
            if len(strengths) >= num_texts:
                break
            folder = Path(shard_files.shard_uri(store, self._task.measure.id, commit.shard))
            file = folder / commit.files["tokens"]["name"]
            table = pq.read_table(file, columns=[DOC, column])
            bounds = np.flatnonzero(np.diff(table[DOC].to_numpy())) + 1
            strengths += np.split(table[column].to_numpy(), bounds)
        shutil.rmtree(store)
        return strengths[:num_texts]

    def _store_of_run(self) -> str:
        """The store of the last run."""
        return str(Path(self._config.store) / str(self._num_runs))


def _write_corpus(folder: Path, texts: Path, passes: int) -> None:
    """Write the texts in the file ``texts``, ``passes`` times, as one JSONL file in ``folder``."""
    folder.mkdir(parents=True)
    stored = json.loads(texts.read_text("utf-8"))
    rows = [json.dumps({"text": text}) + "\n" for text, _ in stored]
    with (folder / "part.jsonl").open("w", encoding="utf-8") as lines:
        for _ in range(passes):
            lines.writelines(rows)
