"""Records of a document are a function of it and of its shard: never of workers, order or
neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from afn_ray.config import RunConfig
from afn_ray.runs import flow, measurer, worker
from afn_ray.runs.plan import make_plan
from afn_ray.runs.worker import Processor
from afn_ray.store import plans
from afn_ray.store.commits import Commit
from afn_ray.tokens import feed
from conftest import MakeConfig, write_jsonl

BUDGETS = (64, 100, 256, 1000, 2048, 4096, 16384)


def make_processor(config: RunConfig, dtype: str = "float32") -> Processor:
    task = worker.prepare(config, measurer.find_model_files(config), "cpu", dtype)
    return Processor(task)


@pytest.fixture(scope="module")
def processors(request: pytest.FixtureRequest) -> Iterator[Callable[..., Processor]]:
    """Processors by model, budget and dtype, each made once."""
    made: dict[Any, Processor] = {}

    def make(kind: str, batch_tokens: int, dtype: str = "float32") -> Processor:
        if (kind, batch_tokens, dtype) not in made:
            config = RunConfig(
                corpus=("-",),
                model=str(request.getfixturevalue(kind)),
                store="/nowhere",
                executor="inline",
                layers="all",
                batch_tokens=batch_tokens,
            )
            made[kind, batch_tokens, dtype] = make_processor(config, dtype)
        return made[kind, batch_tokens, dtype]

    yield make
    for processor in made.values():
        processor.close()


@pytest.fixture(scope="module", autouse=True)
def unrounded() -> Iterator[None]:
    """Every bit that the model gives: rounding would hide most differences."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flow, "round_strengths", lambda values: values)
        yield


ALONE: WeakKeyDictionary[Processor, list[np.ndarray]] = WeakKeyDictionary()
"""Strengths of all texts of ``pool``, measured together, by processor."""

SINGLE: WeakKeyDictionary[Processor, dict[str, np.ndarray]] = WeakKeyDictionary()
"""Strengths of texts that were measured one at a time, by processor."""


def measure(processor: Processor, texts: list[str]) -> list[np.ndarray]:
    """Strengths [n_layers, n_tokens] of each of ``texts``, measured together."""
    measured = processor.measurer.measure(texts, [False] * len(texts))
    assert np.isfinite(measured.strengths).all()
    return np.split(measured.strengths, measured.encoded.bounds[1:-1], axis=1)


def pool(verses: list[str]) -> list[str]:
    """Texts of a token, of many windows, and of all sizes between; some have the same length."""
    words = ["light", "God", "a", "the sea", "And it was so."]
    return [
        *words,
        *verses[:40],
        *(" ".join(verses[i : i + 6]) for i in range(100, 160, 10)),
        *verses[3000:3020],
    ]


# --- neighbours
# ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kind", "budget"), [("tiny_bert", 64), ("tiny_bert", 256), ("tiny_gpt", 128), ("minilm", 256)]
)
@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
@given(data=st.data())
def test_the_bits_of_a_document_do_not_depend_on_its_neighbours(
    kind: str,
    budget: int,
    dtype: str,
    data: st.DataObject,
    processors: Callable[..., Processor],
    verses: list[str],
) -> None:
    processor = processors(kind, budget, dtype)
    assert processor.measurer.model.packed
    texts = pool(verses)
    if processor not in ALONE:  # a document is alone with what fills its batch
        ALONE[processor] = measure(processor, texts)
    chosen = data.draw(
        st.lists(st.integers(0, len(texts) - 1), min_size=8, max_size=25, unique=True)
    )
    prepared = processor.measurer.preparer.prepare(
        [texts[i] for i in chosen], [False] * len(chosen)
    )
    assume(len(prepared.batches) > 1)
    assert all(len(b.ids) == max(budget, max(b.lengths)) for b in prepared.batches)
    for i, got in zip(chosen, measure(processor, [texts[i] for i in chosen]), strict=True):
        expected = ALONE[processor][i]
        assert got.tobytes() == expected.tobytes(), (i, np.abs(got - expected).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("budget", [4096, 5000])
def test_nor_do_they_in_the_rest_of_a_large_budget(
    budget: int, dtype: str, processors: Callable[..., Processor], verses: list[str]
) -> None:
    processor = processors("tiny_bert", budget, dtype)
    texts = pool(verses) + verses[200:500]
    expected, sizes = measure(processor, texts), set()
    for n in (175, 225, 275, 325):
        chosen = texts[:n][::-1]
        batches = processor.measurer.preparer.prepare(chosen, [False] * n).batches
        assert len(batches) > 1
        sizes |= {len(batch.ids) for batch in batches}
        for got, one in zip(measure(processor, chosen), expected[:n][::-1], strict=True):
            assert got.tobytes() == one.tobytes()
    assert len(sizes) > 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_document_among_copies_of_itself_has_the_same_bits_in_each(
    dtype: str, processors: Callable[..., Processor], verses: list[str]
) -> None:
    processor = processors("minilm", 256, dtype)
    for text in (verses[0], "light", verses[30]):
        copies = measure(processor, [text, *verses[50:60], *[text] * 60])
        assert len({copies[i].tobytes() for i in (0, *range(11, 71))}) == 1


# --- budgets
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tiny_bert", "tiny_gpt", "tiny_llama", "tiny_mpnet"])
def test_every_budget_gives_the_same_strengths(
    kind: str, processors: Callable[..., Processor], verses: list[str]
) -> None:
    texts = [*pool(verses), ""]
    first = processors(kind, BUDGETS[0])
    special = first.measurer.preparer.encoder.template.num_special
    context = first.measurer.model.files.context_tokens
    exact = " ".join("a" * (context - special))
    texts += ["a", exact, exact + " a", "a", exact, ""]
    expected = measure(first, texts)
    lengths = [e.shape[1] for e in expected]
    assert (
        lengths[-6:] == [1 + special, context, context + 1, 1 + special, context, 0]
        and max(lengths) > 3 * context
    )
    assert first.measurer.model.packed == (kind != "tiny_mpnet")
    for budget in BUDGETS[1:]:
        for got, one in zip(measure(processors(kind, budget), texts), expected, strict=True):
            np.testing.assert_allclose(got, one, rtol=2e-5)
    for at in range(0, len(texts), 7):  # nor does it matter that they were together
        np.testing.assert_allclose(measure(first, [texts[at]])[0], expected[at], rtol=2e-5)


def measured_alone(processor: Processor, text: str) -> np.ndarray:
    known = SINGLE.setdefault(processor, {})
    if text not in known:
        (known[text],) = measure(processor, [text])
    return known[text]


@settings(max_examples=25, deadline=None)
@given(
    words=st.lists(st.integers(1, 150), min_size=1, max_size=30),
    budget=st.sampled_from(BUDGETS),
    data=st.data(),
)
def test_any_packing_gives_what_a_document_alone_gives(
    words: list[int],
    budget: int,
    data: st.DataObject,
    processors: Callable[..., Processor],
    verses: list[str],
) -> None:
    source = " ".join(verses[:60]).split()
    texts = []
    for i, n in enumerate(words):
        begin = 7 * (i % 3)
        texts.append(" ".join(source[begin : begin + n]))
    order = data.draw(st.permutations(range(len(texts))))
    for kind in ("tiny_bert", "tiny_gpt", "tiny_mpnet"):
        alone = processors(kind, 64)
        for i, got in zip(
            order, measure(processors(kind, budget), [texts[i] for i in order]), strict=True
        ):
            np.testing.assert_allclose(got, measured_alone(alone, texts[i]), rtol=2e-5)


# --- workers, order and threads
# --------------------------------------------------------------------------


def shards(config: RunConfig, tmp_path: Path, verses: list[str]) -> tuple[plans.Plan, RunConfig]:
    Path(config.corpus[0]).mkdir(exist_ok=True)
    texts = [v for verse in zip(verses[:120], verses[500:620], strict=True) for v in verse]
    write_jsonl(Path(config.corpus[0]) / "c.jsonl", [{"text": t} for t in [*texts, "", "light"]])
    return make_plan(config), config


def contents(commits: list[Commit]) -> dict[str, list[str]]:
    """Hash by shard of every byte of every table."""
    return {c.shard: [str(c.files[name]["sha256"]) for name in sorted(c.files)] for c in commits}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_files_have_the_same_bytes_whoever_makes_them_and_in_whichever_order(
    dtype: str,
    tmp_path: Path,
    make_config: MakeConfig,
    verses: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(feed, "CHUNK_BYTES", 1500)  # a few chunks in every shard
    attempt = SimpleNamespace(hex="a" * 32)  # files name theirs
    monkeypatch.setattr(worker, "uuid", SimpleNamespace(uuid4=lambda: attempt))
    plan, _ = shards(make_config(), tmp_path, verses)
    assert len(plan.shards) > 5
    made = []
    for name, workers, order in (
        ("one", 0, plan.shards),
        ("backwards", 0, plan.shards[::-1]),
        ("processes", 2, plan.shards),
    ):
        config = make_config(store=str(tmp_path / name), layers="all", tokenizer_workers=workers)
        processor = make_processor(config, dtype)
        made.append(contents([processor.process(shard) for shard in order]))
        processor.close()
    for shard in plan.shards[::2]:  # a worker that dies after each
        processor = make_processor(make_config(store=str(tmp_path / "fresh"), layers="all"), dtype)
        assert contents([processor.process(shard)])[shard.id] == made[0][shard.id]
        processor.close()
    assert made[0] == made[1] == made[2]
    assert len({tuple(files) for files in made[0].values()}) == len(plan.shards)


def test_threads_of_this_process_change_no_bit(
    processors: Callable[..., Processor], verses: list[str]
) -> None:
    processor = processors("minilm", 256)
    before = torch.get_num_threads()
    got = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            got.append(b"".join(values.tobytes() for values in measure(processor, verses[:30])))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert got[0] == got[1] == got[2]
