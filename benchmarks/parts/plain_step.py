"""A training step as a course teaches it: einsum, attention written out, float32, full logits, own AdamW.

Enters: a Llama configuration and weights under their Hugging Face names.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from microlm.model.config import ModelConfig


class PlainModel(nn.Module):
    """The logits [B,T,V] of ids [B,T]."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.config = config
        copies = {name.replace(".", "/"): nn.Parameter(w.detach().clone()) for name, w in weights.items()}
        self.weights = nn.ParameterDict(copies)
        size = config.head_dim
        inverse = config.rope_theta ** (-torch.arange(0, size, 2).float() / size)
        angles = torch.outer(torch.arange(config.max_position_embeddings).float(), inverse)
        self.register_buffer("cos", torch.cat((angles, angles), dim=-1).cos())
        self.register_buffer("sin", torch.cat((angles, angles), dim=-1).sin())

    def weight(self, name: str) -> Tensor:
        """A weight by its Hugging Face name."""
        return self.weights[name.replace(".", "/") + "/weight"]

    def linear(self, name: str, x: Tensor) -> Tensor:
        """A product with a matrix."""
        return torch.einsum("...i,oi->...o", x, self.weight(name))

    def norm(self, name: str, x: Tensor) -> Tensor:
        """RMSNorm."""
        scale = torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + self.config.rms_norm_eps)
        return x * scale * self.weight(name)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.weight("model.embed_tokens")[ids]
        for i in range(self.config.num_hidden_layers):
            block = f"model.layers.{i}"
            x = x + self.attention(f"{block}.self_attn", self.norm(f"{block}.input_layernorm", x))
            y = self.norm(f"{block}.post_attention_layernorm", x)
            gate = self.linear(f"{block}.mlp.gate_proj", y)
            up = self.linear(f"{block}.mlp.up_proj", y)
            x = x + self.linear(f"{block}.mlp.down_proj", gate * torch.sigmoid(gate) * up)
        return self.linear("lm_head", self.norm("model.norm", x))

    def attention(self, name: str, x: Tensor) -> Tensor:
        """Causal attention with rotary positions."""
        rows, length, _ = x.shape
        heads, size = self.config.num_attention_heads, self.config.head_dim
        q, k, v = (
            self.linear(f"{name}.{part}_proj", x).view(rows, length, heads, size).transpose(1, 2)
            for part in "qkv"
        )
        q, k = self.rotated(q), self.rotated(k)
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(size)
        seen = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        scores = scores.masked_fill(~seen, float("-inf"))
        shares = torch.exp(scores - scores.max(dim=-1, keepdim=True).values)
        shares = shares / shares.sum(dim=-1, keepdim=True)
        y = torch.einsum("bhqk,bhkd->bhqd", shares, v)
        return self.linear(f"{name}.o_proj", y.transpose(1, 2).reshape(rows, length, heads * size))

    def rotated(self, x: Tensor) -> Tensor:
        """Rotary positions in Llama's layout."""
        length, half = x.shape[2], x.shape[3] // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
        return x * self.cos[:length] + turned * self.sin[:length]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean loss of labels [B,T]."""
    shifted = logits - logits.max(dim=-1, keepdim=True).values
    sums = torch.log(torch.exp(shifted).sum(dim=-1))
    return (sums - shifted.gather(-1, labels[..., None]).squeeze(-1)).mean()


class PlainAdamW:
    """AdamW, one parameter and one operation after the other."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, betas: tuple[float, float]) -> None:
        self.parameters, self.lr, self.betas = list(parameters), lr, betas
        self.count = 0
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.parameters]

    @torch.no_grad()
    def step(self) -> None:
        """Apply the gradients."""
        self.count += 1
        first, second = self.betas
        rate = self.lr * math.sqrt(1 - second**self.count) / (1 - first**self.count)
        for p, (mean, square) in zip(self.parameters, self.moments, strict=True):
            assert p.grad is not None
            mean.copy_(first * mean + (1 - first) * p.grad)
            square.copy_(second * square + (1 - second) * p.grad**2)
            p.sub_(rate * mean / (torch.sqrt(square) + 1e-8))
            p.sub_(self.lr * 0.0 * p)  # weight decay: none, so that all variants make the same step

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for p in self.parameters:
            p.grad = None
