"""Real conversations as token sets, and the batches that people make of them, for the benchmark of SFT."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from microlm.core.manifest import open_artifact
from microlm.core.records import Conversation
from microlm.text import sources
from microlm.text.chat import encode_chats
from microlm.text.shards import TokenSet
from microlm.text.tokenizer import Tokenizer
from microlm.train.batches import IGNORE, Batch

FILES = ("sft_single.jsonl.zst", "sft_chat.jsonl.zst", "sft_toolcall.jsonl.zst")
TOKENIZER = "builtin:zh-6400"
CHUNK = 512
MEGA = 50  # batches that are sorted together, as the Trainer of transformers does it


class Padded(NamedTuple):
    """Samples side by side, each [R, T] int64, as long as the longest; labels are shifted as ours are."""

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor

    @property
    def useful(self) -> int:
        """Positions that a packed row would hold, too: all but padding and the sample's last token."""
        return int(self.attention_mask.sum())


def read_conversations(folder: Path, limit: int | None, context: int) -> TokenSet:
    """The conversations of all files that fit into a row; `limit`: of each file."""
    tokenizer = Tokenizer.load(open_artifact(TOKENIZER).path)
    ids: list[NDArray[np.uint16]] = []
    masks: list[NDArray[np.uint8]] = []
    for name in FILES:
        records = sources.read(sources.parse(f"jsonl:{folder / name}"), sources.Tally(), strict=False)
        chats = [record for record in islice(records, limit) if isinstance(record, Conversation)]
        for start in range(0, len(chats), CHUNK):
            for tokens, mask in encode_chats(tokenizer, chats[start : start + CHUNK]):
                if len(tokens) <= context + 1:
                    ids.append(np.array(tokens, np.uint16))
                    masks.append(np.array(mask, np.uint8))
    ends = np.cumsum([len(tokens) for tokens in ids])
    return TokenSet("conversations", np.concatenate(ids), np.concatenate(masks), ends)


def padded(tokens: TokenSet, numbers: Sequence[int]) -> Padded:
    """Some samples, padded to the longest of them."""
    spans = [(int(tokens.ends[n - 1]) if n else 0, int(tokens.ends[n])) for n in numbers]
    shape = (len(spans), max(end - start for start, end in spans) - 1)
    ids, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    labels = np.full(shape, IGNORE, np.int64)
    assert tokens.loss is not None
    for row, (start, end) in enumerate(spans):
        size = end - start - 1
        ids[row, :size] = tokens.tokens[start : end - 1]
        mask[row, :size] = 1
        learnt = tokens.loss[start + 1 : end] == 1
        labels[row, :size][learnt] = tokens.tokens[start + 1 : end][learnt]
    return Padded(*(torch.from_numpy(column) for column in (ids, labels, mask)))


def padded_batches(
    tokens: TokenSet, rows: int, micro_rows: int, seed: int, grouped: bool
) -> Iterator[list[Padded]]:
    """Endless steps of `rows` samples, `micro_rows` at a time, in random order; `grouped`: alike in length.

    Groups are those of transformers' `group_by_length`: sorted in stretches of fifty batches.
    """
    rng = np.random.default_rng(seed)
    sizes = np.diff(tokens.ends, prepend=0)
    while True:
        order = rng.permutation(len(sizes))
        if grouped:
            stretches = np.array_split(order, max(1, len(order) // (MEGA * rows)))
            order = np.concatenate([_grouped(some, sizes, rows, rng) for some in stretches])
        for start in range(0, len(order) - rows + 1, rows):
            step = order[start : start + rows].tolist()
            yield [padded(tokens, step[i : i + micro_rows]) for i in range(0, rows, micro_rows)]


def _grouped(
    numbers: NDArray[np.int64], sizes: NDArray[np.int64], rows: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Samples sorted by length, in batches whose order is random: no round shall meet the long ones alone."""
    ordered = numbers[np.argsort(-sizes[numbers], kind="stable")]
    whole = len(ordered) // rows * rows
    batches = rng.permutation(ordered[:whole].reshape(-1, rows))
    return np.concatenate((batches.ravel(), ordered[whole:]))


def numbers_of(batch: Batch) -> list[int]:
    """The samples that lie in a packed batch."""
    return [number for row in batch.samples for _, number in row]
