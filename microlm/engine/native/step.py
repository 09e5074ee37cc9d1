"""The compiled token step of one decoder over one cache. Enters: ids, positions, pages; leaves: logits."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from microlm.core import runtime
from microlm.engine.cache.store import PAGE, KVStore
from microlm.engine.native.team import Team
from microlm.engine.native.weights import GROUP, QuantizedLinear
from microlm.model.config import ModelConfig
from microlm.model.transformer import Decoder, rope_tables
from microlm.text.compiled import IS_COMPILED

IntArray = npt.NDArray[np.integer]
Array = npt.NDArray[Any]
_KINDS = {torch.float32: np.float32, torch.bfloat16: np.uint16, torch.int8: np.int8, torch.uint8: np.uint8}
_LINE = 64  # bytes of a cache line
_CAPACITY = 64  # rows that buffers have room for


class Model(NamedTuple):
    """A decoder as the compiled code reads it: numbers, addresses, and small weights in float32."""

    shape: Array
    at: Array
    matrices: Array
    norms: Array
    eps: Any
    qk_norms: Array
    biases: Array
    cos: Array
    sin: Array


class Cache(NamedTuple):
    """The tensors of a store; empty where it has none."""

    k: Array
    v: Array
    k_scale: Array
    v_scale: Array
    k_zero: Array
    v_zero: Array


class Work(NamedTuple):
    """What a step reads and writes beside the model; `rows` is (rows, wanted rows)."""

    rows: Array
    tokens: Array
    positions: Array
    tables: Array
    wanted: Array
    x: Array
    normed: Array
    gate: Array
    up: Array
    y: Array
    q: Array
    k: Array
    v: Array
    scores: Array
    mixed: Array
    logits: Array


def available() -> bool:
    """Whether token steps can be compiled here."""
    return bool(IS_COMPILED)


def why_not(decoder: Decoder) -> str | None:
    """Why this decoder cannot run here; None when it can."""
    if not IS_COMPILED:
        return "numba is not installed"
    if decoder.cos.device.type != "cpu":
        return f"the model is on {decoder.cos.device.type}"
    matrices = _matrices(decoder)
    if len(found := {_stored(m).dtype for m in matrices}) > 1 or not found <= set(_KINDS):
        return "its matrices are of several kinds"
    packed = (m for m in matrices if isinstance(m, QuantizedLinear) and m.kind == "int4")
    if any(m.in_features % GROUP for m in packed):
        return f"an int4 matrix has inputs that are not whole groups of {GROUP}"
    if min(m.out_features for m in matrices) < 4:
        return "a matrix has fewer than 4 outputs"
    return None


class NativeStep:
    """Steps of few rows without torch: one compiled call for each thread. Not for many callers at once.

    A row's logits are the same bits whatever rows go along, and on any number of threads.
    """

    MAX_ROWS = 8
    """Rows that share one pass over the weights at their cheapest; more rows take proportionally longer."""

    def __init__(self, decoder: Decoder, store: KVStore, threads: int, *, own: bool = False) -> None:
        from microlm.engine.native.token_step import token_step

        self._step = token_step
        self._decoder, self._store = decoder, store  # whose memory the addresses are of
        self._team = Team(threads)
        if own:  # an optimizer may hold the memory of a decoder that others use
            _lay_together([_stored(m) for m in _matrices(decoder)])
        self._work = _buffers(decoder.config, store, threads)
        self._cache = Cache(*(_view(t) for t in (store.k, store.v)), *_scales(store))
        self._model = _model(decoder, store, self._work, self._cache)
        self.refresh()

    def refresh(self) -> None:
        """See where the matrices lie, copy the small weights: all that changed weights ask for."""
        matrices = _matrices(self._decoder)
        self._held = [_stored(m).data for m in matrices]  # their memory, whatever becomes of them
        weights = np.empty(0, _KINDS[_stored(matrices[0]).dtype])
        embedding = _view(self._decoder.model.embed_tokens.weight)
        self._kinds = (embedding, weights, np.empty(0, self._cache.k.dtype))
        self._model = self._model._replace(**_weights(self._decoder))

    def run(self, tokens: IntArray, positions: IntArray, tables: IntArray, wanted: IntArray) -> Tensor:
        """Float32 logits [w,V] of the rows `wanted` [w] of T tokens at `positions` [T], page `tables` [T,M].

        Keys and values of all T are written first; then each sees its own table up to its own position.
        """
        if len(tokens) <= _CAPACITY:
            return self._pass(tokens, positions, tables, wanted)
        logits = torch.empty(len(wanted), self._decoder.config.vocab_size)
        order = np.argsort(positions, kind="stable")  # who is seen goes before those who see
        for start in range(0, len(order), _CAPACITY):
            chosen = order[start : start + _CAPACITY]
            rows, places = np.nonzero(chosen[:, None] == wanted[None])
            found = self._pass(tokens[chosen], positions[chosen], tables[chosen], rows)
            logits[torch.from_numpy(places)] = found
        return logits

    def warm(self, tell: Callable[[str], None]) -> None:
        """Compile, or load what was compiled on this machine before; says so before and after."""
        if getattr(self._step, "signatures", ()):
            return
        tell("compiling the token step (once on this machine)")
        started = time.perf_counter()
        nobody = np.zeros(0, dtype=np.int64)
        with runtime.interruptible():
            self.run(nobody, nobody, np.zeros((0, 1), dtype=np.int32), nobody)
        tell(f"token step ready after {time.perf_counter() - started:.1f} s")

    def _pass(self, tokens: IntArray, positions: IntArray, tables: IntArray, wanted: IntArray) -> Tensor:
        count, asked, work = len(tokens), len(wanted), self._work
        work.rows[0], work.rows[1] = count, asked
        work.tokens[:count], work.positions[:count] = tokens, positions
        work.tables[:count, : tables.shape[1]] = tables
        work.wanted[:asked] = wanted
        self._team.run(self._share)
        return torch.from_numpy(work.logits[:asked].copy())

    def _share(self, thread: int, calls: int, sync: int) -> None:
        crew = (thread, self._team.threads, calls, sync)
        self._step(self._kinds, self._model, self._cache, self._work, crew)


def _matrices(decoder: Decoder) -> list[Any]:
    """The matrices in the order of the step: seven of each layer, then the head."""
    found: list[Any] = []
    blocks: list[Any] = list(decoder.model.layers)
    for block in blocks:
        attention, mlp = block.self_attn, block.mlp
        found += [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        found += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    return [*found, decoder.lm_head]


def _stored(matrix: Any) -> Tensor:
    return matrix.codes if isinstance(matrix, QuantizedLinear) else matrix.weight


def _lay_together(tensors: list[Tensor]) -> None:
    """Move tensors into one array; numpy asks for large pages, and reading goes a fifth faster on them."""
    if len({t.untyped_storage().data_ptr() for t in tensors}) == 1:
        return  # another step over the same decoder has done so, and reads there
    unique = {t.data_ptr(): t for t in tensors}.values()
    room = torch.from_numpy(np.empty(sum(t.nbytes + _LINE for t in unique) + _LINE, dtype=np.uint8))
    start = -room.data_ptr() % _LINE
    for tensor in unique:
        kept = room[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        tensor.data = kept.copy_(tensor.detach())
        start += -(-tensor.nbytes // _LINE) * _LINE


def _row(matrix: Any) -> list[int]:
    """A row of `Model.matrices`: address, bytes of a row, columns, address and bytes of scales, outputs."""
    stored = _stored(matrix)
    assert stored.is_contiguous()
    scales = matrix.scales if isinstance(matrix, QuantizedLinear) else None
    place = (0, 0) if scales is None else (scales.data_ptr(), scales.nbytes // len(scales))
    return [stored.data_ptr(), stored.nbytes // len(stored), matrix.in_features, *place, matrix.out_features]


def _model(decoder: Decoder, store: KVStore, work: Work, cache: Cache) -> Model:
    c = decoder.config
    cos, sin = (table[:, : c.head_dim // 2] for table in rope_tables(c))
    shape = (
        c.num_hidden_layers, c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim,
        cache.k.shape[-1] * cache.k.itemsize, store.pages, work.scores.shape[-1], c.qkv_bias, c.qk_norm,
    )  # fmt: skip
    buffers = (
        work.normed, work.q, work.k, work.v, work.mixed, work.gate, work.up, work.y, work.logits, work.scores,
        cache.k, cache.v,
    )  # fmt: skip
    return Model(
        shape=np.array(shape, dtype=np.int64),
        at=np.array([b.ctypes.data for b in buffers], dtype=np.int64),
        eps=np.float32(c.rms_norm_eps),
        cos=_floats(list(cos)),
        sin=_floats(list(sin)),
        **_weights(decoder),
    )


def _weights(decoder: Decoder) -> dict[str, Array]:
    """What of a `Model` a change of weights changes: where the matrices lie, copies of all else."""
    c = decoder.config
    blocks: list[Any] = list(decoder.model.layers)
    norms = [n.weight for b in blocks for n in (b.input_layernorm, b.post_attention_layernorm)]
    heads = [torch.stack((b.self_attn.q_norm.weight, b.self_attn.k_norm.weight)) for b in blocks if c.qk_norm]
    projections = [(b.self_attn.q_proj, b.self_attn.k_proj, b.self_attn.v_proj) for b in blocks if c.qkv_bias]
    biases = [torch.cat([p.bias for p in parts]) for parts in projections]
    return {
        "matrices": np.array([_row(m) for m in _matrices(decoder)], dtype=np.int64),
        "norms": _floats([*norms, decoder.model.norm.weight]),
        "qk_norms": _floats(heads or [torch.zeros(0, 0)]),
        "biases": _floats(biases or [torch.zeros(0)]),
    }


def _buffers(config: ModelConfig, store: KVStore, threads: int) -> Work:
    """Room for the rows of one pass; tables as wide as the model's window, or as the store."""
    c, R = config, _CAPACITY
    pages = min(store.pages, -(-c.max_position_embeddings // PAGE))
    room = pages * PAGE + 16  # the last one keeps a sum
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim

    def floats(*shape: int) -> Array:
        return np.zeros(shape, dtype=np.float32)

    return Work(
        rows=np.zeros(2, dtype=np.int64),
        tokens=np.zeros(R, dtype=np.int64),
        positions=np.zeros(R, dtype=np.int64),
        tables=np.zeros((R, pages), dtype=np.int32),
        wanted=np.zeros(R, dtype=np.int64),
        x=floats(R, c.hidden_size),
        normed=floats(threads, R, c.hidden_size),
        gate=floats(R, c.intermediate_size),
        up=floats(R, c.intermediate_size),
        y=floats(R, c.hidden_size),
        q=floats(R, queries),
        k=floats(R, keys),
        v=floats(R, keys),
        scores=floats(threads, c.num_attention_heads // c.num_key_value_heads, room),
        mixed=floats(R, queries),
        logits=floats(R, c.vocab_size),
    )


def _scales(store: KVStore) -> list[Array]:
    parts = (store.k_scale, store.v_scale, store.k_zero, store.v_zero)
    return [np.zeros((0, 0, 0, 0), np.uint16) if p is None else _view(p) for p in parts]


def _floats(tensors: list[Tensor]) -> Array:
    """Tensors of one shape, copied into one float32 array."""
    return np.ascontiguousarray(torch.stack([t.detach().float() for t in tensors]).numpy())


def _view(tensor: Tensor) -> Array:
    """A tensor's memory as numpy sees it; bf16 as uint16."""
    kind = tensor.detach()
    return kind.view(torch.int16).numpy().view(np.uint16) if kind.dtype == torch.bfloat16 else kind.numpy()
