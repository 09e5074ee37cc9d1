"""Weights → other weights: merge an adapter, write the HF directory that leaves the house, prove it."""
