"""The data engine: records refined block by block, deduplicated on disk, written by digest."""
