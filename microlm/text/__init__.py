"""Strings ↔ ids: readers, cleaning, dedup, audit, tokenizer, chat template with its loss mask, token shards."""
