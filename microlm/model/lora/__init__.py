"""Low-rank adapters (LoRA, 2106.09685) on a loaded decoder, kept in PEFT's directory format.

Enters: a decoder with its weights. Leaves: the same decoder with small trainable matrices, or merged again.
"""

from microlm.model.lora.adapter_file import load_adapter, read_pairs, save_adapter, stored_name
from microlm.model.lora.config import ALL_LINEAR, Base, LoraConfig
from microlm.model.lora.int8 import Int8Linear
from microlm.model.lora.layer import (
    LoraLinear,
    adapted,
    adapter_parameters,
    apply,
    draw_seed,
    dropping,
    matrices,
    merge,
    pairs_of,
    unmerge,
)
from microlm.model.lora.peft_config import ADAPTER_CONFIG, made_for, read_config

__all__ = [
    "ADAPTER_CONFIG",
    "ALL_LINEAR",
    "Base",
    "Int8Linear",
    "LoraConfig",
    "LoraLinear",
    "adapted",
    "adapter_parameters",
    "apply",
    "draw_seed",
    "dropping",
    "load_adapter",
    "made_for",
    "matrices",
    "merge",
    "pairs_of",
    "read_config",
    "read_pairs",
    "save_adapter",
    "stored_name",
    "unmerge",
]  # fmt: skip
