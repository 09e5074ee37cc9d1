"""The token step as compiled loops (numba), for a CPU; and matrices kept as int8 or int4 codes."""
