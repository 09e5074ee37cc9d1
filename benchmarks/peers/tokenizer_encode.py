"""Encode texts with another library. Prints one JSON object: seconds, CPU seconds, a digest of the ids.

Each library at its best documented setting for texts in memory, on one thread; ids end in one uint16 array.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

for name in ("RAYON_NUM_THREADS", "TOKENIZERS_NUM_THREADS"):
    os.environ[name] = "1"

import numpy as np  # noqa: E402


def main() -> None:
    """Load, warm up, measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", choices=sorted(LIBRARIES))
    parser.add_argument("tokenizer", type=Path, help="a tokenizer.json")
    parser.add_argument("texts", type=Path, help="a JSON list of strings")
    options = parser.parse_args()
    texts = json.loads(options.texts.read_text(encoding="utf-8"))
    encode = LIBRARIES[options.library](options.tokenizer)
    encode(texts[:100])
    wall, cpu = time.perf_counter(), time.process_time()
    ids = encode(texts)
    found = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    digest = hashlib.sha256(ids.astype("<u2").tobytes()).hexdigest()
    versions = {options.library: importlib.metadata.version(options.library)}
    print(json.dumps({**found, "tokens": len(ids), "digest": digest, "versions": versions}))


Encode = Callable[[list[str]], "np.ndarray"]


def with_tokenizers(path: Path) -> Encode:
    """Hugging Face tokenizers: `encode_batch_fast`, which leaves offsets out."""
    from tokenizers import Tokenizer

    inner = Tokenizer.from_file(str(path))
    return lambda texts: np.concatenate(
        [np.asarray(e.ids, dtype=np.uint16) for e in inner.encode_batch_fast(texts, add_special_tokens=False)]
    )


def with_tiktoken(path: Path) -> Encode:
    """tiktoken: `encode_to_numpy`, which makes no Python list, text by text."""
    import tiktoken

    data = json.loads(path.read_text(encoding="utf-8"))
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    byte_of = {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}
    special = {token["content"]: token["id"] for token in data["added_tokens"]}
    ranks = {bytes(byte_of[c] for c in t): i for t, i in data["model"]["vocab"].items() if t not in special}
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
    inner = tiktoken.Encoding("ours", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    return lambda texts: np.concatenate(
        [inner.encode_to_numpy(text, disallowed_special=()).astype(np.uint16) for text in texts]
    )


def with_gigatoken(path: Path) -> Encode:
    """gigatoken: `encode_batch` of its own API, on this thread."""
    import awkward
    import gigatoken

    inner = gigatoken.Tokenizer(str(path))
    return lambda texts: awkward.to_numpy(
        awkward.flatten(inner._backend.encode_batch(texts, parallel=False), axis=1)
    ).astype(np.uint16)


LIBRARIES: dict[str, Callable[[Path], Encode]] = {
    "tokenizers": with_tokenizers,
    "tiktoken": with_tiktoken,
    "gigatoken": with_gigatoken,
}

if __name__ == "__main__":
    main()
