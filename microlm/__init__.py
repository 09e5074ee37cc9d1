"""MicroLM: from raw text to a verified language-model service."""

__version__ = "0.1.0"
