"""The data engine: records refined block by block in several processes, deduplicated on disk, written by digest."""
