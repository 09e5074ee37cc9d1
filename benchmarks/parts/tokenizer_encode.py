"""Encode texts with our compiled path. Enters: DIR TEXTS.json. Leaves: one JSON object on stdout."""

from __future__ import annotations

import hashlib
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

from microlm.text.tokenizer import Tokenizer


def main() -> None:
    """Load, warm up, measure; the same protocol as peers/tokenizer_encode.py."""
    folder, texts_file = map(Path, sys.argv[1:])
    texts = json.loads(texts_file.read_text(encoding="utf-8"))
    tokenizer = Tokenizer.load(folder)
    tokenizer.start()
    tokenizer.encode_arrays(texts[:100])
    wall, cpu = time.perf_counter(), time.process_time()
    ids, _ = tokenizer.encode_arrays(texts)
    found = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    found |= worst(tokenizer)
    digest = hashlib.sha256(ids.astype("<u2").tobytes()).hexdigest()
    print(json.dumps({**found, "tokens": len(ids), "digest": digest, "backend": tokenizer.backend}))


def worst(tokenizer: Tokenizer) -> dict[str, float]:
    """CPU seconds of 1 MB of one character, and the time of 2 MB over it: the worst of several kinds."""
    draw = random.Random(0).choices
    kinds: dict[str, Callable[[int], str]] = {
        "letter": lambda n: "a" * n,
        "spaces": lambda n: " " * n,
        "^": lambda n: "^" * n,
        "Han": lambda n: "月" * (n // 3),
        "random Han": lambda n: "".join(map(chr, draw(range(0x4E00, 0xA000), k=n // 3))),
    }
    seconds = {
        n: {k: cpu_seconds(tokenizer, make(n)) for k, make in kinds.items()} for n in (1 << 20, 1 << 21)
    }
    ratios = [seconds[1 << 21][kind] / seconds[1 << 20][kind] for kind in kinds]
    return {"worst_seconds": max(seconds[1 << 20].values()), "worst_ratio": max(ratios)}


def cpu_seconds(tokenizer: Tokenizer, text: str) -> float:
    """Of one text; the best of five."""
    found = []
    for _ in range(5):
        started = time.process_time()
        tokenizer.encode_arrays([text])
        found.append(time.process_time() - started)
    return min(found)


if __name__ == "__main__":
    main()
