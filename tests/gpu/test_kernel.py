"""The Triton kernel gives what torch gives, in triton's interpreter, and compiles for each kind of
GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from afn_ray.model import fused
from families import SMALL

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def triton() -> Any:
    """triton, which takes 0.7 GB, so that no extra names it; CI never skips this."""
    if importlib.util.find_spec("triton") is None:
        why = "no triton here: pip install --no-deps -c constraints.txt triton"
        pytest.fail(why) if os.environ.get("CI") else pytest.skip(why)
    return importlib.import_module("triton")


def test_in_its_interpreter_the_kernel_gives_what_torch_gives() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("interpreted.py"))],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert re.search(r"^\d+ passed in", done.stdout, re.M)  # and none is skipped


@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize("width", [SMALL["hidden_size"], 768, fused.WIDEST])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_the_kernel_compiles_without_spilling_registers(
    dtype: str,
    width: int,
    capability: int,
    triton: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    module = importlib.import_module("afn_ray.model.fused_kernel")
    compiler = importlib.import_module("triton.backends.compiler")
    pointers = ["added", "residual", "gain", "bias", "full", "cast"]
    types = dict.fromkeys(pointers, "*fp32") | {
        "added": f"*{dtype}",
        "cast": f"*{dtype}",
    }
    block, num_warps = module.block_of(width)
    source = triton.compiler.ASTSource(
        fn=module.add_norm_cast_row,
        signature=types | {"eps": "fp32", "NUM_COLUMNS": "constexpr", "BLOCK": "constexpr"},
        constexprs={"NUM_COLUMNS": width, "BLOCK": block},
        # Tensors of torch begin at multiples of 16 bytes.
        attrs={(at,): [["tt.divisibility", 16]] for at in range(len(pointers))},
    )
    made = triton.compile(
        source,
        target=compiler.GPUTarget("cuda", capability, 32),
        options={"num_warps": num_warps},
    )
    assert re.search(rf"^\.target sm_{capability}a?$", made.asm["ptx"], re.M)
    rounded = {"fp16": "f16", "bf16": "bf16"}[dtype]
    assert re.search(rf"cvt\.rn\.{rounded}(x2)?\.f32", made.asm["ptx"])
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(made.asm["cubin"])
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    told = subprocess.run(
        [tools / "cuobjdump", "--dump-resource-usage", cubin],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    (stack,) = re.findall(r"STACK:(\d+)", told)
    assert stack == "0"
