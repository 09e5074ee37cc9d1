"""Learning merges: counting passes over texts, exact byte-pair encoding of the counts, the choice of tokens."""
