"""Arithmetic that all kernels share: products, rounding stores, GELU, and the random bits of dropout.

Owns every workaround for triton's interpreter, which keeps bfloat16 as integers: it multiplies the bit patterns
and truncates where a GPU rounds. float64 operands stay float64 everywhere, so that gradients can be checked.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    """``accumulator + a @ b``, summed in the accumulator's type (float32, or float64 for float64 operands).

    a: (I, K), b: (K, J), both float16, bfloat16, float32 or float64; PRECISION: of ``launch.input_precision``.
    """
    if INTERPRETED and a.dtype == tl.bfloat16:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="ieee")
    return tl.dot(a, b, accumulator, input_precision=PRECISION, out_dtype=accumulator.dtype)


@triton.jit
def operand(x, PRECISION: tl.constexpr):
    """A computed operand of :func:`dot`: float32 rounded to the nearest tf32 number where ``PRECISION`` is "tf32".

    Tensor cores cut the low 13 bits off, which makes every number smaller: a bias that no averaging removes. Numbers
    that were widened from 16 bits have none of those bits and need no rounding.
    """
    if PRECISION == "tf32" and x.dtype == tl.float32:
        finite = tl.abs(x) < float("inf")
        bits = tl.where(finite, x, 0.0).to(tl.int32, bitcast=True)
        bits = (bits + 0xFFF + ((bits >> 13) & 1)) & -0x2000
        return tl.where(finite, bits.to(tl.float32, bitcast=True), x)
    return x


@triton.jit
def round_to(x, DTYPE: tl.constexpr):
    """x rounded to the nearest DTYPE, ties to even; in the interpreter as on a GPU."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True).to(tl.uint64)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # A NaN must not be carried over into an infinity.
        rounded = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, (bits >> 16) | 0x40, rounded)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def store(pointer, x, mask):
    """Store x, rounded to the nearest value of the pointer's type."""
    tl.store(pointer, round_to(x, pointer.dtype.element_ty), mask=mask)


@triton.jit
def _normal_distribution(x, EXACT: tl.constexpr):
    """Distribution function of the normal distribution at x, and exp(-x^2 / 2).

    EXACT takes erf of the machine, wanted for float32 and float64 results. Otherwise formula 7.1.26 of Abramowitz
    and Stegun, whose error of 1.5e-7 drowns in a result of 16 bits; it shares its exponential with the derivative.
    """
    exponential = tl.exp2(-0.7213475204444817 * x * x)
    if EXACT:
        return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476), exponential
    t = 1.0 / (1.0 + 0.23164189 * tl.abs(x))
    tail = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t
    half = 0.5 - 0.5 * tail * exponential
    return 0.5 + tl.where(x < 0, -half, half), exponential


@triton.jit
def gelu(x, EXACT: tl.constexpr):
    """GELU of float32 or float64 x; EXACT unless the result is stored in 16 bits."""
    distribution, _ = _normal_distribution(x, EXACT)
    return x * distribution


@triton.jit
def gelu_and_derivative(x, EXACT: tl.constexpr):
    """GELU of float32 or float64 x and its derivative, with one exponential between them."""
    distribution, exponential = _normal_distribution(x, EXACT)
    return x * distribution, distribution + 0.3989422804014327 * x * exponential


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """First two 32-bit words of Philox 4x32-10, as gcng/reference/dropout.py defines them.

    Counter and key words are uint32 values held in uint64; so are the results. 32 x 32 -> 64-bit products are
    one instruction on a GPU, and nothing wraps that an overflow check would have to forgive.
    """
    for _ in tl.static_range(10):
        product0 = c0 * 0xD2511F53
        product1 = c2 * 0xCD9E8D57
        c0 = (product1 >> 32) ^ c1 ^ k0
        c1 = product1 & 0xFFFFFFFF
        c2 = (product0 >> 32) ^ c3 ^ k1
        c3 = product0 & 0xFFFFFFFF
        k0 = (k0 + 0x9E3779B9) & 0xFFFFFFFF
        k1 = (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1


@triton.jit
def dropout_pairs(seed, layer, threshold, scale, rows, columns):
    """Scales of the two weights of (10) for pairs of nodes, 0 or ``scale``; (11), symmetric in the pair.

    seed: int64 scalar. layer: integer scalar. threshold: int64 scalar, round(p 2^32). scale: scalar 1 / (1 - p), of
    the result's type. rows, columns: int64 identities of the endpoints (``node_identity``), of one shape.

    Returns the row endpoint's and the column endpoint's scale.
    """
    small = tl.minimum(rows, columns).to(tl.uint64, bitcast=True)
    large = tl.maximum(rows, columns).to(tl.uint64, bitcast=True)
    key = seed.to(tl.int64).to(tl.uint64, bitcast=True)
    word0, word1 = philox(
        small & 0xFFFFFFFF, small >> 32, large & 0xFFFFFFFF, large >> 32,
        key & 0xFFFFFFFF, ((key >> 32) + layer.to(tl.uint64)) & 0xFFFFFFFF,
    )  # fmt: skip
    scale_small = tl.where(word0.to(tl.int64) >= threshold, scale, 0.0)
    scale_large = tl.where(word1.to(tl.int64) >= threshold, scale, 0.0)
    row_is_large = rows > columns
    # The diagonal pair is one weight: word 0 decides for both endpoints.
    return (
        tl.where(row_is_large, scale_large, scale_small),
        tl.where(row_is_large | (rows == columns), scale_small, scale_large),
    )
