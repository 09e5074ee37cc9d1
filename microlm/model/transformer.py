"""The decoder: token ids → hidden states → logits. Attention over what came before is passed in as `attend`.

Shapes: B batch, T tokens, D hidden, H heads, K key-value heads, d head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from microlm.model.config import ModelConfig
from microlm.model.rope import inverse_frequencies

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""`(layer, q [B,H,T,d], k [B,K,T,d], v [B,K,T,d]) → [B,H,T,d]`; q and k come rotated."""


class Linear(nn.Linear):
    """A matrix kept in its own precision and cast to the input's: fp32 masters, bf16 products."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


def project(x: Tensor, *matrices: nn.Module) -> list[Tensor]:
    """Several matrices on one input; while training plain ones, in one product (5 % of a small step)."""
    plain = [m for m in matrices if isinstance(m, Linear)]
    separate = len(plain) < len(matrices) or any(m.bias is not None for m in plain)
    if separate or not torch.is_grad_enabled():
        return [m(x) for m in matrices]
    weight = torch.cat([m.weight for m in plain]).to(x.dtype)
    sizes = [m.out_features for m in plain]
    return list(F.linear(x, weight).split(sizes, dim=-1))


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; Qwen2's biases, Qwen3's q and k norms."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = config
        self.heads, self.kv_heads, self.head_dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.q_proj = Linear(c.hidden_size, self.heads * self.head_dim, bias=c.qkv_bias)
        self.k_proj = Linear(c.hidden_size, self.kv_heads * self.head_dim, bias=c.qkv_bias)
        self.v_proj = Linear(c.hidden_size, self.kv_heads * self.head_dim, bias=c.qkv_bias)
        self.o_proj = Linear(self.heads * self.head_dim, c.hidden_size, bias=False)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], layer: int, attend: Attend) -> Tensor:
        B, T, _ = x_BTD.shape
        q, k, v = project(x_BTD, self.q_proj, self.k_proj, self.v_proj)
        q = self.q_norm(q.view(B, T, self.heads, self.head_dim)).transpose(1, 2)
        k = self.k_norm(k.view(B, T, self.kv_heads, self.head_dim)).transpose(1, 2)
        v = v.view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)
        y_BHTd = attend(layer, rotate(q, rope), rotate(k, rope), v)
        return self.o_proj(y_BHTd.transpose(1, 2).reshape(B, T, self.heads * self.head_dim))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = project(x, self.gate_proj, self.up_proj)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], layer: int, attend: Attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, layer, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """Embedding, blocks, final norm: what HF calls `model`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Decoder(nn.Module):
    """A stock causal language model; `compute_dtype` is the precision of the products, not of the weights.

    `weights_from` says where the weights came from; while it is None they are what the constructor left.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.weights_from: str | None = None
        self.model = Trunk(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        cos, sin = rope_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def hidden(self, input_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Normed hidden states [B,T,D] of `input_ids` [B,T] at `positions` [T] or [B,T] (tokens from 0)."""
        x, rope = self.embed(input_ids, positions)
        for i, block in enumerate(self.model.layers):
            x = block(x, rope, i, attend)
        return self.model.norm(x)

    def embed(self, input_ids: Tensor, positions: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """What enters the blocks: embeddings [B,T,D] and the rows of the rotary tables."""
        x = F.embedding(input_ids, self.model.embed_tokens.weight).to(self.compute_dtype)
        return x, (self._at(self.cos, positions), self._at(self.sin, positions))

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores [..., V] in float32 of hidden states [..., D]."""
        return self.lm_head(hidden).float()

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits [B,T,V] of whole sequences [B,T], causal, no cache."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        return self.logits(self.hidden(input_ids, positions, causal_attend))

    def _at(self, table: Tensor, positions: Tensor) -> Tensor:
        rows = table[positions].to(self.compute_dtype)
        return rows if positions.dim() == 1 else rows.unsqueeze(1)


def rope_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin [max_position_embeddings, d], in Llama's half-split layout."""
    inverse = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    angles = torch.outer(torch.arange(config.max_position_embeddings, dtype=torch.float32), inverse)
    both = torch.cat((angles, angles), dim=-1)
    return both.cos(), both.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the halves of the last dimension by the position's angles."""
    (left, right), (cos, sin) = x.chunk(2, dim=-1), (table.chunk(2, dim=-1)[0] for table in rope)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention; key-value heads are repeated to the query heads; no mask means causal."""
    k, v = _repeated(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


def _repeated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Key-value heads repeated to the number of query heads."""
    times = q.shape[1] // k.shape[1]
    return (k, v) if times == 1 else (k.repeat_interleave(times, dim=1), v.repeat_interleave(times, dim=1))


def causal_attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Plain causal attention over the given tokens only."""
    return masked_attention(q, k, v, None)


def initialise(decoder: Decoder, generator: torch.Generator, plain: bool = False) -> None:
    """Fill the weights: scaled normal, output projections zero so that every block starts as the identity.

    `plain`: every matrix from normal(0, 0.02), as GPT-2 and the classes of transformers start.
    """
    with torch.no_grad():
        for name, weight in sorted(decoder.named_parameters()):
            if name.endswith("bias") or (name.endswith(("o_proj.weight", "down_proj.weight")) and not plain):
                weight.zero_()
            elif weight.dim() == 2:
                outer = plain or "embed_tokens" in name or "lm_head" in name
                weight.normal_(0.0, 0.02 if outer else 0.4 * weight.shape[1] ** -0.5, generator=generator)
            else:
                weight.fill_(1.0)
    decoder.weights_from = "a random start"
