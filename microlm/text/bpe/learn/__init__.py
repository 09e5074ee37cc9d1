"""Learning merges: counting passes over texts, exact byte-pair encoding, the choice of tokens."""
