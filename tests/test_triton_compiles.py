"""Every launch that the modules of kernels/ list compiles for sm_80, sm_90 and sm_100 within the limits."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", exc_type=ImportError)

from tests import ahead_of_time


@pytest.mark.parametrize("module", ahead_of_time.kernel_modules())
def test_kernels_compile(module: str) -> None:
    resources = ahead_of_time.compile_module(module)
    print(*resources, sep="\n")
    broken = [str(x) for x in resources if x.broken]
    assert not broken, "\n".join(broken)
    assert {x.architecture for x in resources} == set(ahead_of_time.ARCHITECTURES)
