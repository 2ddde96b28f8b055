"""Resources of compiled kernels: parsing, limits and table of benchmarks.gpu.triton_resources."""

from __future__ import annotations

import importlib

import pytest

pytest.importorskip("triton", exc_type=ImportError)
NVIDIA = """ptxas info    : Compiling entry function 'affine_flow_forward_kernel' for 'sm_90a'
ptxas info    : Function properties for affine_flow_forward_kernel
    8 bytes stack frame, 8 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 8 bytes cumulative stack size
"""
SERIALIZED = "(C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized"
AMD = """amdhsa.kernels:
  - .agpr_count:     0
    .private_segment_fixed_size: 276
    .sgpr_count:     30
    .vgpr_count:     112
    .vgpr_spill_count: 3
"""


@pytest.fixture
def tool():
    return importlib.import_module("benchmarks.gpu.triton_resources")


def test_reads_both_vendors(tool):
    assert tool.parsed(NVIDIA, 4096) == tool.Resources(registers=128, stack=8, shared=4096)
    assert tool.parsed(AMD, 512) == tool.Resources(registers=112, stack=276, shared=512)


def test_complains_of_warnings(tool):
    found = tool.parsed(f"ptxas info    : {SERIALIZED} in the function 'f'\n{NVIDIA}", 0)._replace(stack=0)
    assert tool.complaint(found, "sm_90") == f"ptxas on sm_90: {SERIALIZED} in the function 'f'"


def test_complains_of_spills_and_of_shared_memory(tool):
    assert tool.complaint(tool.Resources(255, 0, 232448), "sm_90") is None
    assert tool.complaint(tool.Resources(255, 8, 0), "sm_100") == "8 bytes of stack per thread on sm_100"
    assert tool.complaint(tool.Resources(64, 0, 166913), "sm_80").startswith("166913 bytes of shared memory")
    assert tool.complaint(tool.Resources(64, 276, 65536), "gfx942") == "276 bytes of stack per thread on gfx942"
    assert tool.complaint(tool.Resources(64, 276, 65536), "gfx942", 276) is None
    assert tool.complaint(tool.Resources(64, 277, 65536), "gfx942", 276) is not None


def test_complains_of_products_in_tf32(tool):
    assert tool.complaint(tool.Resources(64, 0, 0, tf32=True), "sm_90") == "products in tf32 on sm_90"


SASS = """Function:f
--:-:-:-:0\tS2R R0, SR_TID.X
LBB0:
--:-:-:-:0\tLDG.E.128 R4, desc[UR4][R2.64]
--:-:-:-:0\t@P0 BRA LBB0;
LBB1:
--:-:-:-:0\tLDGSTS.E.BYPASS.LTC128B.128 [R1], desc[UR4][R2.64]
--:-:-:-:0\t@P1 LDGSTS.E.64 [R1], desc[UR4][R2.64]
--:-:-:-:0\tLDG.E R4, desc[UR4][R2.64]
--:-:-:-:0\t@!P0 BRA LBB1;
--:-:-:-:0\tLDG.E R4, desc[UR4][R2.64]
LBB2:
--:-:-:-:0\tBRA LBB2;
"""


def test_loops_that_wait_and_bytes_in_flight(tool):
    found = tool.loops(SASS, 4, 3)
    assert found == (1, (16 + 8) * 128 * 2)
    resources = tool.Resources(64, 0, 0, loops=found)
    assert tool.complaint(resources, "sm_90", bound=tool.Loops(1, 6144)) is None
    assert tool.complaint(resources, "sm_90", bound=tool.Loops(0, 6144)) is not None
    assert tool.complaint(resources, "sm_90", bound=tool.Loops(1, 6145)) == (
        "1 loops wait for memory, 6144 bytes are in flight on sm_90"
    )


def test_table_has_a_row_per_kernel_and_the_numbers_of_each_version(tool):
    found = [{(k, t): tool.Resources(n, 2, 3) for k in ("a", "b") for t in ("sm_80", "sm_90")} for n in (1, 4)]
    found[1]["b", "sm_90"] = tool.Resources(1, 2, 3)
    assert tool.table(found, ["sm_80", "sm_90"]).splitlines() == [
        "| kernel | sm_80 | sm_90 |",
        "|---|---|---|",
        "| a | 1, 4 / 2 / 3 | 1, 4 / 2 / 3 |",
        "| b | 1, 4 / 2 / 3 | 1 / 2 / 3 |",
    ]


def test_keeps_what_other_versions_gave(tool, monkeypatch, tmp_path):
    path = tmp_path / "new" / "results.json"
    first, second = ({("a", "sm_90"): tool.Resources(n, 0, 3)} for n in (1, 2))
    monkeypatch.setattr(tool.triton, "__version__", "3.9.0")
    assert tool.kept(path, first) == {"3.9.0": first}
    monkeypatch.setattr(tool.triton, "__version__", "3.6.0")
    assert list(tool.kept(path, second).items()) == [("3.6.0", second), ("3.9.0", first)]


def test_other_kernels_are_not_mixed_in(tool, monkeypatch, tmp_path):
    path, found = tmp_path / "results.json", {("b", "sm_90"): tool.Resources(1, 0, 3)}
    monkeypatch.setattr(tool.triton, "__version__", "3.9.0")
    tool.kept(path, {("a", "sm_90"): tool.Resources(1, 0, 3)})
    monkeypatch.setattr(tool.triton, "__version__", "3.6.0")
    assert tool.kept(path, found) == {"3.6.0": found}
