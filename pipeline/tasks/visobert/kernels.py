"""Loops that numba compiles for the encoder on the CPU: one pass over memory where torch's operators take several.

T = tokens of a batch, padding included; H = width; B = reviews, L = tokens of the longest, N = B * heads, D = width of
a head. bfloat16 comes as its bits; a loop calculates in float32 whatever it reads and writes. `first`,
`last`: the part of the outermost loop to do. `drop`: of 65,536 values how many are dropped; `scale`: what the kept ones
are multiplied by.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pipeline.compiled import SUMS, compiled, fast, narrowed, widened

Array = npt.NDArray[Any]

DROPS = 65_536  # what `drop` is out of
BLOCK = 32  # rows and columns of a matrix that are transposed at a time: both lie in the first cache
GOLDEN, FIRST_MIX, SECOND_MIX = (np.uint64(number) for number in  # of SplitMix64 (Steele et al. 2014)
                                 (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))  # fmt: skip
HALF, ONE, LOG2_E, LN_2 = (np.float32(number) for number in (0.5, 1, 1 / np.log(2), np.log(2)))
ABSENT = np.float32(-1e30)  # added to the score of an absent token: finite, since all may be absent
LOWEST = np.float32(-87)  # of which the exponential is a normal number
LN_2_HIGH = np.float32(0.693359375)  # so few bits that its multiples are exact
LN_2_LOW = np.float32(np.log(2) - 0.693359375)
TAYLOR = tuple(np.float32(1 / np.prod(range(1, power + 1))) for power in range(8))


def _power_of_two(_context: Any, exponent: Any) -> Any:
    """power_of_two(exponent): of a whole float32 from -126 to 127"""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        number = ir.IntType(32)
        biased = builder.add(builder.fptosi(arguments[0], number), number(127))
        return builder.bitcast(builder.shl(biased, number(23)), ir.FloatType())

    return types.float32(exponent), generate


def _truncated(_context: Any, value: Any) -> Any:
    """truncated(value): a float32 without its fraction; below 2^31"""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return builder.sitofp(builder.fptosi(arguments[0], ir.IntType(32)), ir.FloatType())

    return types.float32(value), generate


power_of_two: Any = intrinsic(_power_of_two)
truncated: Any = intrinsic(_truncated)


def _exponential(x: Any) -> Any:
    """Of a float32 that is at most 0, to 2e-7 of it; e^-87 of smaller ones."""
    x = LOWEST if x < LOWEST else x
    whole = truncated(x * LOG2_E - HALF)
    rest = (x - whole * LN_2_HIGH) - whole * LN_2_LOW  # at most ln 2 / 2 from 0
    value = TAYLOR[7]
    value = value * rest + TAYLOR[6]
    value = value * rest + TAYLOR[5]
    value = value * rest + TAYLOR[4]
    value = value * rest + TAYLOR[3]
    value = value * rest + TAYLOR[2]
    value = value * rest + ONE
    value = value * rest + ONE
    return value * power_of_two(whole)


exponential = compiled(_exponential, {"contract"})  # in the order in which it is written


def _highest(values: Array) -> Any:
    found = values[0]
    for value in values:
        found = value if value > found else found
    return found


highest_of = compiled(_highest, SUMS | {"nnan"})  # many at a time; NaN may be passed over


@fast
def random_bits(words: Array, key: Any, row: int) -> None:
    """Fill a row of uint64 with random bits that (key, row, place) decide: SplitMix64, at any place of its sequence."""
    before = np.uint64(row) * np.uint64(len(words))
    for place in range(len(words)):
        bits = key + (before + np.uint64(place)) * GOLDEN
        bits = (bits ^ (bits >> np.uint64(30))) * FIRST_MIX
        bits = (bits ^ (bits >> np.uint64(27))) * SECOND_MIX
        words[place] = bits ^ (bits >> np.uint64(31))


@fast
def dropped(  # noqa: PLR0917
    x: Array, out: Array, key: Any, drop: int, scale: Any, first: int, last: int
) -> None:
    """x, out: [rows, width]. Dropout; the same key drops the same values."""
    width = x.shape[1]
    words = np.empty((width + 3) // 4, np.uint64)
    bits = words.view(np.uint16)
    for row in range(first, last):
        random_bits(words, key, row)
        for column in range(width):
            value = widened(x[row, column]) * scale
            out[row, column] = narrowed(value if bits[column] >= drop else np.float32(0), out)


@fast
def normed(  # noqa: PLR0917
    x: Array, residual: Array, weight: Array, shift: Array, eps: Any, key: Any, drop: int, scale: Any,
    added: Array, statistics: Array, out: Array, low: Array, first: int, last: int,
) -> None:  # fmt: skip
    """added = residual + dropout(x); out = weight * (added - mean) / deviation + shift.

    x, residual, added, out, low [T, H]; the others [H]; statistics [T, 2] gets the mean and 1 / deviation of a token.
    `low`: `out` once more in another precision, if it has any rows.
    """
    width = x.shape[1]
    words = np.empty((width + 3) // 4, np.uint64)
    bits, copied = words.view(np.uint16), len(low) > 0
    words[:] = np.uint64(0xFFFFFFFFFFFFFFFF)
    share = ONE / np.float32(width)
    for row in range(first, last):
        if drop:
            random_bits(words, key, row)
        total = np.float32(0)
        for column in range(width):
            value = widened(x[row, column]) * scale
            value = residual[row, column] + (value if bits[column] >= drop else np.float32(0))
            added[row, column] = value
            total += value
        mean, squares = total * share, np.float32(0)
        for column in range(width):
            squares += (added[row, column] - mean) * (added[row, column] - mean)
        factor = ONE / np.sqrt(squares * share + eps)
        statistics[row, 0], statistics[row, 1] = mean, factor
        if copied:
            for column in range(width):
                value = (added[row, column] - mean) * factor * weight[column] + shift[column]
                out[row, column] = value
                low[row, column] = narrowed(value, low)
        else:
            for column in range(width):
                out[row, column] = (added[row, column] - mean) * factor * weight[column] + shift[column]


@fast
def normed_backward(  # noqa: PLR0917
    gradient: Array, low_gradient: Array, added: Array, statistics: Array, weight: Array, key: Any, drop: int,
    scale: Any, x_gradient: Array, residual_gradient: Array, sums: Array, first: int, last: int,
) -> None:  # fmt: skip
    """Of `normed`. `low_gradient`: of `low`, if it has any rows. sums: [2, H], gains what weight and shift get."""
    width = added.shape[1]
    words = np.empty((width + 3) // 4, np.uint64)
    bits, copied = words.view(np.uint16), len(low_gradient) > 0
    words[:] = np.uint64(0xFFFFFFFFFFFFFFFF)
    share, both = ONE / np.float32(width), np.empty(width, np.float32)
    for row in range(first, last):
        if drop:
            random_bits(words, key, row)
        mean, factor = statistics[row, 0], statistics[row, 1]
        for column in range(width):
            both[column] = gradient[row, column]
        if copied:
            for column in range(width):
                both[column] += widened(low_gradient[row, column])
        total, product = np.float32(0), np.float32(0)
        for column in range(width):
            standard, value = (added[row, column] - mean) * factor, both[column]
            sums[0, column] += value * standard
            sums[1, column] += value
            total += value * weight[column]
            product += value * weight[column] * standard
        total, product = total * share, product * share
        for column in range(width):
            standard = (added[row, column] - mean) * factor
            value = factor * (both[column] * weight[column] - total - standard * product)
            residual_gradient[row, column] = value
            x_gradient[row, column] = narrowed(value * scale if bits[column] >= drop else np.float32(0), x_gradient)


@fast
def split(rows: Array, out: Array, length: int, first: int, last: int) -> None:
    """rows [T, parts * heads * D] -> out [parts, N, L, D]: what belongs to a head in one place."""
    parts, heads, width = out.shape[0], out.shape[1] * length // len(rows), out.shape[3]
    for row in range(first, last):
        review, place = row // length, row % length
        for part in range(parts):
            for head in range(heads):
                start, target = (part * heads + head) * width, review * heads + head
                for column in range(width):
                    out[part, target, place, column] = rows[row, start + column]


@fast
def merge(divided: Array, rows: Array, length: int, first: int, last: int) -> None:
    """The way back of `split`."""
    parts, heads, width = divided.shape[0], divided.shape[1] * length // len(rows), divided.shape[3]
    for row in range(first, last):
        review, place = row // length, row % length
        for part in range(parts):
            for head in range(heads):
                start, source = (part * heads + head) * width, review * heads + head
                for column in range(width):
                    rows[row, start + column] = divided[part, source, place, column]


@fast
def attended(  # noqa: PLR0917
    scores: Array, present: Array, scaling: Any, key: Any, drop: int, scale: Any, shares: Array, thinned: Array,
    first: int, last: int,
) -> None:  # fmt: skip
    """shares = softmax(scaling * scores) over the tokens that are present, thinned = dropout(shares); 0 of the others.

    scores, shares, thinned: [N, L, L], thinned not written where nothing drops; present: [B, L].
    """
    length = scores.shape[1]
    heads = len(scores) // len(present)
    words, values = np.empty((length + 3) // 4, np.uint64), np.empty(length, np.float32)
    bits, weights, lowered = words.view(np.uint16), np.empty(length, np.float32), np.empty(length, np.float32)
    for index in range(first, last):
        for place in range(length):
            there = present[index // heads, place]
            weights[place], lowered[place] = (ONE, np.float32(0)) if there else (np.float32(0), ABSENT)
        for query in range(length):
            for place in range(length):
                values[place] = widened(scores[index, query, place]) * scaling + lowered[place]
            highest, total = highest_of(values), np.float32(0)
            for place in range(length):
                value = exponential(values[place] - highest) * weights[place]
                values[place] = value
                total += value
            factor = np.float32(0) if total == 0 else ONE / total
            for place in range(length):
                shares[index, query, place] = narrowed(values[place] * factor, shares)
            if drop:
                random_bits(words, key, index * length + query)
                factor = factor * scale
                for place in range(length):
                    value = values[place] * factor if bits[place] >= drop else np.float32(0)
                    thinned[index, query, place] = narrowed(value, thinned)


@fast
def attended_backward(  # noqa: PLR0917
    gradient: Array, shares: Array, thinned: Array, scaling: Any, scale: Any, first: int, last: int
) -> None:
    """gradient: [N, L, L], of `thinned`; becomes that of the scores. What is 0 in `thinned` was dropped, or nothing."""
    length = gradient.shape[1]
    values = np.empty(length, np.float32)
    for index in range(first, last):
        for query in range(length):
            total = np.float32(0)
            for place in range(length):
                value = widened(gradient[index, query, place]) * scale
                value = value if widened(thinned[index, query, place]) != 0 else np.float32(0)
                values[place] = value
                total += value * widened(shares[index, query, place])
            for place in range(length):
                value = widened(shares[index, query, place]) * (values[place] - total) * scaling
                gradient[index, query, place] = narrowed(value, gradient)


@fast
def transposed(matrix: Array, out: Array, first: int, last: int) -> None:
    """matrix: [T, W]; out: [W, T]. Of the columns from first to last."""
    rows = len(matrix)
    for top in range(0, rows, BLOCK):
        bottom = min(top + BLOCK, rows)
        for left in range(first, last, BLOCK):
            for column in range(left, min(left + BLOCK, last)):
                for row in range(top, bottom):
                    out[column, row] = matrix[row, column]
