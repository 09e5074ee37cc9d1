"""ids → hidden states through the decoder, with the cache behind `attend`. torch eager, no gradients.

Shapes: B prompts, T padded length, n running rows, L used length, H heads, K key-value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from microlm.engine.cache.slots import KVCache
from microlm.model.transformer import Attend, Decoder, causal_attend, masked_attention

_SCORES = 2**24  # logits held at once when whole sequences are scored (64 MiB)


class Runner:
    """Prefill and decode steps over one decoder and one cache."""

    def __init__(self, decoder: Decoder, cache: KVCache) -> None:
        self.decoder = decoder
        self.cache = cache
        self.device = cache.k.device

    def prefill(self, prompts: Sequence[Sequence[int]], first: int) -> Tensor:
        """Fill slots first.. with prompts; their last hidden states [B,D]. Padding lies behind, unseen."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.cache.write(layer, first, k, v)
            return masked_attention(q, k, v, None)

        hidden, last = self._whole(prompts, attend)
        return hidden[torch.arange(len(prompts), device=self.device), last]

    def decode(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Hidden states [n,D] of one new token for each of the slots 0..n-1, over the longest used length."""
        n, used = len(tokens), max(positions) + 1
        ids = torch.tensor(tokens, device=self.device)[:, None]
        at = torch.tensor(positions, device=self.device)
        places = self.cache.places_of(at)
        mask = None if min(positions) + 1 == used else self._mask(at, used)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.cache.append(layer, places, k, v)
            keys, values = self.cache.view(layer, n, used)
            # The heads that share a key-value head stand as its query rows: nothing is repeated.
            grouped = q.reshape(n, k.shape[1], -1, q.shape[-1])
            return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask).reshape(q.shape)

        return self.decoder.hidden(ids, at[:, None], attend)[:, 0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores [n,V], float32."""
        return self.decoder.logits(hidden)

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Teacher-forced natural-log probabilities of every id but the first, of one padded group."""
        hidden, _ = self._whole(sequences, causal_attend)
        targets = torch.tensor([t for s in sequences for t in s[1:]], device=self.device)
        flat = torch.cat([hidden[i, : len(s) - 1] for i, s in enumerate(sequences)])
        rows = max(1, _SCORES // self.decoder.config.vocab_size)
        values: list[float] = []
        for start in range(0, len(targets), rows):
            scores = self.logits(flat[start : start + rows])
            wanted = targets[start : start + rows, None]
            values += (scores.gather(1, wanted).squeeze(1) - scores.logsumexp(-1)).tolist()
        taken = iter(values)
        return [[next(taken) for _ in s[1:]] for s in sequences]

    def _whole(self, sequences: Sequence[Sequence[int]], attend: Attend) -> tuple[Tensor, Tensor]:
        """Hidden states [B,T,D] of sequences padded on the right, and the place [B] of each last token."""
        longest = max(map(len, sequences))
        ids = torch.tensor([[*s, *[0] * (longest - len(s))] for s in sequences], device=self.device)
        last = torch.tensor([len(s) - 1 for s in sequences], device=self.device)
        return self.decoder.hidden(ids, torch.arange(longest, device=self.device), attend), last

    def _mask(self, positions: Tensor, used: int) -> Tensor:
        """0 where row i may look, -inf beyond its own position, [n,1,1,L]."""
        beyond = torch.arange(used, device=self.device) > positions[:, None]
        mask = torch.zeros(beyond.shape, dtype=self.cache.k.dtype, device=self.device)
        return mask.masked_fill_(beyond, float("-inf"))[:, None, None]
