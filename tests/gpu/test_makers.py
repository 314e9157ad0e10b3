"""A commit says what measured its shard, and a run whose shards were measured in several ways says
so.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

import afn_ray
import simulated
from afn_ray import model, nvidia, text
from afn_ray.analysis.verify import lines
from afn_ray.errors import ModelError
from afn_ray.model import device
from afn_ray.provenance import cpu_name
from afn_ray.show import run_facts, summary
from afn_ray.store import manifest
from afn_ray.store.commits import Commit, Commits, describe_makers, provenance_of
from conftest import config_of, edit_checksummed, find_model
from test_families import documents

H200 = {"device": "cuda", "gpu": "NVIDIA H200", "capability": "9.0", "attention": "flash"}
T4 = {"device": "cuda", "gpu": "Tesla T4", "capability": "7.5", "attention": "sdpa",
      "why": "flash attention is refused: [red]no[/red]"}  # fmt: skip
MIXED = {
    "NVIDIA H200 (compute capability 9.0), attention flash": 2,
    "Tesla T4 (compute capability 7.5), attention sdpa": 1,
}


def test_a_model_on_a_gpu_says_how_it_computes(tiny_bert: Path) -> None:
    probes = [documents(3, [n])[0] for n in (4, 9)]
    with simulated.device():
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
        loaded = model.Model(find_model(tiny_bert), [2], "float16", "cuda", 64)
        model.prepare(loaded, probes)
        assert loaded.maker == {
            "attention": "flash",
            "dtype": "float16",
            "norm": "eager",
            "why_eager": loaded.why_eager,
            "final_norm": "none",
            "gpu": "NVIDIA H200",
            "capability": "9.0",
            "reduced": "none",  # of its own accord: neither TF32 nor sums in half precision
        }
        assert loaded.why_eager
        torch.backends.cudnn.allow_tf32 = True
        assert loaded.maker["reduced"] == "tf32"
        device.pin_rounding("cuda")
    with simulated.device(gpu=simulated.T4):
        loaded = model.Model(find_model(tiny_bert), [2], "float16", "cuda", 64)
        model.prepare(loaded, probes)
        assert loaded.maker["attention"] == "sdpa"
        assert loaded.maker["why"].startswith("flash attention is refused: FlashAttention only")
    on_cpu = model.Model(find_model(tiny_bert), [2], "float32", "cpu", 64)
    model.prepare(on_cpu, probes)
    assert on_cpu.maker == {
        "attention": "float32",
        "dtype": "float32",
        "final_norm": "none",
        "cpu": cpu_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def commit_of(**made_by: str) -> Commit:
    return Commit("0" * 32, "1" * 16, {}, {}, 1.0, made_by)


def makers_of(commits: list[Commit]) -> dict[str, int]:
    return describe_makers(provenance_of(commits))


def test_makers_are_counted_by_gpu_and_attention() -> None:
    versions = {"torch": "2.13.0"}
    commits = [commit_of(**T4), commit_of(**H200), commit_of(**H200, **versions)]
    assert list(makers_of(commits).items()) == list(MIXED.items())
    packed = Commits()
    packed |= Commits()
    packed["0" * 32] = commits[0]
    assert packed["0" * 32] == commits[0]
    # Older commits have only device and versions.
    older = [commit_of(device="cuda"), commit_of(device="cpu"), commit_of(device="cpu")]
    unknown = "an unknown GPU (compute capability ?), attention ?"
    assert makers_of(older) == {"cpu": 2, unknown: 1}
    # Norms differ where they are fused; older commits do not name them.
    norms = [commit_of(**H200), commit_of(**H200, norm="eager"), commit_of(**H200, norm="fused")]
    ways = "NVIDIA H200 (compute capability 9.0), attention flash"
    assert makers_of(norms) == {ways: 2, f"{ways}, norms fused": 1}
    # Mixtures differ by the dtype of their experts, which was float32 before commits named it.
    mixtures = [commit_of(device="cpu", experts=dtype) for dtype in ("bfloat16", "float32")]
    named = makers_of([*mixtures, commit_of(device="cpu")])
    assert named == {"cpu": 2, "cpu, experts in bfloat16": 1}
    reduced = commit_of(**H200, reduced="tf32")
    assert next(iter(makers_of([reduced]))).endswith("reduced precision in tf32")


def test_a_run_measured_in_several_ways_says_so(
    tiny_bert: Path, corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with afn_ray.run(config_of(tiny_bert, corpus, tmp_path / "one", layers="2")) as run:
        facts = dict(run_facts.facts(summary.summarise(manifest.find_run(run.uri))))
        cpu = f"{cpu_name()} ({torch.backends.cpu.get_cpu_capability()})"
        assert run.info["makers"] == {cpu: 1} and facts["measured on"] == cpu
        assert not afn_ray.verify_store(run.uri).mixed

    ways = itertools.cycle([H200, H200, T4])
    monkeypatch.setattr(model.Model, "maker", property(lambda self: next(ways)))
    several = config_of(tiny_bert, corpus, tmp_path / "several", layers="2", shard_bytes=2000)
    with afn_ray.run(several) as run:
        makers, uri = run.info["makers"], run.uri
    n = sum(makers.values())
    assert list(makers) == list(MIXED) and n == run.info["counts"]["shards"] > 2
    read = summary.summarise(manifest.find_run(uri))
    shown_facts = dict(run_facts.facts(read))
    num_slow, shown = list(makers.values())[1], shown_facts["measured on"]
    slow = f"{text.count(num_slow, 'shard')} by sdpa, since {T4['why']}"
    assert shown_facts["attention"] == slow and "norm" not in shown_facts
    for maker, shards in makers.items():
        assert f"{shards} shard" in shown and maker in shown
    assert "measured in 2 ways" in run_facts.cautions(read)[0]
    found = afn_ray.verify_store(uri)
    assert found.mixed == {uri: makers} and not found.findings
    (line,) = [line for line in lines(found) if line.startswith("mixed")]
    assert all(maker in line for maker in makers)

    edit_checksummed(f"{uri}/run.json", lambda info: info["makers"].clear())
    (finding,) = afn_ray.verify_store(uri).findings
    assert finding.uri == f"{uri}/run.json" and "its makers are {}" in finding.message


@pytest.mark.parametrize(
    ("cuda", "driver", "says"),
    [
        (None, "580.65.06", r"torch \S+ is built without CUDA: install a CUDA build"),
        ("13.0", None, "CUDA 13.0, which needs NVIDIA's driver 580 or newer, and there is no"),
        ("13.0", "550.54.15", "driver 580 or newer, and the driver is 550.54.15: update it"),
        ("12.8", "550.54.15", "sees no GPU with driver 550.54.15: check CUDA_VISIBLE_DEVICES"),
    ],
)
@pytest.mark.parametrize("module", ["Kernel Module", "Open Kernel Module for x86_64"])
def test_a_worker_without_a_usable_gpu_says_why_in_one_line(
    module: str,
    cuda: str | None,
    driver: str | None,
    says: str,
    tiny_bert: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "version"
    if driver is not None:
        file.write_text(
            f"NVRM version: NVIDIA UNIX {module}  {driver}  Release Build\nGCC 13.2.0\n"
        )
    monkeypatch.setattr(nvidia, "DRIVER_FILE", file)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(ModelError, match=says) as raised:
        model.Model(find_model(tiny_bert), [2], "float16", "cuda", 64)
    assert "\n" not in str(raised.value) and "--device cpu" in str(raised.value)
