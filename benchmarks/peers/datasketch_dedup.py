"""A plain datasketch script: MinHash of 128 permutations, LSH at 0.8, 5-grams of characters, first one stays.

Reads a JSON list of texts; prints {"seconds", "removed", "versions"}, reading not timed. xxhash, which the
library's documentation advises, takes the place of sha1; permutations are shared by `MinHash.generator`.
"""

from __future__ import annotations

import json
import sys
import time
from importlib import metadata
from pathlib import Path

import xxhash
from datasketch import MinHash, MinHashLSH


def main() -> None:
    """Deduplicate the texts of the file that the command line names."""
    texts = json.loads(Path(sys.argv[1]).read_bytes())
    started = time.perf_counter()
    search = MinHashLSH(threshold=0.8, num_perm=128)
    grams = ({t[i : i + 5].encode() for i in range(max(1, len(t) - 4))} for t in texts)
    removed = []
    sketches = MinHash.generator(grams, num_perm=128, hashfunc=xxhash.xxh32_intdigest)
    for number, sketch in enumerate(sketches):
        if search.query(sketch):
            removed.append(number)
        else:
            search.insert(number, sketch)
    seconds = time.perf_counter() - started
    versions = {name: metadata.version(name) for name in ("datasketch", "xxhash", "numpy")}
    print(json.dumps({"seconds": seconds, "removed": removed, "versions": versions}))


if __name__ == "__main__":
    main()
