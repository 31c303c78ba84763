"""Time of one whole iteration per provider, and of the yardstick product, taking turns in one run.

pytest benchmarks/bench_iteration.py times one small setting; python -m benchmarks.measure times all of them.
"""

from __future__ import annotations

import torch

from benchmarks.settings import GEMM_ROWS

GEMM_CALLS = 15  # per turn; the median of all turns is the rate


def test_iteration(benchmark, preparation, case):
    """One timed call of a provider after the gate; the losses must be those that the gate has seen."""
    benchmark.extra_info.update(provider=case.provider, setting=case.setting.as_dict(), round=case.round)
    if case.provider == "gemm":
        product = benchmark.pedantic(preparation.gemm(case), rounds=GEMM_CALLS)
        assert product.shape == (GEMM_ROWS, 4 * case.setting.embedding_size)
        return
    outcome = benchmark.pedantic(preparation.ready(case), rounds=1)
    benchmark.extra_info["relative_error"] = preparation.errors[case.provider]
    for name, loss in preparation.outcomes[case.provider].losses.items():
        if case.setting.dropout == 0:
            assert torch.allclose(outcome.losses[name], loss, rtol=1e-5, atol=1e-6), name
        assert torch.isfinite(outcome.losses[name]), name
