"""What is learnt: `(hidden states, decoder, batch) → Loss`, a value passed to the one loop."""

from microlm.train.objectives.cross_entropy import make, next_token
from microlm.train.objectives.objective import Loss, Objective, plain

__all__ = ["Loss", "Objective", "make", "next_token", "plain"]
