"""The salience of words is that of types where every word is a type of its own."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from afn_ray.reduce import word_tables
from afn_ray.reduce.controls import ControlCounter, Controls, frequency_bins, places_of
from afn_ray.reduce.salience import salience_table
from afn_ray.reduce.tasks import Inline
from afn_ray.reduce.word_salience import COLUMNS
from afn_ray.reduce.word_sums import WordCounter, WordRules, WordTokens
from afn_ray.schema import WORD_START

NUM_TYPES, NUM_DOCS = 60, 80
Q3 = (1.0, 1.2)


@pytest.mark.parametrize("num_parts", [1, 4])
def test_words_of_one_token_have_the_salience_of_their_types(
    num_parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(word_tables, "LEAST_N", 1)
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 40, NUM_DOCS)
    docs = np.repeat(np.arange(NUM_DOCS, dtype=np.int32), lengths)
    positions = np.concatenate([np.arange(n) for n in lengths])
    share = np.arange(1, NUM_TYPES + 1) ** -1.0
    types = rng.choice(NUM_TYPES, len(docs), p=share / share.sum()).astype(np.int32)
    strengths = [rng.gamma(3, 0.4, len(docs)).astype(np.float32) for _ in Q3]
    places = places_of(positions, lengths[docs])
    texts = [f"w{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(NUM_TYPES)]

    n = np.bincount(types, minlength=NUM_TYPES)
    by_type = ControlCounter(Controls(Q3, frequency_bins(n)))
    by_type.add(docs, types, places, strengths)
    there = np.flatnonzero(n)
    n_docs = np.array([len(set(docs[types == i].tolist())) for i in there])
    tables = []
    for layer, (values, q3) in enumerate(zip(strengths, Q3, strict=True)):
        n_high = np.bincount(types[values >= np.float32(q3)], minlength=NUM_TYPES)[there]
        columns = {"token_id": there, "n": n[there], "n_docs": n_docs, "n_high": n_high}
        of_layer = {"layer": np.full(len(there), layer), "class": ["content"] * len(there)}
        tables.append(pa.table({**of_layer, **columns}))
    expected = salience_table(
        [0, 1], pa.concat_tables(tables), frequency_bins(n), by_type.sums().flat()
    )

    counter = WordCounter(WordRules(texts, Q3, False, num_parts))
    none = pa.nulls(len(docs), pa.string()).dictionary_encode()
    flags = np.full(len(docs), WORD_START, np.uint8)
    counter.add(WordTokens(docs, types, flags, strengths, none, None, places))
    described = word_tables.Described([0, 1], Q3, NUM_DOCS, "en", False, texts)
    found = word_tables.word_vocabulary(counter.sums(), described, Inline())
    assert found["word"].to_pylist() == [texts[i] for i in there] * 2
    for name in COLUMNS:
        np.testing.assert_array_equal(found[name].to_numpy(), expected[name].to_numpy())
