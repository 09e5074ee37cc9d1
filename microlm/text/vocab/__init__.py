"""A tokenizer as a whole: the training stage, comparison, export."""
