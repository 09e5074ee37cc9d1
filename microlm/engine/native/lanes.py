"""Vector loops in LLVM's own words: products of stored rows with activations, 16 lanes at a time.

Enters: addresses and strides. Each sum is taken in one order, whatever rows are beside it, so a result
depends on nothing else. The kind of what is stored is the dtype of an empty array: float32, uint16 (bf16),
int8, uint8 (int4). Needs numba.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from microlm.text.compiled import cgutils, intrinsic, ir, types

LANES = 16
GROUP = 64
"""Inputs that share a scale in an int4 matrix: 32 bytes, low halves are of the group's first half."""

_BYTE, _WORD, _LONG = (ir.IntType(bits) for bits in (8, 32, 64))
_FLOAT = ir.FloatType()
_VECTOR = ir.VectorType(_FLOAT, LANES)
_WORDS = ir.VectorType(_WORD, LANES)
_ZERO = ir.Constant(_VECTOR, [0.0] * LANES)
_OUTS = 4  # rows of a matrix in a tile
_ROWS_ALONE = {types.float32: 4, types.uint16: 2}
"""Up to so many rows of activations, a tile takes its stored rows one after the other: memory is the limit,
and the processor's prefetcher follows one stream best. Else side by side: activations are read once."""
_AHEAD = 1024  # bytes, beyond the next tile


def tile_of(rows: int) -> Any:
    """`tile(kind, matrix, at, x, out)`: four rows of a matrix from `at` on, times `rows` of activations.

    A matrix is (address, bytes of a row, columns, address of scales, bytes of a row's scales); a page of the
    cache is the first three of these, and its codes come unscaled. `out` is (address, floats of a row).
    """

    @intrinsic
    def tile(typing: Any, kind: Any, matrix: Any, at: Any, x: Any, out: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            parts, (y, stride) = _unpacked(builder, args[1]), _unpacked(builder, args[4])
            sums = [[cgutils.alloca_once_value(builder, _ZERO) for _ in range(_OUTS)] for _ in range(rows)]
            places = [builder.add(args[2], _LONG(i)) for i in range(_OUTS)]
            stored = [_at(builder, parts[0], place, parts[1]) for place in places]
            scales = [_at(builder, parts[3], place, parts[4]) for place in places] if len(parts) > 3 else []
            alone = rows <= _ROWS_ALONE.get(kind.dtype, 0)
            for some in [slice(o, o + 1) for o in range(_OUTS)] if alone else [slice(0, _OUTS)]:
                columns = _Columns(kind.dtype, stored[some], parts[1], parts[2], args[3])
                if kind.dtype == types.uint8 and scales:
                    columns.add_groups(builder, scales[some], [row[some] for row in sums])
                else:
                    columns.add(builder, [row[some] for row in sums])
            for r, row in enumerate(sums):
                found = _sums(builder, [builder.load(total) for total in row])
                if kind.dtype == types.int8 and scales:
                    found = builder.fmul(found, _load(builder, scales[0], found.type))
                _store(builder, found, _at(builder, _at(builder, y, args[2], 4), stride, 4 * r))
            return context.get_dummy_value()

        return types.void(kind, matrix, types.int64, types.int64, out), codegen

    return tile


def mix_of(rows: int, width: int) -> Any:
    """`mix(kind, page, shares, y)`: y += shares times the rows of a page, in `width` blocks of 16 columns.

    `page` is (address of the first block, bytes of a row, columns, rows to take, columns of the block: 16,
    fewer at the end); `shares` (address, floats of a row); y the address of the block's first column, its
    rows as wide as the page. A block of int4 is 16 bytes: 16 columns of either half.
    """

    @intrinsic
    def mix(typing: Any, kind: Any, page: Any, shares: Any, y: Any) -> Any:
        is_packed = kind.dtype == types.uint8

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            first, row_bytes, columns, count, filled = _unpacked(builder, args[1])
            p, stride = _unpacked(builder, args[2])
            rest = filled if width == 1 else None
            starts = [_LONG(LANES * j) for j in range(width)]
            if is_packed:
                starts += [builder.add(start, builder.lshr(columns, _LONG(1))) for start in starts]
            targets = [
                [_at(builder, _at(builder, args[3], start, 4), columns, 4 * r) for start in starts]
                for r in range(rows)
            ]
            sums = [
                [cgutils.alloca_once_value(builder, _load_some(builder, t, _VECTOR, rest)) for t in row]
                for row in targets
            ]
            with cgutils.for_range(builder, count) as loop:
                base = _at(builder, first, loop.index, row_bytes)
                values = _block(builder, kind.dtype, base, width, rest)
                for r, row in enumerate(sums):
                    place = _at(builder, _at(builder, p, stride, 4 * r), loop.index, 4)
                    share = _splat(builder, _load(builder, place, _FLOAT))
                    for value, total in zip(values, row, strict=True):
                        builder.store(_fma(builder, share, value, builder.load(total)), total)
            for row, places in zip(sums, targets, strict=True):
                for total, place in zip(row, places, strict=True):
                    _store_some(builder, builder.load(total), place, rest)
            return context.get_dummy_value()

        return types.void(kind, page, shares, types.int64), codegen

    return mix


class _Columns(NamedTuple):
    """Stored rows (addresses, bytes of each) of one kind and width, and the activations beside them."""

    kind: Any
    stored: list[Any]
    row_bytes: Any
    columns: Any
    x: Any

    def add(self, builder: Any, sums: list[list[Any]]) -> None:
        """Add the products, 16 columns at a time; int4, of the cache, by its first and second half."""
        packed = self.kind == types.uint8
        width = builder.lshr(self.columns, _LONG(1)) if packed else self.columns
        size = 1 if packed else self.kind.bitwidth // 8

        def block(index: Any, rest: Any) -> None:
            start = builder.mul(index, _LONG(LANES))
            values = [_block(builder, self.kind, _at(builder, s, start, size), 1, rest) for s in self.stored]
            self._add_block(builder, values, [start, builder.add(start, width)][: 1 + packed], rest, sums)

        blocks = builder.lshr(width, _LONG(4))
        with cgutils.for_range(builder, blocks) as loop:
            self._fetch(builder, loop.index, LANES * size)
            block(loop.index, None)
        rest = builder.and_(width, _LONG(LANES - 1))
        with builder.if_then(builder.icmp_signed("!=", rest, _LONG(0)), likely=False):
            block(blocks, rest)

    def add_groups(self, builder: Any, scales: list[Any], sums: list[list[Any]]) -> None:
        """Add the products of int4 groups, each with its scale and zero."""
        with cgutils.for_range(builder, builder.lshr(self.columns, _LONG(6))) as loop:
            self._fetch(builder, loop.index, GROUP // 2)
            values = []
            for stored, place in zip(self.stored, scales, strict=True):
                codes = _block(builder, self.kind, _at(builder, stored, loop.index, GROUP // 2), 2, None)
                pair = _at(builder, place, loop.index, 8)
                scale = _splat(builder, _load(builder, pair, _FLOAT))
                zero = _splat(builder, _load(builder, builder.add(pair, _LONG(4)), _FLOAT))
                values.append([_fma(builder, code, scale, zero) for code in codes])
            start = builder.mul(loop.index, _LONG(GROUP))
            starts = [builder.add(start, _LONG(LANES * j)) for j in range(GROUP // LANES)]
            self._add_block(builder, values, starts, None, sums)

    def _add_block(
        self, builder: Any, values: list[list[Any]], starts: list[Any], rest: Any, sums: list[list[Any]]
    ) -> None:
        """Add the products of some vectors of each stored row with the activations from `starts` on."""
        for r, totals in enumerate(sums):
            base = _at(builder, self.x, self.columns, 4 * r)
            for i, start in enumerate(starts):
                given = _load_some(builder, _at(builder, base, start, 4), _VECTOR, rest)
                for value, total in zip(values, totals, strict=True):
                    builder.store(_fma(builder, value[i], given, builder.load(total)), total)

    def _fetch(self, builder: Any, index: Any, size: int) -> None:
        """Ask for what the next tile reads, in the order of memory: rows side by side lose the prefetcher."""
        if len(self.stored) == 1:
            return
        pointer, size = _BYTE.as_pointer(), size * len(self.stored)
        kind = ir.FunctionType(ir.VoidType(), [pointer, _WORD, _WORD, _WORD])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        ahead = _at(builder, _LONG(_AHEAD), self.row_bytes, len(self.stored))
        for line in range(0, size, 64):
            place = builder.add(_at(builder, self.stored[0], index, size), builder.add(ahead, _LONG(line)))
            builder.call(function, [builder.inttoptr(place, pointer), _WORD(0), _WORD(3), _WORD(1)])


def _block(builder: Any, kind: Any, address: Any, width: int, rest: Any) -> list[Any]:
    """`width` vectors of what is stored there, as floats; of int4 twice as many: low halves, then high."""
    size = 1 if kind == types.uint8 else kind.bitwidth // 8
    places = [builder.add(address, _LONG(LANES * size * j)) for j in range(width)]
    if kind == types.float32:
        return [_load_some(builder, place, _VECTOR, rest) for place in places]
    stored = ir.VectorType(ir.IntType(8 * size), LANES)
    raw = [_load_some(builder, place, stored, rest) for place in places]
    if kind == types.int8:
        return [builder.sitofp(codes, _VECTOR) for codes in raw]
    wide = [builder.zext(codes, _WORDS) for codes in raw]
    if kind == types.uint16:
        shift = ir.Constant(_WORDS, [16] * LANES)
        return [builder.bitcast(builder.shl(word, shift), _VECTOR) for word in wide]
    low, shift = ir.Constant(_WORDS, [15] * LANES), ir.Constant(_WORDS, [4] * LANES)
    halves = [builder.and_(word, low) for word in wide] + [builder.lshr(word, shift) for word in wide]
    return [builder.sitofp(half, _VECTOR) for half in halves]


def _sums(builder: Any, vectors: list[Any]) -> Any:
    """The lanes of four vectors, each added up, side by side: halves, halves again, then (0+2) + (1+3)."""
    quarters = []
    for vector in vectors:
        for size in (8, 4):
            low = _shuffled(builder, vector, vector, range(size))
            vector = builder.fadd(low, _shuffled(builder, vector, vector, range(size, 2 * size)))
        quarters.append(vector)
    pairs = []
    for a, b in zip(quarters[::2], quarters[1::2], strict=True):
        halves = _shuffled(builder, a, b, (0, 4, 1, 5)), _shuffled(builder, a, b, (2, 6, 3, 7))
        pairs.append(builder.fadd(*halves))
    left = builder.shuffle_vector(*pairs, _lanes((0, 1, 4, 5)))
    return builder.fadd(left, builder.shuffle_vector(*pairs, _lanes((2, 3, 6, 7))))


def _lanes(chosen: Sequence[int]) -> Any:
    return ir.Constant(ir.VectorType(_WORD, len(chosen)), list(chosen))


def _shuffled(builder: Any, a: Any, b: Any, lanes: Sequence[int]) -> Any:
    return builder.shuffle_vector(a, b, _lanes(lanes))


def _splat(builder: Any, value: Any) -> Any:
    single = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), value, _WORD(0))
    return _shuffled(builder, single, single, [0] * LANES)


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a · b + c, rounded once where the processor can."""
    kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{LANES}f32")
    return builder.call(function, [a, b, c])


def _at(builder: Any, base: Any, index: Any, size: Any) -> Any:
    """base + index · size; a size may be a number or a value."""
    return builder.add(base, builder.mul(index, _LONG(size) if isinstance(size, int) else size))


def _load(builder: Any, address: Any, kind: Any) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)


def _store(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=1)


def _load_some(builder: Any, address: Any, kind: Any, rest: Any) -> Any:
    """A vector, of which only the first `rest` elements are there (None: all); the others are 0."""
    if rest is None:
        return _load(builder, address, kind)
    buffer = cgutils.alloca_once_value(builder, ir.Constant(kind, [kind.element(0)] * LANES))
    _copy(builder, buffer, builder.inttoptr(address, _BYTE.as_pointer()), rest, kind.element)
    return builder.load(buffer)


def _store_some(builder: Any, value: Any, address: Any, rest: Any) -> None:
    if rest is None:
        _store(builder, value, address)
        return
    buffer = cgutils.alloca_once_value(builder, value)
    _copy(builder, builder.inttoptr(address, _BYTE.as_pointer()), buffer, rest, value.type.element)


def _copy(builder: Any, target: Any, source: Any, count: Any, element: Any) -> None:
    size = 4 if isinstance(element, ir.FloatType) else element.width // 8
    cgutils.raw_memcpy(builder, target, source, count, size)


def _unpacked(builder: Any, value: Any) -> list[Any]:
    return [builder.extract_value(value, i) for i in range(value.type.count)]


@intrinsic
def bits_of(typing: Any, value: Any) -> Any:
    """The bits of a float32 as uint32."""
    return types.uint32(types.float32), lambda _c, builder, _s, args: builder.bitcast(args[0], _WORD)


@intrinsic
def float_of(typing: Any, value: Any) -> Any:
    """The float32 of 32 bits."""
    return types.float32(types.uint32), lambda _c, builder, _s, args: builder.bitcast(args[0], _FLOAT)


@intrinsic
def nearest(typing: Any, value: Any) -> Any:
    """The nearest whole number of a float32, halves to even."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(_FLOAT, [_FLOAT])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.rint.f32"), args)

    return types.float32(types.float32), codegen


@intrinsic
def add_atomic(typing: Any, address: Any, value: Any) -> Any:
    """Add to an int64 that threads share; what stood there before."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", builder.inttoptr(args[0], _LONG.as_pointer()), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def read_atomic(typing: Any, address: Any) -> Any:
    """An int64 that threads share."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(args[0], _LONG.as_pointer()), "seq_cst", 8)

    return types.int64(types.int64), codegen


@intrinsic
def give_way(typing: Any) -> Any:
    """Let another thread have the processor."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        name = "SwitchToThread" if sys.platform == "win32" else "sched_yield"
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_WORD, []), name)
        return builder.call(function, [])

    return types.int32(), codegen
