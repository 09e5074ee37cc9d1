"""Strings ↔ ids: readers, cleaning, dedup, audit, tokenizer, chat template with loss mask, token shards."""
