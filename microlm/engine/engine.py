"""The engine: schedule → run → postprocess. Enters: an HF directory, prompts; leaves: Deltas, Completions."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from microlm.core import runtime
from microlm.core.errors import UserError
from microlm.core.records import Completion, Sampling
from microlm.engine import loading
from microlm.engine.asking import Asking
from microlm.engine.cache.store import KVDtype
from microlm.engine.forward import whole
from microlm.engine.forward.batch import Span, batch_of
from microlm.engine.forward.cached import cached_logprobs
from microlm.engine.forward.following import follow
from microlm.engine.grammar import Grammars
from microlm.engine.postprocess import Postprocess, Scored, Step
from microlm.engine.prompts import Prompt, encode_prompt
from microlm.engine.request import Delta, Request
from microlm.engine.sampling import of_prompt
from microlm.engine.scheduler import Work, tokens_of
from microlm.model.transformer import Decoder


class Engine:
    """A loaded model with a fixed pool of KV pages. Not for many threads: `EngineService` is.

    Weights that are in memory already come as `decoder`; the directory then gives the tokenizer only, and who
    changes the weights calls `refresh`. With a `dtype` or `quantize` the engine runs on a copy of them.
    `kv_memory` is in bytes; `max_prefill_tokens` bounds a step; `speculate` is the longest draft, 0 for none;
    `batch_invariant`: an answer is bit for bit the same alone and in any company.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        decoder: Decoder | None = None,
        dtype: runtime.Dtype | None = None,
        max_seqs: int = 64,
        max_seq_len: int | None = None,
        max_prefill_tokens: int | None = None,
        kv_memory: int | None = None,
        kv_dtype: KVDtype = "auto",
        quantize: loading.Quantize = "none",
        prefix_caching: bool = True,
        speculate: int = 0,
        batch_invariant: bool = False,
        native: bool = True,
        threads: int | None = None,
    ) -> None:
        options = loading.Options(
            dtype, max_seqs, max_seq_len, max_prefill_tokens, kv_memory, kv_dtype, quantize, prefix_caching,
            speculate, batch_invariant, native, threads,
        )  # fmt: skip
        options.check()
        self.directory = Path(directory)
        self._decoder, self._source = loading.load_decoder(self.directory, decoder, options), decoder
        self.config = self._decoder.config
        self.tokenizer = loading.load_tokenizer(self.directory, self.config.vocab_size)
        self._runner, self._scheduler, self.max_seq_len = loading.build(
            self._decoder, options, own=self._decoder is not decoder
        )
        self._options = options
        self._grammars = Grammars(self.tokenizer)
        named = (self.config.eos_token_id, *self.config.more_eos_ids)
        ends = {self.tokenizer.eos_id, self.tokenizer.pad_id, *named}
        self._postprocess = Postprocess(self.tokenizer, {i for i in ends if i is not None})
        self._asking = Asking(
            self.tokenizer, self.config, self._grammars, self._runner.adapters, self.max_seq_len, speculate,
            self._runner.draft_price,
        )  # fmt: skip
        self._lock = threading.RLock()  # requests and adapters come and go between steps
        self.on_step: Callable[[Sequence[Work]], None] | None = None
        """Hears before each step what it runs."""

    @property
    def cache_bytes(self) -> int:
        """Memory of the KV cache when every page is used; it never grows beyond."""
        return self._runner.store.nbytes

    @property
    def max_seqs(self) -> int:
        """How many requests run at once."""
        return self._options.max_seqs

    @property
    def free_slots(self) -> int:
        """How many more requests could run at once, if there are pages for them."""
        return self.max_seqs - len(self._scheduler.running)

    @property
    def used_pages(self) -> int:
        """Pages that requests hold now."""
        return self._scheduler.pool.pages - self._scheduler.pool.free

    @property
    def preemptions(self) -> int:
        """How often a request had to give its pages back and begin again."""
        return self._scheduler.preemptions

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._scheduler.running or self._scheduler.waiting)

    @property
    def adapters(self) -> list[str]:
        """The LoRA adapters that requests may name."""
        return self._runner.adapters.names

    def refresh(self) -> None:
        """Take over weights that their owner has changed in place, forget what the old ones computed."""
        with self._lock:
            if self.busy:
                raise UserError("refresh: requests wait or run; finish them, or cancel them first")
            self._scheduler.pool.forget_all()
            if self._source is not None and self._source is not self._decoder:
                follow(self._decoder, self._source)
            self._runner.refresh()

    def warm(self, tell: Callable[[str], None]) -> None:
        """Compile what the first step would compile; `tell` hears of it."""
        self._runner.warm(tell)

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling],
        progress: Callable[[int], None] | None = None,
        adapter: str | None = None,
    ) -> list[Completion]:
        """Answer all prompts, in their order, `n` times each. `progress` hears how many more are finished."""
        each = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        if len(each) != len(prompts):
            raise UserError(
                f"sampling: {len(each)} settings for {len(prompts)} prompts; give one, or one for each"
            )
        requests = self._asking.all(prompts, each, adapter)
        for request in requests:
            self.enqueue(request)
        pending, ahead = list(requests), 4 * self.max_seqs  # beyond those nobody has run yet
        try:
            while pending:
                self.step()
                still = [r for r in pending[:ahead] if r.finish_reason is None]
                done = min(ahead, len(pending)) - len(still)
                if done:
                    pending[:ahead] = still
                    if progress:
                        progress(done)
        finally:
            for request in pending:
                self.cancel(request)
        return [self.completion(r) for r in requests]

    def stream(self, prompt: Prompt, sampling: Sampling, adapter: str | None = None) -> Iterator[Delta]:
        """Answer one prompt piece by piece; closing the generator cancels it and frees its pages."""
        if sampling.n > 1:
            raise UserError(
                f"n: {sampling.n} answers cannot come as one stream; ask for one, or use generate"
            )
        return self._follow(self.prepare(prompt, sampling, adapter=adapter))

    def completion(self, request: Request) -> Completion:
        """The whole answer of a finished request."""
        return request.completion(
            "".join(request.pieces) if request.text else self.tokenizer.decode(request.output)
        )

    def logprobs(self, ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """Natural-log probability of every id but the first, given those before it; nothing is generated.

        Over a quantized KV cache, or batch-invariant, it is what decoding would see: through the cache.
        """
        self._check_ids(ids)
        results: list[list[float]] = [[] for _ in ids]
        cached = self._options.kv_dtype != "auto" or self._options.batch_invariant
        with torch.inference_mode():
            if cached:
                room = min(self._scheduler.limits.tokens, self._scheduler.limits.scored)
                return [cached_logprobs(self._runner, self._scheduler.pool, s, room) for s in ids]
            for group in whole.groups([len(s) for s in ids], self._group_tokens):
                values = whole.logprobs(self._decoder, [ids[i] for i in group])
                for i, own in zip(group, values, strict=True):
                    results[i] = own
        return results

    def embed(
        self, texts: Sequence[str | Sequence[int]], pooling: whole.Pooling = "mean", normalize: bool = True
    ) -> NDArray[np.float32]:
        """One vector [D] for each text (or its ids), pooled from the last hidden states."""
        if pooling not in ("mean", "last"):
            raise UserError(f"pooling: {pooling!r} is not known; choose mean or last")
        ids = self._asking.encode(texts)
        self._check_ids(ids)
        vectors = np.zeros((len(ids), self.config.hidden_size), dtype=np.float32)
        with torch.inference_mode():
            for group in whole.groups([len(s) for s in ids], self._group_tokens):
                found = whole.embeddings(self._decoder, [ids[i] for i in group], pooling, normalize)
                vectors[group] = found.cpu().numpy()
        return vectors

    def load_adapter(self, name: str, directory: str | Path) -> None:
        """Load a LoRA adapter that requests may name from now on; its base must be this model."""
        path = Path(directory)
        digest = loading.digest_for(self.directory, path)
        with self._lock:
            self._runner.adapters.load(name, path, digest)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter; requests that run with it go on with it."""
        with self._lock:
            self._runner.adapters.unload(name)

    def prepare(
        self, prompt: Prompt, sampling: Sampling, *, live: bool = True, adapter: str | None = None
    ) -> Request:
        """A checked request that is not queued yet; touches nothing shared, so any thread may call it.

        One answer, whatever `sampling.n`. `live`: someone reads along, so that each step's text is wanted.
        """
        return self._asking.one(prompt, sampling, live, adapter)

    def prepare_many(
        self, prompt: Prompt, sampling: Sampling, *, live: bool = True, adapter: str | None = None
    ) -> list[Request]:
        """`sampling.n` such requests, answer i with seed + i; they share the prompt's full pages."""
        return self._asking.many(prompt, sampling, live, adapter)

    def add(self, prompt: Prompt, sampling: Sampling, adapter: str | None = None) -> Request:
        """Queue a request; it joins at the next step that has room."""
        return self.enqueue(self.prepare(prompt, sampling, adapter=adapter))

    def enqueue(self, request: Request) -> Request:
        """Queue a prepared request."""
        with self._lock:
            self._scheduler.add(request)
        return request

    def cancel(self, request: Request) -> None:
        """End a request wherever it is; its pages are free at once. A finished one stays as it is."""
        with self._lock:
            request.finish_reason = request.finish_reason or "cancelled"
            if request.running:  # a finished one runs still when its last step failed half-way
                self._scheduler.release(request)
            elif request in self._scheduler.waiting:
                self._scheduler.waiting.remove(request)

    @torch.inference_mode()
    def step(self) -> Step:
        """A token for every writing request, and a piece of the newcomers' prompts. Returns who got what.

        A request that nobody reads along with (`live=False`) has one delta, its last.
        """
        with self._lock:
            work = self._scheduler.plan()
            if not work:
                return []
            if self.on_step is not None:
                self.on_step(work)
            drawn = [w for w in work if w.last]
            matchers = [w.request.matcher for w in drawn if w.request.matcher is not None]
            masks = self._grammars.begin(matchers) if matchers else None
            logits = self._run(work)
            scored = self._scored(work, logits)
            deltas = self._postprocess.apply(scored, logits, masks) if scored else []
            self._learn(drawn)
            self._scheduler.advance(work)
            for request, delta in deltas:
                if request.backlog is not None:
                    request.backlog.append(delta)
            return deltas

    def _run(self, work: Sequence[Work]) -> Tensor:
        """Scores of the wanted rows, part by part: the last of each that draws, all that are scored."""
        if self._scheduler.fresh:
            self._runner.store.clear(self._scheduler.fresh)
            self._scheduler.fresh = []
        spans = [Span(tokens_of(w), w.start, w.request.table, w.wanted, w.request.adapter) for w in work]
        return self._runner.forward(batch_of(spans))

    def _scored(self, work: Sequence[Work], logits: Tensor) -> list[Scored]:
        """Where each drawing request's rows lie; scores of a prompt's tokens go to their request."""
        scored, first = [], 0
        for w in work:
            stop = first + w.wanted
            drawing = 1 + len(w.draft) if w.last else 0
            if w.request.sampling.prompt_logprobs is not None:
                self._score_prompt(w, logits[first:stop])
            if drawing:
                scored.append(Scored(w.request, stop - drawing, w.draft))
            first = stop
        return scored

    def _score_prompt(self, work: Work, logits: Tensor) -> None:
        """Rows of a prompt's piece: each gives the prompt's next token its probability."""
        request = work.request
        known = max(len(request.prompt_logprobs) - 1, 0)  # a preempted request has some already
        stop = min(work.start + work.size, len(request.prompt) - 1)
        if stop > max(known, work.start):
            own = logits[known - work.start : stop - work.start]
            of_prompt(request, request.prompt[known + 1 : stop + 1], own, self.tokenizer.vocab_size)

    def _learn(self, drawn: Sequence[Work]) -> None:
        """Tell each request's lookup how much of its draft came true."""
        for request, start, _, _, draft in drawn:
            if draft and request.lookup is not None:
                request.lookup.learn(len(draft), max(request.length - start - 2, 0))

    def _follow(self, request: Request) -> Iterator[Delta]:
        request.backlog = deque()
        self.enqueue(request)  # here, not before: a generator that is never started cannot clean up
        try:
            while True:
                while request.backlog:
                    delta = request.backlog.popleft()
                    yield delta
                    if delta.finish_reason:
                        return
                if request.finish_reason:  # someone cancelled it
                    yield Delta("", (), request.finish_reason, request.error)
                    return
                self.step()
        finally:
            self.cancel(request)

    def _check_ids(self, ids: Sequence[Sequence[int]]) -> None:
        window = self.config.max_position_embeddings
        for i, sequence in enumerate(ids):
            if not 1 <= len(sequence) <= window:
                raise UserError(
                    f"sequence {i}: {len(sequence)} tokens, expected 1 to {window}; cut it into pieces"
                )
            encode_prompt(self.tokenizer, sequence, self.config.vocab_size)

    @property
    def _group_tokens(self) -> int:
        """Padded tokens of whole sequences that are computed at once."""
        return max(4096, self._scheduler.limits.tokens)
