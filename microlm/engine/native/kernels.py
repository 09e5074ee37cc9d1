"""Compiled pieces of a token step: products with matrices and pages, norms, rotation, SwiGLU, codes.

Addresses are of float32 unless said otherwise. Shapes: d head size.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from microlm.engine.native.lanes import (
    LANES,
    add_atomic,
    bits_of,
    float_of,
    give_way,
    mix_of,
    nearest,
    read_atomic,
    tile_of,
)
from microlm.text.compiled import njit_float, overload, types

_TILE4, _TILE2, _TILE1 = tile_of(4), tile_of(2), tile_of(1)
_MIX4, _MIX2, _MIX1 = mix_of(4, 4), mix_of(2, 4), mix_of(1, 4)
_MIX4_PAIR, _MIX2_PAIR, _MIX1_PAIR = mix_of(4, 2), mix_of(2, 2), mix_of(1, 2)
_MIX4_REST, _MIX2_REST, _MIX1_REST = mix_of(4, 1), mix_of(2, 1), mix_of(1, 1)
_SPINS = 2000  # looks at the barrier before the processor is given away
_LOG2E, _LN2 = np.float32(1.4426950408889634), np.float32(0.6931471805599453)
_LOWEST, _HIGHEST = np.float32(-87.0), np.float32(88.0)
_HALF, _ONE, _ZERO = np.float32(0.5), np.float32(1.0), np.float32(0.0)
_SIXTH, _24TH, _120TH, _720TH = (np.float32(1 / n) for n in (6, 24, 120, 720))
_MOST_INT8, _MOST_INT4 = np.float32(127.0), np.float32(15.0)


@njit_float
def products(kind: Any, matrix: Any, x: int, rows: int, out: Any, span: Any) -> None:
    """out[r, o] = row o of the matrix · row r of x, for o in `span` (at least 4 rows lie before its end)."""
    for o in range(span[0], span[1], 4):
        at = min(o, span[1] - 4)
        r = 0
        while r < rows:
            given = x + r * matrix[2] * 4
            target = (out[0] + r * out[1] * 4, out[1])
            if rows - r >= 4:
                _TILE4(kind, matrix, at, given, target)
                r += 4
            elif rows - r >= 2:
                _TILE2(kind, matrix, at, given, target)
                r += 2
            else:
                _TILE1(kind, matrix, at, given, target)
                r += 1


@njit_float
def mix_page(kind: Any, page: Any, shares: Any, rows: int, y: int) -> None:
    """y[r] += Σ shares[r, p] · row p of the page; page: (address, bytes of a row, columns, rows to take)."""
    first, row_bytes, columns, count = page
    width, size = _stored(kind, columns)
    block = 0
    while block * LANES < width:
        left = width // LANES - block
        step = 4 if left >= 4 else 2 if left >= 2 else 1
        here = (
            first + block * LANES * size,
            row_bytes,
            columns,
            count,
            min(LANES, width - block * LANES),
        )
        r = 0
        while r < rows:
            given = (shares[0] + r * shares[1] * 4, shares[1])
            target = y + (r * columns + block * LANES) * 4
            r += _mix_rows(kind, here, given, target, (rows - r, step))
        block += step


@njit_float
def _mix_rows(kind: Any, page: Any, shares: Any, y: int, extent: Any) -> int:
    """As many rows as one pass takes; how many those were."""
    rows, step = extent
    if rows >= 4:
        if step == 4:
            _MIX4(kind, page, shares, y)
        elif step == 2:
            _MIX4_PAIR(kind, page, shares, y)
        else:
            _MIX4_REST(kind, page, shares, y)
        return 4
    if rows >= 2:
        if step == 4:
            _MIX2(kind, page, shares, y)
        elif step == 2:
            _MIX2_PAIR(kind, page, shares, y)
        else:
            _MIX2_REST(kind, page, shares, y)
        return 2
    if step == 4:
        _MIX1(kind, page, shares, y)
    elif step == 2:
        _MIX1_PAIR(kind, page, shares, y)
    else:
        _MIX1_REST(kind, page, shares, y)
    return 1


def _stored(kind: Any, columns: int) -> tuple[int, int]:
    """Elements of a stored row, and bytes of each."""
    raise NotImplementedError


@overload(_stored, strict=False)
def _stored_of(kind: Any, columns: Any) -> Any:
    if kind.dtype == types.uint8:
        return lambda kind, columns: (columns // 2, 1)
    size = kind.dtype.bitwidth // 8
    return lambda kind, columns: (columns, size)


def is_scaled(kind: Any) -> bool:
    """Whether what is stored has scales: int8, int4."""
    raise NotImplementedError


@overload(is_scaled, strict=False)
def _is_scaled(kind: Any) -> Any:
    found = kind.dtype in (types.int8, types.uint8)
    return lambda kind: found


def is_shifted(kind: Any) -> bool:
    """Whether what is stored has zeros: int4."""
    raise NotImplementedError


@overload(is_shifted, strict=False)
def _is_shifted(kind: Any) -> Any:
    found = kind.dtype == types.uint8
    return lambda kind: found


def widen(value: Any) -> Any:
    """A stored element of float32 or bf16 as float32."""
    raise NotImplementedError


@overload(widen, strict=False)
def _widen(value: Any) -> Any:
    if value == types.float32:
        return lambda value: value
    return lambda value: float_of(np.uint32(value) << np.uint32(16))


@njit_float
def to_bf16(value: Any) -> Any:
    """The bits of the nearest bf16, halves to even."""
    bits = bits_of(value)
    if value != value:
        return np.uint16(0x7FC0)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


def put(row: Any, values: Any, scale: Any, zero: Any, place: int) -> None:
    """Store a head [d] in a row of the cache, its scale and zero at `place`: codec.encode's arithmetic."""
    raise NotImplementedError


@overload(put, strict=False)
def _put(row: Any, values: Any, scale: Any, zero: Any, place: Any) -> Any:
    chosen = {types.float32: _put_float32, types.uint16: _put_bf16, types.int8: _put_int8}.get(
        row.dtype, _put_int4
    )
    return lambda row, values, scale, zero, place: chosen(row, values, scale, zero, place)


@njit_float
def _put_float32(row: Any, values: Any, scale: Any, zero: Any, place: int) -> None:
    for c in range(len(values)):
        row[c] = values[c]


@njit_float
def _put_bf16(row: Any, values: Any, scale: Any, zero: Any, place: int) -> None:
    for c in range(len(values)):
        row[c] = to_bf16(values[c])


@njit_float
def _put_int8(row: Any, values: Any, scale: Any, zero: Any, place: int) -> None:
    largest = _ZERO
    for c in range(len(values)):
        largest = max(largest, abs(values[c]))
    scale[place] = to_bf16(largest / _MOST_INT8)
    rounded = widen(scale[place])
    divisor = _ONE if rounded == _ZERO else rounded
    for c in range(len(values)):
        row[c] = np.int8(_code(values[c], divisor, -_MOST_INT8, _MOST_INT8))


@njit_float
def _put_int4(row: Any, values: Any, scale: Any, zero: Any, place: int) -> None:
    low, high = values[0], values[0]
    for c in range(len(values)):
        low, high = min(low, values[c]), max(high, values[c])
    zero[place] = to_bf16(low)
    base = widen(zero[place])
    scale[place] = to_bf16(max((high - base) / _MOST_INT4, _ZERO))
    rounded = widen(scale[place])
    divisor = _ONE if rounded == _ZERO else rounded
    half = len(row)
    for c in range(half):
        first = np.uint8(_code(values[c] - base, divisor, _ZERO, _MOST_INT4))
        second = np.uint8(_code(values[half + c] - base, divisor, _ZERO, _MOST_INT4))
        row[c] = first | (second << np.uint8(4))


@njit_float
def _code(value: Any, divisor: Any, low: Any, high: Any) -> Any:
    """The nearest code, 0 where the quotient is no finite number."""
    code = nearest(value / divisor)
    if not np.isfinite(code):
        return _ZERO
    return min(max(code, low), high)


@njit_float
def exponential(x: Any) -> Any:
    """e^x of a float32, to 2 units of the last place; below e^-87 it stays there."""
    x = min(max(x, _LOWEST), _HIGHEST)
    n = nearest(x * _LOG2E)
    f = x - n * _LN2
    series = _SIXTH + f * (_24TH + f * (_120TH + f * _720TH))
    series = _ONE + f * (_ONE + f * (_HALF + f * series))
    return series * float_of(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23))


@njit_float
def norm(x: Any, weight: Any, eps: Any, out: Any) -> None:
    """RMSNorm of a vector; `out` may be `x`."""
    total = _ZERO
    for c in range(len(x)):
        total += x[c] * x[c]
    scale = _ONE / np.sqrt(total / np.float32(len(x)) + eps)
    for c in range(len(x)):
        out[c] = x[c] * scale * weight[c]


@njit_float
def rotate(head: Any, cos: Any, sin: Any, scale: Any) -> None:
    """Turn the halves of a head [d] by the angles [d/2] of its position, and scale it."""
    half = len(cos)
    left, right = head[:half], head[half:]
    for c in range(half):
        a, b = left[c], right[c]
        left[c] = (a * cos[c] - b * sin[c]) * scale
        right[c] = (b * cos[c] + a * sin[c]) * scale


@njit_float
def swiglu(gate: Any, up: Any) -> None:
    """gate becomes silu(gate) · up."""
    for c in range(len(gate)):
        g = gate[c]
        gate[c] = g / (_ONE + exponential(-g)) * up[c]


@njit_float
def soften(scores: Any) -> Any:
    """Scores become e^(score - largest); their sum."""
    largest = scores[0]
    for p in range(len(scores)):
        largest = max(largest, scores[p])
    total = _ZERO
    for p in range(len(scores)):
        share = exponential(scores[p] - largest)
        scores[p] = share
        total += share
    return total


@njit_float
def add(x: Any, y: Any) -> None:
    """x += y."""
    for c in range(len(x)):
        x[c] += y[c]


@njit_float
def meet(sync: int, target: int) -> None:
    """Wait until `target` arrivals were counted; `sync` is the address of (arrivals, given up)."""
    add_atomic(sync, 1)
    spins = 0
    while read_atomic(sync) < target and read_atomic(sync + 8) == 0:
        spins += 1
        if spins > _SPINS:
            give_way()
