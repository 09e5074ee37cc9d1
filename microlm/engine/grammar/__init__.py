"""Constrained decoding. Enters: a Constraint and a tokenizer; leaves: which ids may come next."""

from microlm.engine.grammar.compile import Grammars, Stats
from microlm.engine.grammar.masks import Masks, Matcher

__all__ = ["Grammars", "Masks", "Matcher", "Stats"]
