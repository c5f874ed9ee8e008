"""Finding weights and tokens in a list of weights without sorting it, by one program.

A weight is a float32 in 0 … 1, whose bits as an integer are ordered as it is: the weight at which a sum is reached is
found two bits at a time. Sums are made in one order, so that results depend on the list alone. Lengths are multiples
of BLOCK, with zeros at the end of a list.
"""

from __future__ import annotations

import triton
import triton.language as tl

SMALL_NUCLEUS = tl.constexpr(256)
BUCKET_SHIFT = tl.constexpr(16)
MOST_BITS = tl.constexpr(0x7FFFFFFF)


@triton.jit
def as_variables(low, high, by_count):
    """As what a branch has computed."""
    return low + tl.zeros((), tl.int32), high + tl.zeros((), tl.int32), tl.full((), by_count, tl.int1)


@triton.jit
def draw_filtered(weights, length, most, nucleus, total, number, BLOCK: tl.constexpr):
    """What top_k (`most`, 0 for all), top_p and the random number choose from weights f32 [length].

    low, high, goal, by_count as first_above wants them; low is 0 where rounding hides the choice.
    """
    bits, ties = tl.zeros((), tl.int32), tl.zeros((), tl.int32) + length
    count, sum = tl.zeros((), tl.int32) + length, total
    goal = most.to(tl.float64)
    low, high, by_count = as_variables(0, 0, True)
    # top_k, top_p, the draw: each finds a weight. Kept are those above `bits`, and the first `ties` that equal it.
    for phase in range(3):
        if (phase == 2) | ((phase == 0) & (most > 0)) | ((phase == 1) & (nucleus < 1)):
            goal = tl.where(phase == 0, goal, tl.where(phase == 1, nucleus.to(tl.float64), number) * sum)
            found = tl.maximum(largest_bits(weights, length, goal, phase == 0, phase == 2, BLOCK), bits)
            above, sum_above, equal = sums_above(weights, length, found, BLOCK)
            equal = tl.where((found == bits) & (found > 0), tl.minimum(ties, equal), equal)
            weight = found.to(tl.float32, bitcast=True).to(tl.float64)
            missing = (goal - sum_above) / tl.where(found > 0, weight, 1.0)
            if phase == 2:
                skipped = tl.maximum(tl.minimum(missing, (equal - 1).to(tl.float64)), 0.0)
                low, high, goal = found, found, tl.floor(skipped)
            elif found > 0:
                first = tl.ceil(tl.minimum(tl.maximum(missing, 1.0), equal.to(tl.float64))).to(tl.int32)
                ties = tl.where(phase == 0, tl.minimum(most - above, equal), first)
                bits, count, sum = found, above + ties, sum_above + ties.to(tl.float64) * weight
    if (most == 0) & (count > SMALL_NUCLEUS):
        # A wide nucleus is drawn from by id, but for the tokens of its last bucket.
        bucket = ((bits >> BUCKET_SHIFT) + 1) << BUCKET_SHIFT
        above, sum_above, equal = sums_above(weights, length, bucket - 1, BLOCK)
        if number * sum < sum_above:
            low, high, by_count = as_variables(bucket, MOST_BITS, False)
            goal = number * sum
    return low, high, goal, by_count


@triton.jit
def largest_bits(weights, length, goal, by_count, strict, BLOCK: tl.constexpr):
    """The largest bits t such that the weights of bits >= t sum up to `goal`, or to more than it if strict; 0 if none.

    weights f32 [length]; goal f64; by_count: every weight counts as 1.
    """
    offsets = tl.arange(0, BLOCK)
    digits = tl.arange(0, 4)
    bits = tl.zeros((), tl.int32)
    for step in range(15):
        one = tl.full((), 1, tl.int32) << (28 - 2 * step)
        thresholds = (bits + digits * one)[:, None]
        sums = tl.zeros((4, BLOCK), tl.float32)
        for start in tl.range(0, length, BLOCK, loop_unroll_factor=4):
            found = tl.load(weights + start + offsets)
            value = tl.where(by_count, 1.0, found)
            sums += tl.where(found.to(tl.int32, bitcast=True)[None, :] >= thresholds, value[None, :], 0.0)
        wide = tl.sum(sums, axis=1).to(tl.float64)
        reached = ((wide > goal) | ((wide == goal) & (strict == 0))) & (digits > 0)
        bits += tl.sum(reached.to(tl.int32), axis=0) * one
    return bits


@triton.jit
def sums_above(weights, length, bits, BLOCK: tl.constexpr):
    """Of weights f32 [length]: how many have bits above `bits`, their sum (f64), and how many have these bits."""
    offsets = tl.arange(0, BLOCK)
    count = tl.zeros((BLOCK,), tl.int32)
    equal = tl.zeros((BLOCK,), tl.int32)
    sum = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, length, BLOCK, loop_unroll_factor=4):
        found = tl.load(weights + start + offsets)
        key = found.to(tl.int32, bitcast=True)
        count += (key > bits).to(tl.int32)
        equal += (key == bits).to(tl.int32)
        sum += tl.where(key > bits, found, 0.0)
    return tl.sum(count, axis=0), tl.sum(sum, axis=0).to(tl.float64), tl.sum(equal, axis=0)


@triton.jit
def first_above(weights, length, low, high, goal, by_count, BLOCK: tl.constexpr):
    """The first index at which the running sum over weights of bits low … high exceeds `goal` (f64).

    Rounding may keep the sum from it: then the last index that has such bits. by_count: every weight counts as 1.
    """
    offsets = tl.arange(0, BLOCK)
    at = tl.zeros((), tl.int32)
    before_at = tl.zeros((), tl.float64)
    before = tl.zeros((), tl.float64)
    for start in range(0, length, BLOCK):
        value = _between(weights, start + offsets, low, high, by_count)
        sum = tl.sum(value, axis=0).to(tl.float64)
        here = (before <= goal) & (sum > 0)
        at = tl.where(here, start, at)
        before_at = tl.where(here, before, before_at)
        before += sum
    value = _between(weights, at + offsets, low, high, by_count)
    exceeds = (value > 0) & (before_at + tl.cumsum(value, axis=0).to(tl.float64) > goal)
    first = tl.min(tl.where(exceeds, offsets, BLOCK), axis=0)
    last = tl.max(tl.where(value > 0, offsets, 0), axis=0)
    return at + tl.minimum(first, last)


@triton.jit
def _between(weights, index, low, high, by_count):
    found = tl.load(weights + index)
    key = found.to(tl.int32, bitcast=True)
    return tl.where((key >= low) & (key <= high), tl.where(by_count, 1.0, found), 0.0)


@triton.jit
def uniform(seed, index):
    """In [0, 1), f64: SplitMix64 as a counter-based generator."""
    golden = 0x9E3779B97F4A7C15
    counter = (index.to(tl.uint64) + 1) * golden
    bits = _mix(_mix(seed.to(tl.uint64) + golden) ^ counter)
    return (bits >> 11).to(tl.float64) * 1.1102230246251565e-16  # 2^-53


@triton.jit
def _mix(z):
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)
