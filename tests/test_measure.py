"""Measure of a run, and the fingerprint of it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from afn_ray.fingerprints import fingerprint
from afn_ray.measure import Measure, StoredMeasure
from conftest import make_measure

STORE = Path(__file__).parent / "data" / "store"
EVERY_KEY = (
    "schema_version", "model", "model_type", "layers", "signals", "series", "window_tokens",
    "overlap_tokens",
    "offsets", "neuron_layers", "top_neurons", "dtype", "labels", "outliers", "neurons_above",
    "mean_types", "means",
)  # fmt: skip
"""Keys of a measure, in the order in which plans and run.json hold them."""


def kept() -> StoredMeasure:
    """The measure that the kept store's run recorded, with its id."""
    (run,) = (STORE / "runs").iterdir()
    measure: StoredMeasure = json.loads((run / "run.json").read_text())["measure"]
    return measure


def full_measure() -> Measure:
    """A measure that has every key."""
    return replace(
        make_measure([0, 8]),
        neuron_layers=(8,),
        top_neurons=2,
        labels="upos",
        outliers=((1, 2), (3, 4)),
        neurons_above=(1.5,),
        mean_types=(7, 9),
        means=("AACAPw==", "AAAAQA=="),
    )


def test_what_is_not_recorded_has_no_key() -> None:
    measure = make_measure([0, 8])
    plain = [key for key in EVERY_KEY[:12] if key not in ("neuron_layers", "top_neurons")]
    assert list(measure.as_dict()) == plain
    full = full_measure()
    assert tuple(full.as_dict()) == EVERY_KEY
    assert full.as_dict() == json.loads(json.dumps(full.as_dict()))  # JSON keeps every value
    assert full.tagged and not measure.tagged


def test_each_field_changes_the_id() -> None:
    measure = replace(make_measure([0, 8]), neuron_layers=(8,), top_neurons=2)
    others = [
        replace(measure, dtype="bfloat16"),
        replace(measure, labels="upos"),
        replace(measure, outliers=((1,), (2,))),
        replace(measure, neurons_above=(1.5,)),
        replace(measure, mean_types=(7,)),
        replace(measure, means=("AACAPw==", "AAAAQA==")),
        replace(measure, top_neurons=3),
        replace(measure, model=(("config.json", "abd"),)),
    ]
    assert len({m.id for m in (measure, *others)}) == 1 + len(others)
    assert measure.id == fingerprint(measure.as_dict()) == replace(measure).id


def test_the_measure_of_an_earlier_store_is_the_same_byte_for_byte() -> None:
    stored = kept()
    measure = Measure.of_dict(stored)
    assert measure.id == stored.pop("id")
    assert json.dumps(measure.as_dict()) == json.dumps(stored)
    (plan,) = STORE.glob("runs/*/plan.parquet")
    header = json.loads(pq.read_schema(plan).metadata[b"afn"])
    assert json.dumps(measure.as_dict()) == json.dumps(header["measure"])
    assert [path.name for path in (STORE / "shards").iterdir()] == [measure.id]


def test_a_measure_is_read_as_it_was_stored() -> None:
    for measure in (make_measure([0, 8]), full_measure()):
        stored = json.loads(json.dumps(measure.as_dict()))
        assert Measure.of_dict(stored) == measure
        assert Measure.of_dict(stored | {"id": measure.id, "of a later version": 1}) == measure


@pytest.mark.parametrize("key", [key for key in EVERY_KEY if key in make_measure().as_dict()])
def test_a_measure_without_a_key_is_refused_by_its_name(key: str) -> None:
    stored = make_measure().as_dict()
    del stored[key]  # type: ignore[misc]  # a key of the parameters
    with pytest.raises(KeyError, match=key):
        Measure.of_dict(stored)


def test_the_measure_loads_neither_torch_nor_ray() -> None:
    code = "import sys, afn_ray.runs.task; print({'torch', 'ray', 'transformers'} & {*sys.modules})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "set()\n", result.stderr
