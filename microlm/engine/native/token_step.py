"""One token step as compiled code: ids of T rows → their keys and values in the cache, and logits.

Every thread runs `token_step`; they share the rows of each matrix and the heads, and meet between the parts.
Shapes: T rows, D hidden, H heads, K key-value heads, G = H / K, d head size, F inner, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from microlm.engine.cache.store import PAGE
from microlm.engine.native.kernels import (
    add,
    is_scaled,
    is_shifted,
    meet,
    mix_page,
    norm,
    products,
    put,
    rotate,
    soften,
    swiglu,
    widen,
)
from microlm.text.compiled import njit_float

# places in `shape`
LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, KV_BYTES, PAGES, ROOM, HAS_BIAS, HAS_QK_NORM = range(10)
# places in `at`, the addresses of buffers
NORMED, Q, K, V, MIXED, GATE, UP, Y, LOGITS, SCORES, KEYS, VALUES = range(12)
# rows of `matrices` within a layer; the head comes after the last layer
Q_PROJ, K_PROJ, V_PROJ, O_PROJ, GATE_PROJ, UP_PROJ, DOWN_PROJ, MATRICES = range(8)
# columns of `matrices`
ADDRESS, ROW_BYTES, COLUMNS, SCALES, SCALE_BYTES, OUTPUTS = range(6)
MEETINGS = 6  # of the threads in a layer; two more in a step
_ONE = np.float32(1.0)
_ZERO = np.float32(0.0)


@njit_float
def token_step(kinds: Any, model: Any, cache: Any, work: Any, crew: Any) -> None:
    """Run this thread's share; `crew` is (thread, threads, steps before this one, address of sync)."""
    shape, at, matrices, norms, eps = model.shape, model.at, model.matrices, model.norms, model.eps
    rows, tokens, wanted, x, normed = work.rows, work.tokens, work.wanted, work.x, work.normed
    thread, threads, steps, _ = crew
    T, layers = rows[0], shape[LAYERS]
    own = at[NORMED] + thread * normed.shape[1] * normed.shape[2] * 4
    meeting = steps * (MEETINGS * layers + 2)
    for t in range(thread, T, threads):
        for c in range(shape[HIDDEN]):
            x[t, c] = widen(kinds[0][tokens[t], c])
    meeting = _meet(crew, meeting)
    for layer in range(layers):
        first = layer * MATRICES
        for t in range(T):
            norm(x[t], norms[2 * layer], eps, normed[thread, t])
        for part in range(3):
            _multiply(kinds[1], matrices[first + Q_PROJ + part], (own, at[Q + part]), T, crew)
        meeting = _meet(crew, meeting)
        for unit in range(thread, T * shape[KV_HEADS], threads):
            _place(kinds[2], model, cache, work, (layer, unit // shape[KV_HEADS], unit % shape[KV_HEADS]))
        meeting = _meet(crew, meeting)
        for unit in range(thread, T * shape[KV_HEADS], threads):
            where = (layer, unit // shape[KV_HEADS], unit % shape[KV_HEADS], thread)
            _attend(kinds[2], model, cache, work, where)
        meeting = _meet(crew, meeting)
        _multiply(kinds[1], matrices[first + O_PROJ], (at[MIXED], at[Y]), T, crew)
        _add_share(work, T, crew)
        meeting = _meet(crew, meeting)
        for t in range(T):
            norm(x[t], norms[2 * layer + 1], eps, normed[thread, t])
        _multiply(kinds[1], matrices[first + GATE_PROJ], (own, at[GATE]), T, crew)
        _multiply(kinds[1], matrices[first + UP_PROJ], (own, at[UP]), T, crew)
        _swiglu_share(work, T, crew)
        meeting = _meet(crew, meeting)
        _multiply(kinds[1], matrices[first + DOWN_PROJ], (at[GATE], at[Y]), T, crew)
        _add_share(work, T, crew)
        meeting = _meet(crew, meeting)
    for w in range(rows[1]):
        norm(x[wanted[w]], norms[2 * layers], eps, normed[thread, w])
    _multiply(kinds[1], matrices[layers * MATRICES], (own, at[LOGITS]), rows[1], crew)
    _meet(crew, meeting)


@njit_float
def _meet(crew: Any, meeting: int) -> int:
    """Wait for the other threads; how many meetings there were."""
    _, threads, _, sync = crew
    if threads > 1:
        meet(sync, (meeting + 1) * threads)
    return meeting + 1


@njit_float
def _share(total: int, crew: Any) -> tuple[int, int]:
    """This thread's part of `total` outputs, in fours."""
    thread, threads, _, _ = crew
    first = total * thread // threads // 4 * 4
    return first, total if thread == threads - 1 else total * (thread + 1) // threads // 4 * 4


@njit_float
def _multiply(kind: Any, matrix: Any, ways: Any, rows: int, crew: Any) -> None:
    """This thread's outputs of a matrix; `ways` are the addresses of its inputs and of its outputs."""
    total = matrix[OUTPUTS]
    parts = (matrix[ADDRESS], matrix[ROW_BYTES], matrix[COLUMNS], matrix[SCALES], matrix[SCALE_BYTES])
    products(kind, parts, ways[0], rows, (ways[1], total), _share(total, crew))


@njit_float
def _add_share(work: Any, rows: int, crew: Any) -> None:
    """x += y in this thread's part of the columns."""
    x, y = work.x, work.y
    first, last = _share(x.shape[1], crew)
    for t in range(rows):
        add(x[t, first:last], y[t, first:last])


@njit_float
def _swiglu_share(work: Any, rows: int, crew: Any) -> None:
    """gate becomes silu(gate) · up in this thread's part of the columns."""
    gate, up = work.gate, work.up
    first, last = _share(gate.shape[1], crew)
    for t in range(rows):
        swiglu(gate[t, first:last], up[t, first:last])


@njit_float
def _place(kind: Any, model: Any, cache: Any, work: Any, unit: Any) -> None:
    """Finish a row's q heads of one group and its k and v head; write k and v to the row's page."""
    layer, t, h = unit
    shape, eps, biases, q, k, v = model.shape, model.eps, model.biases, work.q, work.k, work.v
    d, group = shape[HEAD_DIM], shape[HEADS] // shape[KV_HEADS]
    position = work.positions[t]
    key, value = k[t, h * d : (h + 1) * d], v[t, h * d : (h + 1) * d]
    if shape[HAS_BIAS]:
        queries, keys = shape[HEADS] * d, shape[KV_HEADS] * d
        add(q[t, h * group * d : (h + 1) * group * d], biases[layer, h * group * d : (h + 1) * group * d])
        add(key, biases[layer, queries + h * d : queries + (h + 1) * d])
        add(value, biases[layer, queries + keys + h * d : queries + keys + (h + 1) * d])
    scale = _ONE / np.sqrt(np.float32(d))
    for g in range(h * group, (h + 1) * group):
        query = q[t, g * d : (g + 1) * d]
        if shape[HAS_QK_NORM]:
            norm(query, model.qk_norms[layer, 0], eps, query)
        rotate(query, model.cos[position], model.sin[position], scale)
    if shape[HAS_QK_NORM]:
        norm(key, model.qk_norms[layer, 1], eps, key)
    rotate(key, model.cos[position], model.sin[position], _ONE)
    page, place = work.tables[t, position // PAGE], position % PAGE
    at = (layer, page, h)
    put(cache.k[layer, page, h, place], key, cache.k_scale[at], cache.k_zero[at], place)
    put(cache.v[layer, page, h, place], value, cache.v_scale[at], cache.v_zero[at], place)


@njit_float
def _attend(kind: Any, model: Any, cache: Any, work: Any, unit: Any) -> None:
    """Attention of a row's q heads of one group over its own pages, up to its own position."""
    layer, t, h, thread = unit
    shape, at = model.shape, model.at
    scores, mixed, q, tables = work.scores[thread], work.mixed, work.q, work.tables
    d, group, room = shape[HEAD_DIM], shape[HEADS] // shape[KV_HEADS], shape[ROOM]
    length = work.positions[t] + 1
    row_bytes = shape[KV_BYTES]
    stripe = at[SCORES] + thread * scores.shape[0] * room * 4
    start = (t * shape[HEADS] + h * group) * d
    for i in range((length + PAGE - 1) // PAGE):
        slot = (layer * shape[PAGES] + tables[t, i]) * shape[KV_HEADS] + h
        page = (at[KEYS] + slot * PAGE * row_bytes, row_bytes, d)
        count = min(PAGE, (length - i * PAGE + 3) // 4 * 4)
        products(kind, page, at[Q] + start * 4, group, (stripe + i * PAGE * 4, room), (0, count))
        if is_scaled(kind):
            _rescale(kind, cache, q[t], scores, (layer, tables[t, i], h, i * PAGE, d))
    out = mixed[t, start - t * shape[HEADS] * d : start - t * shape[HEADS] * d + group * d]
    for g in range(group):
        total = soften(scores[g, :length])
        base = _ZERO
        if is_scaled(kind):
            base = _weigh(kind, cache, scores[g, :length], tables[t], (layer, h))
        out[g * d : (g + 1) * d] = base
        scores[g, room - 1] = total
    for i in range((length + PAGE - 1) // PAGE):
        slot = (layer * shape[PAGES] + tables[t, i]) * shape[KV_HEADS] + h
        block = (at[VALUES] + slot * PAGE * row_bytes, row_bytes, d, min(PAGE, length - i * PAGE))
        mix_page(kind, block, (stripe + i * PAGE * 4, room), group, at[MIXED] + start * 4)
    for g in range(group):
        total = scores[g, room - 1]
        for c in range(g * d, (g + 1) * d):
            out[c] /= total


@njit_float
def _rescale(kind: Any, cache: Any, q: Any, scores: Any, place: Any) -> None:
    """Scores of codes become scores of keys."""
    layer, page, h, first, d = place
    scales, zeros = cache.k_scale[layer, page, h], cache.k_zero[layer, page, h]
    for g in range(len(scores)):
        base = _ZERO
        if is_shifted(kind):
            head = q[(h * len(scores) + g) * d : (h * len(scores) + g + 1) * d]
            for c in range(d):
                base += head[c]
        for p in range(PAGE):
            scores[g, first + p] *= widen(scales[p])
            if is_shifted(kind):
                scores[g, first + p] += base * widen(zeros[p])


@njit_float
def _weigh(kind: Any, cache: Any, shares: Any, table: Any, place: Any) -> Any:
    """Shares of values become shares of codes; what the zeros add to each column."""
    layer, h = place
    base = _ZERO
    for i in range((len(shares) + PAGE - 1) // PAGE):
        scales, zeros = cache.v_scale[layer, table[i], h], cache.v_zero[layer, table[i], h]
        for p in range(i * PAGE, min(i * PAGE + PAGE, len(shares))):
            if is_shifted(kind):
                base += shares[p] * widen(zeros[p - i * PAGE])
            shares[p] *= widen(scales[p - i * PAGE])
    return base
