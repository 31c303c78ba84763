"""Every launch that the modules of kernels/ list compiles for sm_80, sm_90 and sm_100 within the limits."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", exc_type=ImportError)

from gcng.kernels import launch
from tests import ahead_of_time


@pytest.mark.timeout(1800)  # about 1.5 s for each kernel and architecture on an idle machine
@pytest.mark.parametrize("module", ahead_of_time.kernel_modules())
def test_kernels_compile(module: str) -> None:
    resources = ahead_of_time.compile_module(module)
    print(*resources, sep="\n")
    broken = [str(x) for x in resources if x.broken]
    assert not broken, "\n".join(broken)
    assert {x.architecture for x in resources} == set(ahead_of_time.ARCHITECTURES)


SPILLING_LOOP = """
        /*0010*/                   LDL R1, [R2] ;
        /*0020*/                   HGMMA.64x128x16.F32 R24, gdesc[UR4], R24 ;
        /*0030*/                   STL [R2], R1 ;
        /*0040*/              @!P0 BRA 0x10 ;
        /*0050*/                   LDL R3, [R2] ;
        /*0060*/                   BRA 0x60 ;
"""


def test_spills_are_counted_where_they_are() -> None:
    code = [(int(address, 16), text) for address, text in ahead_of_time.INSTRUCTION.findall(SPILLING_LOOP)]
    assert ahead_of_time._spills(code) == (3, 2)
    assert ahead_of_time._spills(code[1:2] + code[3:]) == (1, 0)


HALF_PRODUCT = "%5 = tt.dot %3, %4, %2 : tensor<64x64xbf16> * tensor<64x64xbf16> -> tensor<64x64xf32>"
FLOAT_PRODUCT = "%5 = tt.dot %3, %4, %2 : tensor<64x64xf32> * tensor<64x64xf32> -> tensor<64x64xf32>"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({}, None),
        ({"shared": 228 * 1024}, "bytes of shared memory"),
        ({"spills": (4, 1)}, "in a loop around products"),
        ({"spills": (65, 0)}, "65 spills"),
        ({"ptx": "wgmma.mma_async mma.tf32"}, "tf32 in the PTX"),
        ({"ptx": "mma.sync"}, "no wgmma.mma_async"),
        ({"ptx": "mma.sync", "ttir": FLOAT_PRODUCT}, None),
        ({"arch": 80, "ptx": "mma.sync"}, "no cp.async"),
        ({"arch": 80, "ptx": "mma.sync cp.async"}, None),
    ],
)
def test_rules_can_be_broken(changes: dict, complaint: str | None) -> None:
    given = {"arch": 90, "shared": 1024, "spills": (0, 0), "ptx": "wgmma.mma_async", "ttir": HALF_PRODUCT, **changes}
    case = launch.CompilationCase("planted", lambda: None)
    assembly = {"ptx": given["ptx"], "ttir": given["ttir"]}
    broken = ahead_of_time.broken_rules(case, "kernel", given["arch"], assembly, given["shared"], given["spills"])
    assert [complaint in line for line in broken] == ([] if complaint is None else [True])
