"""The engine's two stages of deduplication alone, over cleaned texts, in one process.

Reads a JSON list of texts; prints {"seconds", "removed"} of the second of two runs, reading not timed; the
first loads the kernels. What is timed ends with the numbers of the texts that go, as the peer's script does.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

from microlm.text.corpus import duplicates
from microlm.text.corpus.pool import Pool
from microlm.text.corpus.store import KEPT, BlockWriter, Reader, Store
from microlm.text.dedup import digest

BLOCK = 4000
THRESHOLD, MEMORY_MB = 0.8, 256


def main() -> None:
    """Deduplicate the texts of the file that the command line names."""
    texts = json.loads(Path(sys.argv[1]).read_bytes())
    with tempfile.TemporaryDirectory() as folder:
        removed_from(texts, Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        removed = removed_from(texts, Path(folder))
        seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "removed": removed}))


def removed_from(texts: list[str], folder: Path) -> list[int]:
    """The numbers of the texts that exact and near duplicates are."""
    blocks = range(0, len(texts), BLOCK)
    for block, start in enumerate(blocks):
        writer = BlockWriter(folder, block)
        for number, text in enumerate(texts[start : start + BLOCK], start):
            meta = b'["%d",null]' % number
            writer.put((0, 0), digest(text), text.encode("utf-8"), meta, len(text))
        writer.finish({})
    store = Store(folder, len(blocks))
    for duplicate in (duplicates.exact(store), duplicates.near(Pool(None, 1), store, THRESHOLD, MEMORY_MB)):
        deque(duplicate, maxlen=0)
    found = []
    with Reader(folder) as reader:
        for block in range(store.count):
            for entry in store.entries(block)[store.state(block) != KEPT]:
                found.append(int(json.loads(reader.both(block, entry)[1])[0]))
    return sorted(found)


if __name__ == "__main__":
    main()
