"""Whole sequences at once, without a cache: log-probabilities of given tokens, pooled embeddings.

Shapes: B sequences, T padded length, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from microlm.model.transformer import Decoder, causal_attend

SCORES = 2**24  # logits held at once (64 MiB)
Pooling = Literal["mean", "last"]
"""mean: of all tokens' hidden states; last: the last token's, which has seen all others."""


def logprobs(decoder: Decoder, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
    """Natural-log probabilities of every id but the first, given those before it, of one padded group."""
    hidden, _ = _hidden(decoder, sequences)
    targets = torch.tensor([t for s in sequences for t in s[1:]], device=hidden.device)
    flat = torch.cat([hidden[i, : len(s) - 1] for i, s in enumerate(sequences)])
    rows = max(1, SCORES // decoder.config.vocab_size)
    values: list[float] = []
    for start in range(0, len(targets), rows):
        scores = decoder.logits(flat[start : start + rows])
        values += chosen(scores, targets[start : start + rows])
    taken = iter(values)
    return [[next(taken) for _ in s[1:]] for s in sequences]


def chosen(scores: Tensor, targets: Tensor) -> list[float]:
    """Natural-log probabilities of `targets` [n] under `scores` [n,V]."""
    return (scores.gather(1, targets[:, None]).squeeze(1) - scores.logsumexp(-1)).tolist()


def embeddings(
    decoder: Decoder, sequences: Sequence[Sequence[int]], pooling: Pooling, normalize: bool
) -> Tensor:
    """One vector for each sequence, [B,D] float32; `normalize` gives them length 1."""
    hidden, last = _hidden(decoder, sequences)
    rows = torch.arange(len(sequences), device=hidden.device)
    if pooling == "last":
        pooled = hidden[rows, last].float()
    else:
        held = torch.arange(hidden.shape[1], device=hidden.device) <= last[:, None]
        pooled = (hidden.float() * held[..., None]).sum(1) / (last + 1)[:, None]
    return F.normalize(pooled, dim=-1) if normalize else pooled


def groups(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices of sequences of like length, in groups of at most `budget` padded tokens (one always fits)."""
    group: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if group and lengths[group[0]] * (len(group) + 1) > budget:
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def _hidden(decoder: Decoder, sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Hidden states [B,T,D] of sequences padded on the right, and the place [B] of each last token."""
    device, longest = decoder.cos.device, max(map(len, sequences))
    ids = torch.tensor([[*s, *[0] * (longest - len(s))] for s in sequences], device=device)
    last = torch.tensor([len(s) - 1 for s in sequences], device=device)
    return decoder.hidden(ids, torch.arange(longest, device=device), causal_attend), last
