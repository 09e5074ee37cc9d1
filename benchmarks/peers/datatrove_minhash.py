"""datatrove's MinHash pipeline, four stages, over a folder of JSONL. Prints {"seconds", "versions"}.

The settings are its defaults: 5-grams of words by the tokenizer that it assigns to Chinese (spaCy with
jieba), 14 buckets of 8 hashes, xxhash of 64 bits; --characters takes 5-grams of characters, as we do.
Intermediate files and the output are not packed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from importlib import metadata
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers.jsonl import JsonlWriter
from datatrove.utils.logging import logger
from datatrove.utils.typeshelper import Languages
from datatrove.utils.word_tokenizers import WordTokenizer


class Characters(WordTokenizer):
    """Every character is a word."""

    def word_tokenize(self, text: str) -> list[str]:
        """The characters, without spaces."""
        return [c for c in text if not c.isspace()]

    def sent_tokenize(self, text: str) -> list[str]:
        """Not used by MinHash."""
        raise NotImplementedError

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """Not used by MinHash."""
        raise NotImplementedError


def main() -> None:
    """Run the four stages, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="folder of .jsonl files")
    parser.add_argument("work", type=Path, help="folder for signatures, logs and the output, in out/")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--characters", action="store_true", help="5-grams of characters, not of words")
    options = parser.parse_args()
    logger.remove()
    logger.add(sys.stderr, level="ERROR")
    started = time.perf_counter()
    for number, (pipeline, tasks) in enumerate(stages(options), 1):
        logs = str(options.work / f"logs{number}")
        LocalPipelineExecutor(pipeline, tasks=tasks, workers=options.workers, logging_dir=logs).run()
    versions = {name: metadata.version(name) for name in ("datatrove", "spacy", "jieba", "numpy")}
    print(json.dumps({"seconds": time.perf_counter() - started, "versions": versions}))


def stages(options: argparse.Namespace) -> list[tuple[list[PipelineStep], int]]:
    """(pipeline, tasks) of signatures, buckets, clusters and the filter."""
    config = MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8)
    language = Characters() if options.characters else Languages.mandarin_chinese
    signatures, buckets, removed, out = (
        str(options.work / n) for n in ("signatures", "buckets", "remove", "out")
    )
    files = len(list(options.source.glob("*.jsonl")))

    def reader() -> JsonlReader:
        return JsonlReader(str(options.source), glob_pattern="*.jsonl")

    return [
        ([reader(), MinhashDedupSignature(signatures, config=config, language=language)], files),
        ([MinhashDedupBuckets(signatures, buckets, config=config)], config.num_buckets),
        ([MinhashDedupCluster(buckets, removed, config=config)], 1),
        ([reader(), MinhashDedupFilter(removed), JsonlWriter(out, compression=None)], files),
    ]


if __name__ == "__main__":
    main()
