"""The state of an unfinished run on disk: written beside the training, whole or not at all.

A checkpoint is a folder `step-N`: the weights as a Hugging Face directory (or a PEFT adapter), the state of
the optimizers in safetensors, and `checkpoint.json`, written last: position, fingerprint, bytes and sha256 of
each file. A folder `best-N` holds the weights of the lowest validation loss alone.
"""

from microlm.train.checkpoint.position import Position, random_state, set_random_state
from microlm.train.checkpoint.restore import restore
from microlm.train.checkpoint.saver import SavePlan, Saver, publish_best
from microlm.train.checkpoint.trained import SaveWeights, Trained

__all__ = [
    "Position",
    "SavePlan",
    "SaveWeights",
    "Saver",
    "Trained",
    "publish_best",
    "random_state",
    "restore",
    "set_random_state",
]  # fmt: skip
