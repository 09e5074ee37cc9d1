"""Near duplicates: texts as sets of runs of tokens, MinHash signatures, an index on disk."""
