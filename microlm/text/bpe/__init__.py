"""Byte-level BPE of our own: where pieces end, training, encoding. Everything is equal to `tokenizers`."""
