"""What of a text is compared. Enters: texts. Leaves: shingles, exact Jaccards, MinHash signatures, band keys.

A token is one character of East Asia or a run of other letters and digits, small and narrow; a shingle is
five tokens in a row. In a text with fewer words than characters of East Asia each letter is a token too. So
Chinese, with the English in it, is compared by 5-grams of characters, English by 5-grams of words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from microlm.text.near import kernels
from microlm.text.near.kernels import BINS, Hashes, Signatures
from microlm.text.rules.profile import code_points

SHINGLE = 5
RECALL = 0.97
"""Of pairs that are just alike enough, the share that must have a band in common."""
_TOGETHER = 32  # pairs whose texts are held at the same time


def grams(text: str, size: int) -> Hashes:
    """A hash of each `size` tokens in a row, in the text's order; none if the text has fewer tokens."""
    codes = code_points(text)
    out = np.empty(len(codes), dtype=np.uint64)
    count = kernels.tokens(codes, kernels.fold_table(), out)
    return out[: kernels.join(out, count, size)]


def shingles(text: str) -> Hashes:
    """The set of the text's shingles, sorted; a text of one to four tokens is one shingle."""
    codes = code_points(text)
    out = np.empty(len(codes), dtype=np.uint64)
    found = np.sort(out[: kernels.shingle(codes, kernels.fold_table(), SHINGLE, out)])
    return found[np.diff(found, prepend=~found[:1]) != 0]  # four times as quick as np.unique


def jaccard(a: Hashes, b: Hashes) -> float:
    """What two sets share, of all that is in either; 0 for empty ones."""
    shared = kernels.overlap(a, b)
    return shared / max(1, len(a) + len(b) - shared)


def jaccards(text_of: Callable[[Sequence[int]], list[str]], pairs: NDArray[np.uint32]) -> NDArray[np.float64]:
    """The exact Jaccard of each pair [P, 2] of documents, whose texts are fetched a few at a time."""
    found = np.empty(len(pairs), dtype=np.float64)
    for start in range(0, len(pairs), _TOGETHER):
        some = pairs[start : start + _TOGETHER]
        documents, at = np.unique(some, return_inverse=True)
        sets = [shingles(text) for text in text_of(documents.tolist())]
        ends = at.reshape(-1, 2)
        found[start : start + len(some)] = [jaccard(sets[i], sets[j]) for i, j in ends]
    return found


def rows_for(threshold: float) -> int:
    """The values in a band: as many as still let RECALL of the pairs at the threshold share one of the bands.

    For 0.8 these are 18 bands of 7: 0.985 of the pairs at 0.8, 0.999 at 0.85, 0.13 at 0.5.
    """
    fit = (r for r in range(16, 1, -1) if 1 - (1 - threshold**r) ** (BINS // r) >= RECALL)
    return next(fit, 1)


def sign(texts: Sequence[str], threshold: float = 0.8) -> tuple[Signatures, Hashes]:
    """Signatures [N, 128], for an estimate of the Jaccard, and band keys [N, B], 0 for a text without tokens.

    Texts that share a band key are candidates; the number of bands follows from the threshold.
    """
    coded = [text.encode("utf-8", "surrogatepass") for text in texts]
    sizes = np.array([len(text) for text in coded], dtype=np.int64)
    whole = np.frombuffer(bytearray().join(coded), dtype=np.uint8)
    return sign_bytes(whole, np.cumsum(sizes) - sizes, sizes, threshold)


def sign_bytes(
    text: NDArray[np.uint8], starts: NDArray[np.int64], sizes: NDArray[np.int64], threshold: float = 0.8
) -> tuple[Signatures, Hashes]:
    """`sign` of the texts text[start : start + size], which are in UTF-8."""
    codes, ends = kernels.decode(text, starts, sizes)
    return kernels.sign(codes, ends, kernels.fold_table(), SHINGLE, rows_for(threshold))


def estimate(a: Signatures, b: Signatures) -> float:
    """The Jaccard of two texts from their signatures [128]; a byte in 256 agrees by chance."""
    equal = float(np.mean(a == b))
    return max(0.0, (equal - 1 / 256) / (1 - 1 / 256))
