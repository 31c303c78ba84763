"""What this machine can do at all: rate of a matrix product by width and precision, and of a copy."""

from __future__ import annotations

import statistics
import sys

import torch

from benchmarks import machine
from benchmarks.operations import PRECISIONS, Clock, precision_mode
from benchmarks.results import open_results

GEMM_ROWS = 1024  # of the yardstick (rows, D) @ (D, 4 D) on a CPU: a panel of pairs times the edge MLP
GPU_ROWS = 65_536
GEMM_CALLS = 5
GPU_QUEUE = 10  # products between two events on a GPU: the host is ahead of it then, and marks cost nothing
SQUARE = 8192  # sides of the product that stands for what a GPU can do
COPY_BYTES = 2**28
GPU_COPY_BYTES = 2**32
PRODUCTS = {"cpu": ("float32", "float64", "bfloat16"), "cuda": ("float32", "tf32", "bfloat16", "float16")}


def product_rate(
    width: int,
    precision: str,
    device: str,
    calls: int = GEMM_CALLS,
    rows: int | None = None,
    columns: int | None = None,
) -> dict:
    """Operations per second of (rows, D) @ (D, 4 D or ``columns``) into memory that exists; median of some calls.

    Autocast multiplies in bfloat16; gcng in float16 and bfloat16 on a CPU multiplies in float32.
    """
    place = torch.device(device)
    dtype = torch.bfloat16 if precision == "autocast" else PRECISIONS[precision]
    rows = rows or (GEMM_ROWS if place.type == "cpu" else GPU_ROWS)
    columns = columns or 4 * width
    generator = torch.Generator(place).manual_seed(0)
    a, b = (
        torch.randn(*shape, generator=generator, device=place).to(dtype) for shape in ((rows, width), (width, columns))
    )
    out = torch.empty(rows, columns, dtype=dtype, device=place)
    with precision_mode("tf32" if precision == "tf32" else "float32", place):
        torch.mm(a, b, out=out)
        seconds = [_timed(lambda: torch.mm(a, b, out=out), place) for _ in range(calls)]
    return {"shape": [rows, width, columns], "flops": 2.0 * rows * width * columns / statistics.median(seconds)}


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
    if place.type != "cuda":
        clock = Clock(place)
        clock.mark()
        call()
        clock.mark()
        return clock.passes()["forward"]
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call()  # while it runs, the host goes on to queue what is timed
    first.record()
    for _ in range(GPU_QUEUE):
        call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3 / GPU_QUEUE


def measure(device: str, widths: tuple[int, ...] = (64, 128, 512), copy_bytes: int | None = None) -> dict:
    """All rates, for a results file."""
    kind = torch.device(device).type
    products = {
        precision: {str(width): product_rate(width, precision, device, 15) for width in widths}
        for precision in PRODUCTS[kind]
    }
    if kind == "cuda":
        for precision, found in products.items():
            found["square"] = product_rate(SQUARE, precision, device, rows=SQUARE, columns=SQUARE)
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
