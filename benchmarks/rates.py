"""What this machine can do at all: rate of a matrix product by width and precision, and of a copy."""

from __future__ import annotations

import statistics
import sys

import torch

from benchmarks import machine
from benchmarks.operations import PRECISIONS, Clock, precision_mode
from benchmarks.results import open_results

GEMM_ROWS = 1024  # of the yardstick (rows, D) @ (D, 4 D) on a CPU: a panel of pairs times the edge MLP
GPU_ROWS = 8448
GEMM_CALLS = 5
COPY_BYTES = 2**28
GPU_COPY_BYTES = 2**32
PRODUCTS = {"cpu": ("float32", "float64", "bfloat16"), "cuda": ("float32", "tf32", "bfloat16", "float16")}


def product_rate(width: int, precision: str, device: str, calls: int = GEMM_CALLS, rows: int | None = None) -> dict:
    """Operations per second of (rows, D) @ (D, 4 D) into memory that exists; median of some calls.

    Autocast multiplies in bfloat16; gcng in float16 and bfloat16 on a CPU multiplies in float32.
    """
    place = torch.device(device)
    dtype = torch.bfloat16 if precision == "autocast" else PRECISIONS[precision]
    rows = rows or (GEMM_ROWS if place.type == "cpu" else GPU_ROWS)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*shape, generator=generator).to(place, dtype) for shape in ((rows, width), (width, 4 * width)))
    out = torch.empty(rows, 4 * width, dtype=dtype, device=place)
    with precision_mode("tf32" if precision == "tf32" else "float32", place):
        torch.mm(a, b, out=out)
        seconds = [_timed(lambda: torch.mm(a, b, out=out), place) for _ in range(calls)]
    return {"shape": [rows, width, 4 * width], "flops": 2.0 * rows * width * 4 * width / statistics.median(seconds)}


def copy_rate(device: str, size: int | None = None) -> dict:
    """Bytes read and written per second by a copy too large for any cache."""
    place = torch.device(device)
    size = size or (COPY_BYTES if place.type == "cpu" else GPU_COPY_BYTES)
    source = torch.ones(size // 4, device=place)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = [_timed(lambda: target.copy_(source), place) for _ in range(GEMM_CALLS)]
    return {"bytes_moved": 2 * size, "bytes": 2.0 * size / statistics.median(seconds)}


def _timed(call, place: torch.device) -> float:
    clock = Clock(place)
    clock.mark()
    call()
    clock.mark()
    return clock.passes()["forward"]


def measure(device: str, widths: tuple[int, ...] = (64, 128, 512), copy_bytes: int | None = None) -> dict:
    """All rates, for a results file."""
    kind = torch.device(device).type
    products = {
        precision: {str(width): product_rate(width, precision, device, 15) for width in widths}
        for precision in PRODUCTS[kind]
    }
    return {"gemm": products, "copy": copy_rate(device, copy_bytes)}


def main(arguments: list[str] | None = None) -> int:
    """Measures the rates into a results file."""
    options, results = open_results(arguments, __doc__, "rates")
    smoke = {"widths": (16,), "copy_bytes": 2**16} if options.smoke else {}
    results.data["rates"] = measure(options.device, **smoke) | machine.revision()
    results.finish("rates")
    return 0


if __name__ == "__main__":
    sys.exit(main())
