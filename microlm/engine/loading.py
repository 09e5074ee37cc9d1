"""A directory → what an engine runs on: decoder, tokenizer, pages. Enters: an HF directory, options."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from microlm.core import manifest, runtime
from microlm.core.errors import UserError
from microlm.engine.cache.memory import choose_size, free_bytes
from microlm.engine.cache.pages import PagePool, pages_for
from microlm.engine.cache.store import KVDtype, KVStore
from microlm.engine.forward.following import bare_copy
from microlm.engine.forward.runner import Runner, Ways
from microlm.engine.native.step import NativeStep
from microlm.engine.native.weights import quantize as quantize_weights
from microlm.engine.scheduler import Limits, Scheduler
from microlm.model import directory as hf_directory
from microlm.model import lora
from microlm.model.transformer import Decoder
from microlm.text.tokenizer import Tokenizer

Quantize = Literal["none", "int8", "int4"]
MOST_THREADS = 256
_SCORES = 2**24  # scores of prompts that are held at once (64 MiB)
_STEP_TOKENS = {"cpu": 512, "cuda": 8192}  # of a step: a prompt's piece must not keep the others waiting


@dataclass(frozen=True, slots=True)
class Options:
    """What `Engine` was asked for, but for directory and decoder."""

    dtype: runtime.Dtype | None
    max_seqs: int
    max_seq_len: int | None
    max_prefill_tokens: int | None
    kv_memory: int | None
    kv_dtype: KVDtype
    quantize: Quantize
    prefix_caching: bool
    speculate: int
    batch_invariant: bool
    native: bool
    threads: int | None

    def check(self) -> None:
        """Refuse what has no meaning, by name."""
        for name, known in (("dtype", runtime.Dtype), ("kv_dtype", KVDtype), ("quantize", Quantize)):
            value = getattr(self, name)
            if value not in get_args(known) and (name, value) != ("dtype", None):
                raise UserError(f"{name}: {value!r} is not known; choose from {', '.join(get_args(known))}")
        if self.max_seqs < 1:
            raise UserError(f"max_seqs: {self.max_seqs} is below 1; the engine needs room for a request")
        if self.max_prefill_tokens is not None and self.max_prefill_tokens < 1:
            raise UserError(
                f"max_prefill_tokens: {self.max_prefill_tokens} is below 1; 512 is usual on a CPU"
            )
        if self.speculate < 0:
            raise UserError(f"speculate: {self.speculate} is below 0; 0 drafts nothing, 7 is usual")
        if self.threads is not None and not 1 <= self.threads <= MOST_THREADS:
            raise UserError(
                f"threads: {self.threads} is not between 1 and {MOST_THREADS}; "
                "leave it out to use what torch uses"
            )


def digest_for(model: Path, adapter: Path) -> str | None:
    """The digest that the adapter's base must have: the served model's; None where either states none.

    Of an adapter that states one, beside a model that does not, a warning says that nothing is checked.
    """
    wanted = lora.made_for(adapter)
    if not wanted:
        return None
    found = manifest.find(str(model))
    if found is None:
        warnings.warn(
            f"{adapter}: was made for model {wanted[:12]}…; whether {model} is that one cannot be checked, "
            f"it has no {manifest.MANIFEST}: serve the artifact that the adapter was trained on to be sure",
            stacklevel=3,
        )
    return found.digest if found else None


def load_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """The directory's tokenizer, checked against the model's number of ids."""
    tokenizer = Tokenizer.load(path)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model {vocab_size}; "
            "they do not belong together"
        )
    return tokenizer


def load_decoder(path: Path, decoder: Decoder | None, options: Options) -> Decoder:
    """The directory's weights as they were asked for; a given decoder itself, or a copy as was asked for."""
    if decoder is None:
        precision = runtime.torch_dtype(options.dtype or "float32")
        decoder = hf_directory.load(path, precision).to(device=runtime.device(), dtype=precision).eval()
    elif options.dtype or options.quantize != "none":
        decoder = bare_copy(decoder, runtime.torch_dtype(options.dtype) if options.dtype else None)
    if options.quantize != "none":
        quantize_weights(decoder, options.quantize)
    return decoder


def build(decoder: Decoder, options: Options, own: bool) -> tuple[Runner, Scheduler, int]:
    """The runner, the scheduler and the longest sequence; all memory of the KV cache is taken here.

    `own`: nobody else uses the decoder.
    """
    config, device, precision = decoder.config, decoder.cos.device, decoder.compute_dtype
    size = choose_size(
        config,
        options.kv_dtype,
        precision,
        free_bytes(device),
        options.max_seqs,
        options.max_seq_len,
        options.kv_memory,
    )
    store = KVStore(config, size.pages, options.kv_dtype, precision, device)
    table = pages_for(size.length)
    ways = Ways(options.native, options.batch_invariant, options.threads or torch.get_num_threads(), own)
    runner = Runner(decoder, store, ways, table)
    if own and options.max_seqs > NativeStep.MAX_ROWS and not options.batch_invariant:
        runner.pack()
    limits = Limits(
        max_seqs=options.max_seqs,
        tokens=options.max_prefill_tokens or _STEP_TOKENS[device.type],
        scored=max(1, _SCORES // config.vocab_size),
        draft_rows=runner.draft_rows if options.speculate else 0,
        table=table,
    )
    return runner, Scheduler(PagePool(size.pages), limits, options.prefix_caching), size.length
