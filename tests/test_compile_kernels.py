"""Every kernel compiles for a Hopper GPU that is not there, within its limits; scripts/compile_kernels.py says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from checkout import ROOT

pytestmark = pytest.mark.usefixtures("kernel_device")
SCRIPT = ROOT / "scripts" / "compile_kernels.py"
RESULTS = sorted((ROOT / "docs").glob("kernel_resources_triton_*.json"))
# Two lines as Triton 3.6.0 and 3.9.0 write them: a product's result transposed, and a tile transposed in shared memory.
TRANSPOSED = "%3 = tt.trans %2 {order = array<i32: 1, 0>} : tensor<64x64xbf16, #mma> -> tensor<64x64xbf16, #linear>"
HONEST = "%s_10 = ttg.memdesc_trans %s {order = array<i32: 1, 0>} : !ttg.memdesc<64x64xbf16, #shared, #smem>"


@pytest.fixture
def script() -> ModuleType:
    import compile_kernels

    return compile_kernels


@pytest.mark.slow
def test_the_main_shapes_compile_without_spills_within_shared_memory(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(SCRIPT), "--shapes", "main", "--json", "out.json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    kernels = json.loads((tmp_path / "out.json").read_text("utf-8"))["kernels"]
    assert len({kernel["kernel"] for kernel in kernels}) == 14
    assert all(kernel["spills"] == kernel["stack"] == 0 for kernel in kernels)


def test_what_must_not_be_in_a_kernel_is_found(script: ModuleType) -> None:
    assert script.transposes_a_product(TRANSPOSED)
    assert not script.transposes_a_product(HONEST)
    fine = script.Resources(registers=255, stack=0, shared=227 * 1024, spills=0, tensor_core=4, transposed=False)
    assert script.faults(fine, main=True) == []
    for fault in ({"shared": 227 * 1024 + 1}, {"spills": 1}, {"stack": 8}, {"transposed": True}):
        assert script.faults(fine._replace(**fault), main=True)
    assert script.faults(fine._replace(spills=1), main=False) == []


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_committed_tables_hold_every_shape_and_no_fault(path: Path, script: ModuleType) -> None:
    result = json.loads(path.read_text("utf-8"))
    assert result["faults"] == result["missing"] == []
    assert path.stem.endswith(result["triton"])
    rows = result["kernels"]
    columns = {"kernel", *script.Resources._fields}
    found = [{k: v for k, v in row.items() if k not in columns} for row in rows]
    assert all({name: str(value) for name, value in shape.items()} in found for shape in script.ALL)
    assert all(shape in [{k: str(v) for k, v in one.items()} for one in script.ALL] for shape in found)
