"""Encode texts with our compiled path. Enters: DIR TEXTS.json. Leaves: one JSON object on stdout."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path

from microlm.text.tokenizer import Tokenizer


def main() -> None:
    """Load, warm up, measure; the same protocol as peers/tokenizer_encode.py."""
    folder, texts_file = map(Path, sys.argv[1:])
    texts = json.loads(texts_file.read_text(encoding="utf-8"))
    tokenizer = Tokenizer.load(folder)
    tokenizer.encode_arrays(texts[:100])
    wall, cpu = time.perf_counter(), time.process_time()
    ids, _ = tokenizer.encode_arrays(texts)
    found = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    digest = hashlib.sha256(ids.astype("<u2").tobytes()).hexdigest()
    print(json.dumps({**found, "tokens": len(ids), "digest": digest, "backend": tokenizer.backend}))


if __name__ == "__main__":
    main()
