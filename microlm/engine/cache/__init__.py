"""The paged KV cache: who holds which page, and the tensors."""
