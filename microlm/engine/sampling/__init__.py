"""Scores → ids: checks of a `Sampling`, random streams, penalties, draws, log-probabilities."""

from microlm.engine.sampling.checks import check_sampling
from microlm.engine.sampling.draw import draw
from microlm.engine.sampling.logprobs import of_prompt, token_logprob
from microlm.engine.sampling.penalties import Penalties
from microlm.engine.sampling.stream import RandomStream

__all__ = ["Penalties", "RandomStream", "check_sampling", "draw", "of_prompt", "token_logprob"]
