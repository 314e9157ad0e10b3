"""Arithmetic that gives the same bits on every machine, and so the salience made with it."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest

from afn_ray.reduce import arithmetic
from afn_ray.reduce.stats import Float64s

SALIENCE = """
import hashlib
import numpy as np
import pyarrow as pa
from afn_ray.reduce.controls import ControlCounter, Controls, frequency_bins, places_of
from afn_ray.reduce.salience import salience_table

draws = (np.arange(60_000) * 2_654_435_761) % (1 << 32)  # whole numbers, of no generator
types = (1500 * (draws / (1 << 32)) ** 3).astype(np.int32)
lengths = np.full(1500, 40)
docs = np.repeat(np.arange(1500, dtype=np.int32), lengths)
n = np.bincount(types)
high = [draws % 1009 < 400 + 30 * (types % 7) + 60 * (docs % 3), types % 5 == 0]
counter = ControlCounter(Controls((1.0, 1.0), frequency_bins(n)))
strengths = [which.astype(np.float32) for which in high]
counter.add(docs, types, places_of(np.arange(60_000) % 40, lengths[docs]), strengths)
pairs = np.unique(docs.astype(np.int64) * len(n) + types)
there = np.flatnonzero(n)
rows = [
    pa.table({
        "layer": np.full(len(there), layer, np.int16), "token_id": there.astype(np.int32),
        "class": ["content"] * len(there), "n": n[there],
        "n_docs": np.bincount(pairs % len(n), minlength=len(n))[there],
        "n_high": np.bincount(types[which], minlength=len(n))[there],
    })
    for layer, which in enumerate(high)
]
found = salience_table((0, 1), pa.concat_tables(rows), frequency_bins(n), counter.sums().flat())
columns = [found[name].to_numpy().tobytes() for name in found.column_names]
print(hashlib.sha256(b"".join(columns)).hexdigest())
"""
"""Code that prints a digest of the salience of a corpus of whole numbers."""
DIGEST = "256231428fdefa52a5577d9c03beea42e6326be75cb7eefc7b672c6a8ce424c1"
"""The digest on any machine."""


def simd_of_this_machine() -> str:
    """Names of the CPU features that numpy has code of its own for, and uses here."""
    config = np.show_config(mode="dicts")
    assert isinstance(config, dict)
    return " ".join(config["SIMD Extensions"].get("found", []))


@pytest.mark.parametrize(
    "machine",
    [
        {},
        {"NPY_DISABLE_CPU_FEATURES": simd_of_this_machine()},
        {"OPENBLAS_CORETYPE": "Prescott"},
        {"OPENBLAS_CORETYPE": "Haswell"},
        {"GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX512F,-AVX2,-FMA,-FMA4"},
    ],
    ids=["all", "numpy", "Prescott", "Haswell", "libm"],
)
def test_salience_has_the_same_bits_on_machines_with_fewer_features(
    machine: dict[str, str],
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SALIENCE],
        env=os.environ | machine,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == DIGEST


@pytest.mark.parametrize(
    ("ours", "exact", "x"),
    [
        (arithmetic.exp, math.exp, np.linspace(-40, 40, 8001)),
        (arithmetic.exp, math.exp, np.linspace(-700, 700, 8001)),
        (arithmetic.log2, math.log2, np.arange(1.0, 8000)),
        (arithmetic.log2, math.log2, np.geomspace(1e-300, 1e300, 8001)),
        (arithmetic.softplus, lambda x: math.log1p(math.exp(x)), np.linspace(-700, 700, 8001)),
    ],
)
def test_functions_are_those_of_the_standard_library(
    ours: Callable[[Float64s], Float64s], exact: Callable[[float], float], x: Float64s
) -> None:
    np.testing.assert_allclose(ours(x), [exact(one) for one in x.tolist()], rtol=2e-15, atol=0)


def test_powers_of_two_have_exact_logarithms_and_large_arguments_are_cut() -> None:
    powers = np.arange(-60.0, 60.0)
    np.testing.assert_array_equal(arithmetic.log2(2.0**powers), powers)
    ends = arithmetic.exp(np.array([-np.inf, -800.0, 0.0, 800.0, np.inf]))
    assert ends[0] == ends[1] > 0 and ends[2] == 1 and ends[3] == ends[4] < np.inf


@pytest.mark.parametrize("n", [0, 1, 2, 3, 7, 8, 1000, 20_001])
def test_sums_are_those_of_the_standard_library(n: int) -> None:
    values = np.random.default_rng(n).normal(size=(3, n))
    before = values.copy()
    expected = [math.fsum(row) for row in values]
    np.testing.assert_allclose(arithmetic.total(values), expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(values, before)


@pytest.mark.parametrize("n", [1, 5, 20_001])
def test_products_and_solutions_are_those_of_numpy(n: int) -> None:
    rng = np.random.default_rng(n)
    rows, weights = rng.normal(size=(6, n)), rng.random(n)
    gram = arithmetic.gram(rows, weights)
    np.testing.assert_allclose(gram, (rows * weights) @ rows.T, rtol=1e-10, atol=1e-10)
    np.testing.assert_array_equal(gram, gram.T)
    matrix = gram + np.eye(6)
    np.testing.assert_allclose(
        arithmetic.quadratic(rows, matrix), ((matrix @ rows) * rows).sum(axis=0), rtol=1e-10
    )
    np.testing.assert_allclose(arithmetic.multiplied(matrix, rows), matrix @ rows, rtol=1e-9)
    lower = arithmetic.cholesky(matrix)
    np.testing.assert_allclose(lower, np.linalg.cholesky(matrix), rtol=1e-9, atol=1e-12)
    right = rng.normal(size=6)
    np.testing.assert_allclose(
        arithmetic.solved(lower, right), np.linalg.solve(matrix, right), rtol=1e-8
    )
    np.testing.assert_allclose(
        arithmetic.inverse(lower), np.linalg.inv(matrix), rtol=1e-8, atol=1e-12
    )
