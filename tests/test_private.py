"""Private parts of libraries that afn-ray uses are there; pyproject.toml bounds their versions from
above.
"""

from __future__ import annotations

import ast
import mmap
import re
import tomllib
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from pathlib import Path

import pytest
import ray
import torch
from packaging.requirements import Requirement
from packaging.version import Version

from afn_ray.nvidia import DRIVERS
from afn_ray.show import doctor

PRIVATE = {
    "ray": [
        ("ray._private.ray_constants", "ENABLE_RAY_CLUSTER"),
        ("ray._private.node", "Node.start_monitor"),
        ("ray._private.node", "Node.start_log_monitor"),
        ("ray._private.node", "Node.start_api_server"),
        ("ray._private.state", "state.actor_table"),
        ("ray._private.state", "state.get_draining_nodes"),
        ("ray._private.state", "state._connect_and_get_accessor"),
        ("ray._private.utils", "get_num_cpus"),
        ("ray.actor", "ActorHandle._actor_id"),
    ],
    "fsspec": [("fsspec.asyn", "AsyncFileSystem._find")],
    "torch": [
        ("torch", "ops.mkldnn._linear_pointwise"),
        ("torch", "ops.mkldnn._reorder_linear_weight"),
        ("torch", "cuda._is_in_bad_fork"),
        # Of the simulated GPU of the tests.
        ("torch", "Tensor._make_wrapper_subclass"),
        ("torch._C", "DisableTorchFunctionSubclass"),
        ("torch.utils._python_dispatch", "TorchDispatchMode"),
        ("torch.utils._pytree", "tree_map"),
    ],
    "transformers": [
        ("transformers", "BertModel._can_record_outputs"),
        ("transformers", "BertModel._can_set_attn_implementation"),
        ("transformers", "PreTrainedConfig._attn_implementation"),
        ("transformers.modeling_gguf_pytorch_utils", "tqdm"),
    ],
}
PUBLIC_IN_SPITE_OF_THEIR_NAMES = {"_asdict", "_exit", "_fields", "_replace", "_SubParsersAction"}
"""Documented names of the standard library, and a type of argparse that only annotations name."""
PROJECT = Path(__file__).parents[1] / "pyproject.toml"


@pytest.mark.parametrize(
    ("module", "name"), [part for parts in PRIVATE.values() for part in parts], ids=str
)
def test_a_private_part_that_is_used_is_there(module: str, name: str) -> None:
    part = import_module(module)
    for attribute in name.split("."):
        part = getattr(part, attribute)
    assert part is not None


def test_a_pool_lists_its_processes() -> None:
    """``tokens.feed`` watches and ends them."""
    project = tomllib.loads(PROJECT.read_text())["project"]
    assert ",<" in project["requires-python"]
    with ProcessPoolExecutor(1) as pool:
        assert dict(pool._processes or {}) == {}


def test_no_other_private_part_is_used() -> None:
    """A name counts as ours if the package defines it anywhere."""
    listed = {name.rpartition(".")[2] for parts in PRIVATE.values() for _, name in parts}
    listed |= {"_processes", *PUBLIC_IN_SPITE_OF_THEIR_NAMES}
    ours, used = set[str](), set[str]()
    for path in (PROJECT.parent / "afn_ray").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            match node:
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                    ours.add(name)
                case ast.AnnAssign(target=ast.Name(id=name)):
                    ours.add(name)
                case ast.Attribute(attr=name, ctx=ast.Store()):
                    ours.add(name)
                case ast.Attribute(attr=name):
                    used.add(name)
                case ast.Call(
                    func=ast.Name(id="getattr" | "hasattr" | "setattr"),
                    args=[_, ast.Constant(value=str(name)), *_],
                ):
                    used.add(name)
    private = {name for name in used - ours if name.startswith("_") and not name.endswith("__")}
    assert private - listed == set()
    assert private > {"_linear_pointwise", "_can_record_outputs", "_actor_id"}


def test_ray_has_the_option_that_starts_no_process_beforehand() -> None:
    """``access.choose_token`` sets it for a local Ray."""
    raylet = Path(ray.__file__).parent / "core" / "src" / "ray" / "raylet" / "raylet"
    with raylet.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as program:
        assert program.find(b"RAY_prestart_worker_first_driver") >= 0


@pytest.mark.parametrize("package", PRIVATE)
def test_a_package_whose_private_parts_are_used_is_bounded_from_above(package: str) -> None:
    project = tomllib.loads(PROJECT.read_text())["project"]
    required = next(r for r in project["dependencies"] if r.startswith(f"{package}>="))
    assert ",<" in required


def test_the_oldest_torch_is_the_oldest_with_flash_attention() -> None:
    """Requirements, pins and pages name the same torch."""
    project = tomllib.loads(PROJECT.read_text())["project"]
    (required,) = (Requirement(r) for r in project["dependencies"] if r.startswith("torch>"))
    (oldest,) = (s.version for s in required.specifier if s.operator == ">=")
    constraints = (PROJECT.parent / "constraints.txt").read_text()
    (pinned,) = re.findall(r"^torch==(.+)$", constraints, re.M)
    assert pinned in required.specifier and Version(torch.__version__).public in required.specifier
    assert f"torch {oldest} or newer" in doctor._faster(packed=True)
    guide = (PROJECT.parent / "infra" / "guide" / "engine.md").read_text("utf-8")
    page = " ".join(guide.split())
    assert f"compute capability 8.0 (Ampere) and torch {oldest}, the oldest that afn" in page
    assert f"The wheels of torch from {oldest} on need NVIDIA's driver {DRIVERS[13]}." in page
    readme = (PROJECT.parent / "README.md").read_text("utf-8")
    assert f"NVIDIA's driver {DRIVERS[13]} or newer" in readme
    # The pinned triton is that of the pinned torch's wheel for CUDA.
    assert pinned.startswith("2.13.") and "\ntriton==3.7.1\n" in constraints


def test_the_cluster_extra_asks_for_the_ray_of_the_package() -> None:
    project = tomllib.loads(PROJECT.read_text())["project"]
    required = next(r for r in project["dependencies"] if r.startswith("ray>="))
    (extra,) = project["optional-dependencies"]["cluster"]
    assert extra == required.replace("ray", "ray[default]", 1)
