"""The compiled token step equals the torch decoder, and a row's bits depend on nothing beside it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from artifacts import random_decoder, tiny_config
from tiny_model import write_tiny_model
from torch import Tensor

from microlm.core.records import Sampling
from microlm.engine import Engine
from microlm.engine.cache.store import PAGE, KVDtype, KVStore
from microlm.engine.native.step import NativeStep, why_not
from microlm.engine.native.weights import QuantizedLinear, quantize
from microlm.model.config import ModelType
from microlm.model.transformer import Decoder, causal_attend

ROWS = 70  # tokens: three pages, and more than one pass takes
SHAPES: dict[str, tuple[ModelType, dict[str, Any]]] = {
    "llama-4-of-2": ("llama", {}),
    "qwen2-bias-alone": ("qwen2", {"num_key_value_heads": 4}),
    "qwen3-3-of-1-d32": ("qwen3", {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 32}),
    "llama-d64-wide": ("llama", {"hidden_size": 576, "head_dim": 64, "num_attention_heads": 9,
                                 "num_key_value_heads": 3, "intermediate_size": 200}),
    "qwen3-tied-d96": ("qwen3", {"hidden_size": 192, "head_dim": 96, "tie_word_embeddings": True}),
    "qwen2-d128-5-of-1": ("qwen2", {"hidden_size": 40, "head_dim": 128, "num_attention_heads": 5,
                                    "num_key_value_heads": 1, "vocab_size": 301}),
}  # fmt: skip
KINDS = ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)]
KINDS += [pytest.param("int8", marks=pytest.mark.slow), "int4"]  # each is compiled once on a machine: 15 s


class Setup:
    """A random decoder with matrices of a kind, the same one for torch, a step over pages in disorder."""

    def __init__(self, shape: str = "llama-4-of-2", kind: str = "float32", threads: int = 1) -> None:
        model_type, fields = SHAPES[shape]
        if kind == "int4":
            fields = {"hidden_size": 64, "head_dim": 32, "intermediate_size": 128} | fields
        config = tiny_config(model_type, **fields)
        self.decoder, self.torch = _tame(random_decoder(config)), _tame(random_decoder(config))
        self.kind = kind
        if kind == "bfloat16":
            for weight in self.torch.parameters():
                weight.data = weight.data.bfloat16().float()
            self.decoder.to(torch.bfloat16)
        elif kind in ("int8", "int4"):
            quantize(self.decoder, kind)
            quantize(self.torch, kind)
        dtype: KVDtype = kind if kind in ("int8", "int4") else "auto"
        self.store = KVStore(config, 9, dtype, torch.bfloat16 if kind == "bfloat16" else torch.float32)
        self.step = NativeStep(self.decoder, self.store, threads)
        self.ids = torch.randint(0, config.vocab_size, (ROWS,), generator=torch.Generator().manual_seed(1))
        self.table = np.array([[3, 8, 5, 1]], dtype=np.int32)

    def run(self, rows: list[int], wanted: list[int] | None = None, table: Any = None) -> Tensor:
        """The rows of the sequence at these positions, in one call."""
        tables = np.repeat(self.table if table is None else table, len(rows), 0)
        asked = np.arange(len(rows)) if wanted is None else np.array(wanted)
        return self.step.run(self.ids[rows].numpy(), np.array(rows), tables, asked)

    def expected(self) -> tuple[Tensor, float]:
        """Logits of torch over the keys and values in the store, and how far those are from its own."""
        heads = self.store.heads
        pages = torch.from_numpy(self.table[0, : -(-ROWS // PAGE)].astype(np.int64))
        places = (torch.arange(heads)[:, None] + pages * heads).flatten()
        worst = 0.0

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            nonlocal worst
            stored = [part[:, :, :ROWS].float() for part in self.store.gather(layer, places, 1)]
            for found, own in zip(stored, (k, v), strict=True):
                worst = max(worst, ((found - own).abs().amax(-1) / own.abs().amax(-1)).max().item())
            return causal_attend(layer, q, *stored)

        with torch.inference_mode():
            hidden = self.torch.hidden(self.ids[None], torch.arange(ROWS), attend)
            return self.torch.logits(hidden)[0], worst


def _tame(decoder: Decoder) -> Decoder:
    """As large as the tiny ones' weights are in sum, however wide: else scores would saturate."""
    with torch.no_grad():
        for weight in decoder.parameters():
            if weight.dim() == 2:
                weight *= min(1.0, (32 / weight.shape[1]) ** 0.5)
    return decoder.eval()


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Float32 sums in another order."""
    assert expected.abs().max() > 1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_one_by_one_equals_torch(shape: str) -> None:
    setup = Setup(shape)
    found = torch.cat([setup.run([i]) for i in range(ROWS)])
    with torch.inference_mode():
        whole = setup.torch(setup.ids[None])[0]
    assert_close(found, whole)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_equals_torch_on_the_same_weights(kind: str) -> None:
    setup = Setup(kind=kind)
    found = torch.cat([setup.run([i]) for i in range(ROWS)])
    expected, off = setup.expected()
    assert_close(found, expected)
    assert off < {"float32": 1e-5, "bfloat16": 2**-8, "int8": 0.006, "int4": 0.09}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_of_a_row_depend_on_nothing_beside_it(kind: str) -> None:
    alone = Setup(kind=kind)
    bits = torch.cat([alone.run([i]) for i in range(ROWS)])
    for threads in (1, 2, 3):
        setup = Setup(kind=kind, threads=threads)
        start = 0
        for count in (1, 2, 3, 4, 5, 6, 7, 8, 13, 21):  # rows of one sequence in one call see each other
            assert torch.equal(setup.run(list(range(start, start + count))), bits[start : start + count])
            start += count
        assert start == ROWS


def test_rows_of_many_sequences_do_not_meet() -> None:
    setup = Setup("qwen3-3-of-1-d32")
    first = torch.cat([setup.run([i]) for i in range(40)])
    other = np.array([[6, 2]], dtype=np.int32)
    tokens, positions = setup.ids[:2].numpy(), np.array([40, 0])
    tables = np.array([setup.table[0], [*other[0], 0, 0]], dtype=np.int32)
    both = setup.step.run(tokens, positions, tables, np.array([1, 0]))
    assert torch.equal(both[0], setup.step.run(tokens[1:], positions[1:], tables[1:], np.array([0]))[0])
    assert torch.equal(both[1], setup.step.run(tokens[:1], positions[:1], tables[:1], np.array([0]))[0])
    assert not torch.equal(both[1], first[39])


def test_more_rows_than_a_pass_takes_in_any_order() -> None:
    setup, whole = Setup(), Setup()
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(2)).tolist()
    bits = torch.cat([whole.run([i]) for i in range(ROWS)])
    assert torch.equal(setup.run(order, [5, 69, 0]), bits[[order[5], order[69], order[0]]])


def test_the_cache_beyond_a_row_is_not_seen() -> None:
    setup, clean = Setup(), Setup()
    setup.store.k.fill_(torch.nan)
    setup.store.v.fill_(torch.nan)
    for i in range(40):
        assert torch.equal(setup.run([i]), clean.run([i]))


def test_scores_that_are_no_numbers_come_out_as_such() -> None:
    setup = Setup()
    with torch.no_grad():
        setup.decoder.model.layers[1].self_attn.v_proj.weight[3, 3] = torch.nan
    assert setup.run([0]).isnan().all()


def test_what_cannot_run_here_is_named() -> None:
    decoder = random_decoder(tiny_config("llama"))
    assert why_not(decoder) is None
    decoder.lm_head = QuantizedLinear(decoder.lm_head, "int8")
    assert why_not(decoder) == "its matrices are of several kinds"
    quantize(decoder, "int4")
    assert "groups of 64" in str(why_not(random_quantized()))


def random_quantized() -> Decoder:
    decoder = random_decoder(tiny_config("llama"))
    quantize(decoder, "int4")
    return decoder


def test_an_interrupted_call_leaves_no_thread_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup(threads=2)
    expected = setup.run([0])
    share = setup.step._share

    def interrupted(thread: int, calls: int, sync: int) -> None:
        if thread == 0:
            raise KeyboardInterrupt
        share(thread, calls, sync)

    monkeypatch.setattr(setup.step, "_share", interrupted)
    with pytest.raises(KeyboardInterrupt):
        setup.run([0])
    monkeypatch.undo()
    assert torch.equal(setup.run([0]), expected)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
def test_a_forked_process_starts_its_own_threads() -> None:
    setup = Setup(threads=2)
    expected = setup.run([0])
    child = os.fork()
    if not child:
        signal.alarm(60)
        os._exit(0 if torch.equal(setup.run([0]), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_process_with_helpers_ends() -> None:
    code = "from test_native_step import Setup; s = Setup(threads=3); print(s.run([0]).shape)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, check=True, timeout=120,
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.stdout == "torch.Size([1, 300])\n"


def test_warming_compiles_with_a_word() -> None:
    setup, told = Setup(), list[str]()
    setup.step.warm(told.append)
    assert len(told) in (0, 2)  # compiled already, or told before and after
    assert setup.run([0]).shape == (1, 300)


def test_without_numba_torch_answers_the_same(tmp_path: Path) -> None:
    prompts, sampling = [[5, 9, 7], [6] * 40], Sampling(max_tokens=12, ignore_eos=True)
    model = write_tiny_model(tmp_path)
    expected = [list(c.token_ids) for c in Engine(model, max_seqs=2).generate(prompts, sampling)]
    code = f"""
import sys
sys.modules.update(numba=None, llvmlite=None)
from microlm.core.records import Sampling
from microlm.engine import Engine
from microlm.engine.native.step import why_not
engine = Engine({str(model)!r}, max_seqs=2)
assert why_not(engine._decoder) == "numba is not installed"
print([list(c.token_ids) for c in engine.generate({prompts}, Sampling(max_tokens=12, ignore_eos=True))])
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == f"{expected}\n"
