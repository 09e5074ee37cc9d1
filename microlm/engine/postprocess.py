"""Scores → tokens, text, ends. Enters: the step's rows of scores; leaves: who got what.

Shapes: R rows, V rows of the model's head, of which the tokenizer may know fewer.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from microlm.core.records import FinishReason, TokenLogprob
from microlm.engine.grammar import Masks
from microlm.engine.request import Delta, Request
from microlm.engine.sampling.device import draw_rows, logprob_rows
from microlm.engine.sampling.draw import Scores, draw
from microlm.engine.sampling.logprobs import token_logprob
from microlm.text.tokenizer import Tokenizer

LOG = logging.getLogger("microlm.engine")
Step = list[tuple[Request, Delta]]
Allowed = NDArray[np.bool_]

NOT_FINITE = "the model's scores are not finite numbers; its weights are damaged"
_INSIDE = {
    "json_schema": "JSON",
    "json_object": "JSON",
    "regex": "pattern",
    "choice": "choice",
    "grammar": "grammar",
    "copy": "copied text",
}


class Scored(NamedTuple):
    """Rows first … first+len(draft) of a step's scores: row j gives the token after draft[:j].

    Tokens are drawn in turn; as long as the drawn one equals the draft's, the next row counts; the rest is
    dropped. So a draft changes neither the ids, nor the random stream, nor the grammar.
    """

    request: Request
    first: int
    draft: tuple[int, ...] = ()


@dataclass
class _Gain:
    """What a step has added to a request so far."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    reason: FinishReason | None = None


class Postprocess:
    """Draws, decodes and ends requests; the engine then takes back what they hold."""

    def __init__(self, tokenizer: Tokenizer, ends: Collection[int]) -> None:
        self._size = tokenizer.vocab_size
        self._ends = frozenset(ends)

    def apply(self, rows: Sequence[Scored], logits: Tensor, masks: Masks | None = None) -> Step:
        """Draw for every request by `logits` [R,V] (float32), which stay as they are.

        `masks` are of the first rows of the requests that have a matcher, in the order of `rows`. A request
        that nobody reads along with (its `text` is None) has one delta, its last.
        """
        allowed = self._first_masks(rows, masks)
        if logits.device.type != "cpu":
            gains, rows, logits = self._on_device(rows, logits, allowed)
        else:
            gains = {}
        scores = logits.numpy()
        for row in rows:
            gain = gains[row.request] = _Gain()
            try:
                self._draw_all(row, scores, allowed.get(row.request), gain)
            except Exception as e:  # what one request asks for must not end the others of its step
                _fail(row.request, gain, e)
        deltas = [(request, self._delta(request, gain)) for request, gain in gains.items()]
        return [(r, d) for r, d in deltas if r.text is not None or d.finish_reason]

    def _first_masks(self, rows: Sequence[Scored], masks: Masks | None) -> dict[Request, Allowed]:
        constrained = [row.request for row in rows if row.request.matcher is not None]
        if not constrained:
            return {}
        assert masks is not None
        return dict(zip(constrained, masks.wait().numpy(), strict=True))

    def _draw_all(self, row: Scored, scores: Scores, allowed: Allowed | None, gain: _Gain) -> None:
        """Tokens in turn, until one differs from the draft or ends the request."""
        request = row.request
        for place in range(len(row.draft) + 1):
            if place and request.matcher is not None:
                allowed = request.matcher.allowed()
            token = self._draw(request, scores[row.first + place], allowed)
            self._accept(request, gain, token)
            if gain.reason or place == len(row.draft) or token != row.draft[place]:
                break

    def _draw(self, request: Request, scores: Scores, allowed: Allowed | None) -> int:
        """The next id by `scores` [V]; -1 where there is none, which the request's error explains."""
        own = scores[: self._size]  # a padded head has rows that mean nothing
        if not np.isfinite(own).all():
            request.error = NOT_FINITE
            return -1
        if allowed is not None:
            if not allowed.any():
                request.error = _no_token(request)
                return -1
            own = np.where(allowed, own, np.float32(-np.inf))
        if request.penalties is not None:
            own = request.penalties.apply(own)
        token = draw(own, request.sampling, request.random)
        if request.sampling.logprobs is not None:
            request.logprobs.append(token_logprob(scores, token, request.sampling.logprobs, self._size))
        return token

    def _accept(self, request: Request, gain: _Gain, token: int) -> None:
        """Add a drawn token: to the answer, its text, its grammar; and see whether it ends the request."""
        if token < 0:
            gain.reason = "error"
            return
        request.output.append(token)
        gain.tokens.append(token)
        if request.penalties is not None:
            request.penalties.add(token)
        if request.sampling.logprobs is not None:
            gain.logprobs.append(request.logprobs[-1])
        if token in self._ends and not request.sampling.ignore_eos:
            gain.reason = "stop"
            return
        if request.text is not None:
            gain.text += request.text.push(token)
            if request.text.stopped:
                gain.reason = "stop"
                answer = "".join(request.pieces) + gain.text
                if request.start is not None and not request.start.accepts(answer):
                    request.error = f"the answer ended inside the {_place(request)}: at a stop string"
                return
        gain.reason = self._end(request, token)

    def _end(self, request: Request, token: int) -> FinishReason | None:
        """Why a request ends with a token that is neither its EOS nor the end of a stop string."""
        matcher = request.matcher
        if matcher is not None:
            if not matcher.consume(token):
                request.error = _no_token(request)
                return "error"
            if matcher.stopped:
                return "stop"
        if len(request.output) < request.limit:
            return None
        if matcher is not None and not matcher.accepting:
            request.error = _cut_short(request)
        return "length"

    def _delta(self, request: Request, gain: _Gain) -> Delta:
        if gain.reason:
            request.finish_reason, request.penalties = gain.reason, None
            gain.text += request.text.finish() if request.text is not None else ""
        if request.text is not None:
            request.pieces.append(gain.text)
        return Delta(gain.text, tuple(gain.tokens), gain.reason, request.error, tuple(gain.logprobs))

    def _on_device(
        self, rows: Sequence[Scored], logits: Tensor, allowed: dict[Request, Allowed]
    ) -> tuple[dict[Request, _Gain], list[Scored], Tensor]:
        """Draw on the GPU where neither penalties nor drafts are; the rest leaves with its scores."""
        plain = [row for row in rows if not row.draft and row.request.penalties is None]
        rest = [row for row in rows if row.draft or row.request.penalties is not None]
        gains = {row.request: _Gain() for row in rows}
        if plain:
            self._draw_plain(plain, logits[[row.first for row in plain]], allowed, gains)
        wanted: list[int] = []
        moved: list[Scored] = []
        for row in rest:
            moved.append(row._replace(first=len(wanted)))
            wanted += range(row.first, row.first + len(row.draft) + 1)
        return gains, moved, logits[wanted].cpu()

    def _draw_plain(
        self,
        rows: Sequence[Scored],
        scores: Tensor,
        allowed: dict[Request, Allowed],
        gains: dict[Request, _Gain],
    ) -> None:
        """One token for each row of `scores` [n,V], on its device."""
        requests = [row.request for row in rows]
        own = scores[:, : self._size]
        finite = torch.isfinite(own.sum(-1))
        own = torch.where(finite[:, None], own, 0.0)
        bound = [i for i, request in enumerate(requests) if request in allowed]
        if bound:
            masks = torch.from_numpy(np.stack([allowed[requests[i]] for i in bound])).to(scores.device)
            own[bound] = own[bound].masked_fill(~masks, float("-inf"))
        tokens = draw_rows(own, [r.sampling for r in requests], [r.random for r in requests])
        for i, is_finite in enumerate(finite.tolist()):
            if not is_finite:
                requests[i].error, tokens[i] = NOT_FINITE, -1
        for i in bound:
            if tokens[i] >= 0 and not allowed[requests[i]].any():
                requests[i].error, tokens[i] = _no_token(requests[i]), -1
        self._note_logprobs(requests, tokens, scores)
        for request, token in zip(requests, tokens, strict=True):
            try:
                self._accept(request, gains[request], token)
            except Exception as e:
                _fail(request, gains[request], e)

    def _note_logprobs(self, requests: Sequence[Request], tokens: Sequence[int], scores: Tensor) -> None:
        asked = [i for i, r in enumerate(requests) if r.sampling.logprobs is not None and tokens[i] >= 0]
        if asked:
            counts = [requests[i].sampling.logprobs or 0 for i in asked]
            found = logprob_rows(scores[asked], [tokens[i] for i in asked], counts, self._size)
            for i, known in zip(asked, found, strict=True):
                requests[i].logprobs.append(known)


def _fail(request: Request, gain: _Gain, fault: Exception) -> None:
    """End one request with what went wrong in drawing for it."""
    LOG.error("drawing failed (%s)", type(fault).__name__)
    request.error, gain.reason = f"drawing failed ({type(fault).__name__})", "error"


def _no_token(request: Request) -> str:
    """The sentence for an answer that its grammar lets go nowhere."""
    reason = request.matcher.error if request.matcher is not None else ""
    return reason or "the grammar allowed no token"


def _cut_short(request: Request) -> str:
    """The sentence for an answer that its token limit ended before its grammar did."""
    place = _place(request)
    if request.limit < request.sampling.max_tokens:
        return f"the answer ended inside the {place}: the window is full; shorten the prompt"
    return f"the answer ended inside the {place}: max_tokens reached; raise it from {request.limit}"


def _place(request: Request) -> str:
    """What an answer that was cut ended inside of."""
    assert request.sampling.constraint is not None
    return _INSIDE[request.sampling.constraint.kind]
