"""The engine: schedule → run → postprocess. Enters: an HF directory, prompts; leaves: Deltas, Completions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from microlm.core import runtime
from microlm.core.errors import UserError
from microlm.core.records import Completion, FinishReason, Sampling
from microlm.engine.cache.slots import KVCache, choose_length
from microlm.engine.grammar import Grammars
from microlm.engine.output import TextStream
from microlm.engine.prompts import Prompt, check_window, encode_prompt
from microlm.engine.request import Delta, Request
from microlm.engine.runner import Runner
from microlm.engine.sampling import RandomStream, check_sampling, draw
from microlm.engine.scheduler import Scheduler
from microlm.model import directory as hf_directory
from microlm.model.transformer import Decoder
from microlm.text.tokenizer import Tokenizer

Step = list[tuple[Request, Delta]]


class Engine:
    """A loaded model with a fixed number of slots. Not for many threads: `EngineService` is.

    Weights that are in memory already come as `decoder`; the directory then gives the tokenizer only.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        decoder: Decoder | None = None,
        dtype: runtime.Dtype = "float32",
        max_seqs: int = 64,
        max_seq_len: int | None = None,
        max_prefill_tokens: int = 4096,
    ) -> None:
        if max_seqs < 1:
            raise UserError(f"max_seqs: {max_seqs} is below 1; the engine needs a slot")
        path = Path(directory)
        if decoder is None:
            device, precision = runtime.device(), runtime.torch_dtype(dtype)
            decoder = hf_directory.load(path, precision).to(device=device, dtype=precision).eval()
        else:
            device, precision = decoder.cos.device, decoder.compute_dtype
        self.directory = path
        self.config = decoder.config
        self.tokenizer = Tokenizer.load(path)
        if self.tokenizer.vocab_size > self.config.vocab_size:
            found, expected = self.tokenizer.vocab_size, self.config.vocab_size
            raise UserError(
                f"{path}: the tokenizer has {found} tokens, the model {expected}; they do not belong together"
            )
        self.max_seq_len = choose_length(self.config, max_seqs, max_seq_len, precision, device)
        cache = KVCache(self.config, max_seqs, self.max_seq_len, precision, device)
        self._runner = Runner(decoder, cache)
        self._scheduler = Scheduler(max_seqs, max_prefill_tokens)
        self._grammars = Grammars(self.tokenizer)
        self._ends = {self.tokenizer.eos_id, self.tokenizer.pad_id}
        if self.config.eos_token_id is not None:
            self._ends.add(self.config.eos_token_id)

    @property
    def cache_bytes(self) -> int:
        """Memory of the KV cache when every slot is full; it never grows beyond."""
        return self._runner.cache.nbytes

    @property
    def max_seqs(self) -> int:
        """How many requests run at once."""
        return self._scheduler.max_seqs

    @property
    def free_slots(self) -> int:
        """Slots that no request holds."""
        return self._scheduler.max_seqs - len(self._scheduler.running)

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._scheduler.running or self._scheduler.waiting)

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling],
        progress: Callable[[int], None] | None = None,
    ) -> list[Completion]:
        """Answer all prompts, in their order. `progress` hears how many more are finished after each step."""
        each = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        if len(each) != len(prompts):
            raise UserError(
                f"sampling: {len(each)} settings for {len(prompts)} prompts; give one, or one for each"
            )
        requests = self._prepare_all(prompts, each)
        # Neighbours of like length waste less padding; who shares a batch changes no answer.
        self._scheduler.waiting.extend(sorted(requests, key=lambda r: -len(r.prompt)))
        mine, open_count = set(map(id, requests)), len(requests)
        try:
            while open_count:
                done = sum(d.finish_reason is not None for r, d in self._pump() if id(r) in mine)
                open_count -= done
                if done and progress:
                    progress(done)
        finally:
            if open_count:
                for request in requests:
                    self.cancel(request)
        return [self.completion(r) for r in requests]

    def stream(self, prompt: Prompt, sampling: Sampling) -> Iterator[Delta]:
        """Answer one prompt piece by piece; closing the generator cancels it and frees its slot."""
        return self._follow(self.prepare(prompt, sampling))

    def completion(self, request: Request) -> Completion:
        """The whole answer of a finished request."""
        return request.completion(
            "".join(request.pieces) if request.text else self.tokenizer.decode(request.output)
        )

    def logprobs(self, ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """Natural-log probability of every id but the first, given those before it; nothing is generated."""
        window = self.config.max_position_embeddings
        for i, sequence in enumerate(ids):
            if not 1 <= len(sequence) <= window:
                raise UserError(
                    f"sequence {i}: {len(sequence)} tokens, expected 1 to {window}; cut it into pieces"
                )
            encode_prompt(self.tokenizer, sequence, self.config.vocab_size)
        results: list[list[float]] = [[] for _ in ids]
        with torch.inference_mode():
            for group in _groups([len(s) for s in ids], self._scheduler.max_prefill_tokens):
                for i, values in zip(group, self._runner.logprobs([ids[i] for i in group]), strict=True):
                    results[i] = values
        return results

    def prepare(self, prompt: Prompt, sampling: Sampling, *, live: bool = True) -> Request:
        """A checked request that is not queued yet; touches nothing shared, so any thread may call it."""
        return self._request(encode_prompt(self.tokenizer, prompt, self.config.vocab_size), sampling, live)

    def add(self, prompt: Prompt, sampling: Sampling) -> Request:
        """Queue a request; it joins at the next step with a free slot."""
        return self.enqueue(self.prepare(prompt, sampling))

    def enqueue(self, request: Request) -> Request:
        """Queue a prepared request."""
        self._scheduler.waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """End a request wherever it is; its slot is free at once. A finished one stays as it is."""
        if request.slot is not None:  # a finished one holds it still when its last step failed half-way
            self._release([request])
        elif request.finish_reason is None and request in self._scheduler.waiting:
            self._scheduler.waiting.remove(request)
        request.finish_reason = request.finish_reason or "cancelled"

    @torch.inference_mode()
    def step(self) -> Step:
        """One token for every running request; newcomers are prefilled and join. Returns who got what.

        A request that nobody reads along with (`live=False`) has one delta, its last.
        """
        before = list(self._scheduler.running)
        admitted = self._scheduler.admit()
        requests = before + admitted
        if not requests:
            return []
        parts: list[Tensor] = []
        if before:
            parts.append(self._runner.decode([r.output[-1] for r in before], [r.position for r in before]))
        if admitted:
            parts.append(self._runner.prefill([r.prompt for r in admitted], len(before)))
        tokens = self._choose(requests, self._runner.logits(torch.cat(parts)))
        return self._postprocess(requests, tokens)

    def _prepare_all(self, prompts: Sequence[Prompt], samplings: Sequence[Sampling]) -> list[Request]:
        requests = []
        for i, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
            try:
                requests.append(self.prepare(prompt, sampling, live=bool(sampling.stop)))
            except UserError as e:
                raise UserError(f"prompt {i + 1} of {len(prompts)}: {e}") from None
        return requests

    def _request(self, ids: list[int], sampling: Sampling, live: bool) -> Request:
        check_sampling(sampling)
        check_window(len(ids), self.max_seq_len)
        limit = min(sampling.max_tokens, self.max_seq_len - len(ids))
        return Request(
            prompt=ids,
            sampling=sampling,
            limit=limit,
            random=RandomStream(sampling.seed) if sampling.temperature > 0 else None,
            matcher=self._grammars.matcher(sampling.constraint) if sampling.constraint else None,
            text=TextStream(self.tokenizer, sampling.stop) if live else None,
        )

    def _follow(self, request: Request) -> Iterator[Delta]:
        self.enqueue(request)  # here, not before: a generator that is never started cannot clean up
        try:
            while True:
                while request.backlog:
                    delta = request.backlog.popleft()
                    yield delta
                    if delta.finish_reason:
                        return
                self._pump()
        finally:
            self.cancel(request)

    def _pump(self) -> Step:
        """A step whose deltas also wait at their requests, for streams that are read in turn."""
        deltas = self.step()
        for request, delta in deltas:
            request.backlog.append(delta)
        return deltas

    def _choose(self, requests: Sequence[Request], scores: Tensor) -> list[int]:
        """The next id of every request; -1 for one that failed, which then carries its error."""
        scores = scores[:, : self.tokenizer.vocab_size]  # a padded embedding has rows that mean nothing
        finite = torch.isfinite(scores.sum(-1))
        if not bool(finite.all()):
            for row in (~finite).nonzero().flatten().tolist():
                requests[row].error = "the model's scores are not finite numbers; its weights are damaged"
            scores = torch.where(finite[:, None], scores, 0.0)
        scores = self._constrain(requests, scores)
        ids = draw(scores, [r.sampling for r in requests], [r.random for r in requests])
        return [-1 if r.error else i for r, i in zip(requests, ids, strict=True)]

    def _constrain(self, requests: Sequence[Request], scores: Tensor) -> Tensor:
        """Scores with -inf where a request's grammar forbids the id."""
        constrained = [(i, r.matcher) for i, r in enumerate(requests) if r.matcher is not None]
        if not constrained:
            return scores
        rows = [i for i, _ in constrained]
        allowed = torch.ones(scores.shape, dtype=torch.bool)
        allowed[rows] = self._grammars.begin([m for _, m in constrained]).wait()
        return scores.masked_fill(~allowed.to(scores.device), float("-inf"))

    def _postprocess(self, requests: Sequence[Request], tokens: Sequence[int]) -> Step:
        deltas: Step = []
        finished: list[Request] = []
        for request, token in zip(requests, tokens, strict=True):
            reason, text = self._accept(request, token)
            if reason:
                request.finish_reason = reason
                finished.append(request)
                if request.text:
                    text += request.text.finish()
            if request.text:
                request.pieces.append(text)
            elif not reason:
                continue
            deltas.append((request, Delta(text, (token,) if token >= 0 else (), reason, request.error)))
        self._release(finished)
        return deltas

    def _accept(self, request: Request, token: int) -> tuple[FinishReason | None, str]:
        """Add a drawn token; why the request ends with it (if it does), and the text that became certain."""
        if token < 0:
            return "error", ""
        request.output.append(token)
        if token in self._ends and not request.sampling.ignore_eos:
            return "stop", ""
        text = request.text.push(token) if request.text else ""
        if request.text and request.text.stopped:
            return "stop", text
        if request.matcher is not None:
            if not request.matcher.consume(token):
                request.error = "the grammar allowed no token"
                return "error", text
            if request.matcher.stopped:
                return "stop", text
        return ("length" if len(request.output) >= request.limit else None), text

    def _release(self, finished: Sequence[Request]) -> None:
        for request in finished:
            if request.error and request.slot is not None:
                self._runner.cache.clear(request.slot)
        for request, source, target in self._scheduler.release(finished):
            self._runner.cache.move(source, target, request.position)


def _groups(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices of sequences of like length, in groups of at most `budget` padded tokens (one always fits)."""
    group: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if group and lengths[group[0]] * (len(group) + 1) > budget:
            yield group
            group = []
        group.append(i)
    if group:
        yield group
