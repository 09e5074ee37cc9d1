"""Optimizers and schedules: Muon (or AdamW) for hidden matrices, AdamW for embedding, head and norms."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from microlm.core.recipe import Recipe
from microlm.model.transformer import Decoder
from microlm.train.ranks import Ranks

# Coefficients of the five steps of Polar Express (Amsel et al., 2505.16932): singular values go to one.
_POLAR = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


class OptimRecipe(Recipe):
    """Rates, schedule, clipping."""

    matrices: Literal["muon", "adamw"] = Field(default="muon", description="who trains the hidden matrices")
    matrix_lr: float = Field(default=0.02, gt=0, description="rate for hidden matrices")
    embedding_lr: float = Field(default=0.02, gt=0, description="AdamW's rate for the embedding")
    head_lr: float = Field(default=0.004, gt=0, description="AdamW's rate for the head and the norms")
    adapter_lr: float = Field(default=0.004, gt=0, description="AdamW's rate for LoRA matrices")
    warmup_steps: int = Field(default=20, ge=0, description="steps of linear warm-up")
    schedule: Literal["wsd", "cosine", "linear", "constant"] = Field(
        default="wsd", description="shape after warm-up"
    )
    stable_share: float = Field(default=0.6, ge=0, le=1, description="wsd: share of the run at the full rate")
    final_share: float = Field(
        default=0.02, ge=0, le=1, description="rate at the end, as a share of the full rate"
    )
    matrix_decay: float = Field(default=0.0, ge=0, description="decoupled weight decay of hidden matrices")
    table_decay: float = Field(default=0.0, ge=0, description="the same of embedding and head")
    clip_norm: float = Field(default=1.0, gt=0, description="largest norm of the gradient")
    muon_momentum: float = Field(
        default=0.95, ge=0, lt=1, description="Muon's momentum after its own warm-up"
    )
    adam_beta1: float = Field(default=0.8, ge=0, lt=1, description="AdamW's memory of the gradient")
    adam_beta2: float = Field(default=0.95, ge=0, lt=1, description="AdamW's memory of its square")
    adam_eps: float = Field(default=1e-10, gt=0, description="added to AdamW's denominator")


def rate(recipe: OptimRecipe, step: int, steps: int) -> float:
    """The factor on every learning rate at `step` of `steps` (from 0)."""
    warm = min(1.0, (step + 1) / max(1, recipe.warmup_steps))
    done = step / max(1, steps)
    floor = recipe.final_share
    if recipe.schedule == "constant":
        return warm
    if recipe.schedule == "cosine":
        return warm * (floor + (1 - floor) * 0.5 * (1 + float(torch.cos(torch.tensor(done * torch.pi)))))
    start = recipe.stable_share if recipe.schedule == "wsd" else 0.0
    left = 1.0 if done < start else (1 - done) / max(1e-9, 1 - start)
    return warm * max(floor, left)


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by polar iterations (Jordan et al. 2024), in the precision `dtype`.

    Equal shapes go in one batch. `ranks` (their gradients are equal) share the matrices out.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        momentum: float,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype, self.ranks = dtype, ranks or Ranks(0, 1)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                buffer = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"])
                wide = update if p.shape[0] <= p.shape[1] else update.mT
                by_shape.setdefault(tuple(wide.shape), []).append((p, wide))
            directions = self._orthogonalised([torch.stack([u for _, u in i]) for i in by_shape.values()])
            for items, whitened in zip(by_shape.values(), directions, strict=True):
                for (p, _), direction in zip(items, whitened, strict=True):
                    tall = p.shape[0] > p.shape[1]
                    scale = max(1.0, p.shape[0] / p.shape[1]) ** 0.5
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(direction.mT if tall else direction, alpha=-scale * group["lr"])

    def _orthogonalised(self, batches: list[Tensor]) -> list[Tensor]:
        """`_orthogonal` of every batch: each rank does its share, and the sum with zeros is exact."""
        rank, size = self.ranks.rank, self.ranks.size
        if size == 1:
            return [_orthogonal(x.to(self.dtype)).float() for x in batches]
        sizes = [x.numel() for x in batches]
        flat = torch.zeros(sum(sizes), dtype=self.dtype, device=batches[0].device)
        parts = [part.view_as(x) for part, x in zip(flat.split(sizes), batches, strict=True)]
        for part, x in zip(parts, batches, strict=True):
            if len(x) > rank:
                part[rank::size] = _orthogonal(x[rank::size].to(self.dtype))
        self.ranks.sum_(flat)
        return [part.float() for part in parts]


def _orthogonal(x: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices of a batch [N, rows <= columns]."""
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    for a, b, c in _POLAR:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x


def make(decoder: Decoder, recipe: OptimRecipe, ranks: Ranks | None = None) -> list[torch.optim.Optimizer]:
    """Optimizers over the trainable parameters; each group keeps its full rate as `base_lr`."""
    groups: dict[str, list[nn.Parameter]] = {}
    for name, p in decoder.named_parameters():
        if p.requires_grad:
            groups.setdefault(_group(name, p), []).append(p)
    rates = {
        "matrix": (recipe.matrix_lr, recipe.matrix_decay),
        "embedding": (recipe.embedding_lr, recipe.table_decay),
        "head": (recipe.head_lr, recipe.table_decay),
        "vector": (recipe.head_lr, 0.0),
        "adapter": (recipe.adapter_lr, 0.0),
    }
    optimizers: list[torch.optim.Optimizer] = []
    if recipe.matrices == "muon" and "matrix" in groups:
        lr, decay = rates.pop("matrix")
        muon = functools.partial(Muon, dtype=decoder.compute_dtype, ranks=ranks)
        optimizers.append(muon(groups["matrix"], lr, recipe.muon_momentum, decay))
    adam = [
        {"params": groups[name], "lr": lr, "weight_decay": decay}
        for name, (lr, decay) in rates.items()
        if name in groups
    ]
    if adam:
        betas = (recipe.adam_beta1, recipe.adam_beta2)
        optimizers.append(torch.optim.AdamW(adam, betas=betas, eps=recipe.adam_eps, fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


def set_rates(optimizers: list[torch.optim.Optimizer], recipe: OptimRecipe, step: int, steps: int) -> float:
    """Set every group's rate for `step`, return the factor; Muon's momentum warms up over 60 steps."""
    factor = rate(recipe, step, steps)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
            if isinstance(optimizer, Muon):
                group["momentum"] = min(recipe.muon_momentum, 0.85 + 0.1 * step / 60)
    return factor


def _group(name: str, p: nn.Parameter) -> str:
    if "lora_" in name:
        return "adapter"
    if "embed_tokens" in name:
        return "embedding"
    if "lm_head" in name:
        return "head"
    return "matrix" if p.dim() == 2 else "vector"
