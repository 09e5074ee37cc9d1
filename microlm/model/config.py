"""The architecture: exactly Llama, Qwen2 or Qwen3. Enters: an HF `config.json`; leaves: `ModelConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from microlm.core.errors import UserError
from microlm.model.rope import RopeScaling, read_scaling

ModelType = Literal["llama", "qwen2", "qwen3"]
CLASS: dict[ModelType, str] = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings",
)  # fmt: skip
_LARGEST = {"num_hidden_layers": 1000, "max_position_embeddings": 1 << 22}  # beyond what any stock model has


@dataclass(frozen=True)
class ModelConfig:
    """The fields of a stock decoder, under their HF names. Dimensions in elements, positions in tokens."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    model_type: ModelType = "qwen3"
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    more_eos_ids: tuple[int, ...] = ()  # that end an answer too: HF's lists of eos_token_id

    @property
    def qkv_bias(self) -> bool:
        """Qwen2 has biases on q, k and v."""
        return self.model_type == "qwen2"

    @property
    def qk_norm(self) -> bool:
        """Qwen3 normalises q and k per head."""
        return self.model_type == "qwen3"

    def parameter_parts(self) -> dict[str, int]:
        """How many weights each part has: embedding, attention, mlp, norms, head (0 when it is tied)."""
        hidden, layers = self.hidden_size, self.num_hidden_layers
        outputs = (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim
        attention = hidden * (outputs + self.num_attention_heads * self.head_dim)
        table = self.vocab_size * hidden
        return {
            "embedding": table,
            "attention": layers * (attention + (outputs if self.qkv_bias else 0)),
            "mlp": layers * 3 * hidden * self.intermediate_size,
            "norms": layers * (2 * hidden + (2 * self.head_dim if self.qk_norm else 0)) + hidden,
            "head": 0 if self.tie_word_embeddings else table,
        }

    @property
    def parameters(self) -> int:
        """All weights, a tied table once."""
        return sum(self.parameter_parts().values())

    @property
    def hf_eos(self) -> int | list[int] | None:
        """The ids that end an answer as HF writes them: a list only where there are several."""
        if self.eos_token_id is None or not self.more_eos_ids:
            return self.eos_token_id
        return [self.eos_token_id, *self.more_eos_ids]

    def to_hf(self, dtype: str) -> dict[str, Any]:
        """The `config.json` that transformers, vLLM and llama.cpp's converter read."""
        scaling = self.rope_scaling.to_hf() if self.rope_scaling else None
        fields = asdict(self)
        del fields["more_eos_ids"]
        return {
            "architectures": [CLASS[self.model_type]],
            **fields,
            "eos_token_id": self.hf_eos,
            "rope_scaling": scaling,  # older readers take this and rope_theta, newer ones rope_parameters
            "rope_parameters": {**(scaling or {"rope_type": "default"}), "rope_theta": self.rope_theta},
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "bos_token_id": None,
            "initializer_range": 0.02,
            "use_cache": True,
            "use_sliding_window": False,
            "dtype": dtype,
            "torch_dtype": dtype,
        }

    @classmethod
    def from_hf(cls, data: Mapping[str, Any], where: str) -> ModelConfig:
        """An HF config → ours; what our decoder does not compute is refused by name."""
        kind: Any = data.get("model_type")
        if kind not in get_args(ModelType):
            raise UserError(
                f"{where}: model_type {kind!r} is not supported; supported: {', '.join(get_args(ModelType))}"
            )
        _refuse_extras(data, where)
        try:
            heads = int(data["num_attention_heads"])
            hidden = int(data["hidden_size"])
            rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
            positions = int(data["max_position_embeddings"])
            eos = id_list(data.get("eos_token_id"))
            config = cls(
                vocab_size=int(data["vocab_size"]),
                hidden_size=hidden,
                intermediate_size=int(data["intermediate_size"]),
                num_hidden_layers=int(data["num_hidden_layers"]),
                num_attention_heads=heads,
                num_key_value_heads=int(data.get("num_key_value_heads") or heads),
                head_dim=int(data.get("head_dim") or _implied_head_dim(kind, hidden, heads)),
                max_position_embeddings=positions,
                rope_theta=float(rope.get("rope_theta") or data.get("rope_theta") or 10_000.0),
                rope_scaling=read_scaling(rope, positions, where),
                model_type=kind,
                rms_norm_eps=float(data["rms_norm_eps"]),
                tie_word_embeddings=bool(data.get("tie_word_embeddings", False)),
                eos_token_id=next(iter(eos), None),
                pad_token_id=next(iter(id_list(data.get("pad_token_id"))), None),
                more_eos_ids=eos[1:],
            )
        except KeyError as e:
            raise UserError(
                f"{where}: key {e} is missing; is this the config.json of a {kind} model?"
            ) from None
        except (TypeError, ValueError, ArithmeticError) as e:
            raise UserError(f"{where}: {e}; every size must be a whole number") from None
        config._require_sizes(where)
        return config

    def _require_sizes(self, where: str) -> None:
        for name in _SIZES:
            if (size := getattr(self, name)) < 1:
                raise UserError(f"{where}: {name} is {size}; every size must be at least 1")
            if size > (most := _LARGEST.get(name, size)):
                raise UserError(f"{where}: {name} is {size}; at most {most} can be, correct it")
        if self.num_attention_heads % self.num_key_value_heads or self.head_dim < 2 or self.head_dim % 2:
            raise UserError(
                f"{where}: {self.num_attention_heads} heads, {self.num_key_value_heads} key-value heads and "
                f"head_dim {self.head_dim} do not fit; heads must be a multiple, head_dim even"
            )


def _refuse_extras(data: Mapping[str, Any], where: str) -> None:
    rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{where}: rope_parameters must be an object, found {type(rope).__name__}")
    if (rope.get("partial_rotary_factor") or data.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UserError(f"{where}: partly rotated heads are not supported; use a model without them")
    if data.get("use_sliding_window") or "sliding_attention" in (data.get("layer_types") or []):
        raise UserError(f"{where}: sliding-window attention is not supported; use a model without it")
    if data.get("hidden_act", "silu") != "silu":
        raise UserError(f"{where}: activation {data['hidden_act']!r} is not supported, only silu")
    if data["model_type"] != "qwen2" and (data.get("attention_bias") or data.get("mlp_bias")):
        raise UserError(f"{where}: biases are not supported for {data['model_type']}")


def _implied_head_dim(kind: ModelType, hidden: int, heads: int) -> int:
    """What transformers takes where the key is missing: 128 for Qwen3, an equal share for the others."""
    return 128 if kind == "qwen3" else hidden // heads


def id_list(value: Any) -> tuple[int, ...]:
    """HF's one id, list of ids or null, each once."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(dict.fromkeys(map(int, values)))
