"""Instruction data made from templates and seeds, or answered in bulk by any OpenAI-compatible endpoint."""
