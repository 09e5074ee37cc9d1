"""Tokens of a step → scores: the native kernel, torch, adapters, CUDA graphs."""
