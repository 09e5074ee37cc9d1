"""What a training process needs in memory, part by part, and what the machine has.

Enters: a decoder (or its shadow) and the recipe. Leaves: bytes, or a sentence that says what to lower.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from microlm.core import runtime
from microlm.core.errors import UserError
from microlm.core.recipe import Parallel
from microlm.model import lora
from microlm.model.attention import stripe
from microlm.model.config import ModelConfig
from microlm.model.transformer import Decoder, masked_attention
from microlm.train import optim
from microlm.train.job import LoopRecipe
from microlm.train.objectives.cross_entropy import chunk_size
from microlm.train.ranks import processes

MASTER = 4  # bytes of a weight, its gradient and each moment
RUNTIME = 350 << 20  # python, torch and its kernels' workspace in a process
COMPILER = 80 << 20  # what torch.compile leaves in it
EAGER_HOLES, COMPILED_HOLES, CUDA_HOLES = 1.35, 1.2, 1.1  # allocated over used: benchmarks/train_plan.py
SLACK = 0.8  # a prediction may be this much too high: only what cannot fit even then is refused


class TrainingRecipe(Protocol):
    """What the recipes of the training stages have in common."""

    @property
    def loop(self) -> LoopRecipe: ...
    @property
    def optim(self) -> optim.OptimRecipe: ...
    @property
    def parallel(self) -> Parallel: ...


@dataclass(frozen=True)
class Memory:
    """Bytes of one process. Activations and the optimizer's scratch are never there together.

    `teacher`: the weights of a second model that is only read, its forward pass and its logits.
    `answers`: the weights and the KV cache of the engine that writes what is learnt.
    """

    weights: int
    gradients: int
    moments: int
    activations: int
    logits: int
    scratch: int
    sums: int
    snapshot: int
    runtime: int
    holes: float
    teacher: int = 0
    answers: int = 0

    @property
    def total(self) -> int:
        """The peak: what stays, the larger of the two phases, and the allocator's holes."""
        stays = self.weights + self.gradients + self.moments + self.sums + self.snapshot
        stays += self.teacher + self.answers
        return self.runtime + round(self.holes * (stays + max(self.activations + self.logits, self.scratch)))


def check(
    config: ModelConfig,
    recipe: TrainingRecipe,
    adapter: lora.LoraConfig | None = None,
    teacher: ModelConfig | None = None,
    answers: int = 0,
) -> None:
    """Refuse a run that cannot fit into what is free here, before it starts; `answers` as in `Memory`."""
    ranks = processes(recipe.parallel)
    decoder = shadow(config, recipe.loop, adapter)
    memory = replace(predict(decoder, recipe.loop, recipe.optim, ranks), answers=answers)
    if teacher:
        memory = replace(memory, teacher=teacher_bytes(teacher, recipe.loop))
    require_fit(memory, recipe.loop, runtime.local_ranks(ranks))


def shadow(config: ModelConfig, loop: LoopRecipe, adapter: lora.LoraConfig | None = None) -> Decoder:
    """The decoder that would be trained, without content: it takes no memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.device(runtime.device()):
        return _empty(config, loop, adapter)


def _empty(config: ModelConfig, loop: LoopRecipe, adapter: lora.LoraConfig | None) -> Decoder:
    decoder = Decoder(config, loop.compute_dtype())
    decoder.weights_from = "nowhere: it has no content"
    if adapter:
        lora.apply(decoder, adapter, None)
    return decoder


def predict(decoder: Decoder, loop: LoopRecipe, rates: optim.OptimRecipe, ranks: int) -> Memory:
    """The memory of rank 0 of `ranks` that train a decoder (a `shadow` will do)."""
    config, optimizers = decoder.config, optim.make(decoder, rates)
    groups = [(o, p) for o in optimizers for g in o.param_groups for p in g["params"]]
    trained = sum(p.numel() for _, p in groups)
    moments = sum(p.numel() * (1 if isinstance(o, optim.Muon) else 2) for o, p in groups)
    item, adapter = loop.compute_dtype().itemsize, _adapter(decoder)
    rows = min(loop.micro_rows, loop.batch_rows)
    on_gpu = runtime.device().type == "cuda"  # snapshots, and python's own memory, lie in the host's
    saves = not on_gpu and (loop.checkpoint_steps < loop.steps or loop.keep_best)
    return Memory(
        weights=sum(t.nbytes for t in (*decoder.parameters(), *decoder.model.buffers())),
        gradients=MASTER * trained,
        moments=MASTER * moments,
        activations=_activations(config, loop, rows, adapter),
        logits=_head_bytes(config, loop, rows, adapter),
        scratch=_scratch(optimizers, item),
        sums=MASTER * trained if ranks > 1 else 0,
        snapshot=MASTER * (trained + moments) if saves else 0,
        runtime=0 if on_gpu else RUNTIME + (COMPILER if loop.compiles() else 0),
        holes=CUDA_HOLES if on_gpu else COMPILED_HOLES if loop.compiles() else EAGER_HOLES,
    )


def teacher_bytes(config: ModelConfig, loop: LoopRecipe) -> int:
    """A frozen model in the products' precision: weights, what one block holds, logits of a chunk."""
    rows = min(loop.micro_rows, loop.batch_rows)
    mask = rows * loop.context**2 if loop.document_mask else 0
    held = block_bytes(config, loop, rows) + _head_bytes(config, loop, rows, None)
    return (config.parameters + mask) * loop.compute_dtype().itemsize + held


def _adapter(decoder: Decoder) -> lora.LoraConfig | None:
    return next((m.config for m in lora.adapted(decoder).values()), None)


def _copied(adapter: lora.LoraConfig | None) -> bool:
    """Whether products need a copy of the matrices in their own precision."""
    return adapter is None or adapter.base == "as_loaded"


def _activations(config: ModelConfig, loop: LoopRecipe, rows: int, adapter: lora.LoraConfig | None) -> int:
    """What all blocks keep, or one of them and the inputs of the others, and the mask."""
    item, layers = loop.compute_dtype().itemsize, config.num_hidden_layers
    mask = rows * loop.context**2 * item if loop.document_mask else 0
    block = block_bytes(config, loop, rows, adapter)
    if not loop.activation_checkpointing:
        return layers * block + mask
    return block + layers * rows * loop.context * config.hidden_size * item + mask


def _head_bytes(config: ModelConfig, loop: LoopRecipe, rows: int, adapter: lora.LoraConfig | None) -> int:
    """Logits of a chunk and their gradient (written out: in fp32 too); copy of the matrix, gradient of x."""
    item, positions = loop.compute_dtype().itemsize, rows * loop.context
    wide = 0 if loop.compiles() else 3 * 4
    table = config.vocab_size * config.hidden_size * _copied(adapter)
    logits = min(positions, chunk_size(runtime.device())) * config.vocab_size * (2 * item + wide)
    return logits + (table + positions * config.hidden_size) * item


def block_bytes(
    config: ModelConfig, loop: LoopRecipe, rows: int, adapter: lora.LoraConfig | None = None
) -> int:
    """What one block keeps for its backward pass, with its copies of the matrices in the products' dtype."""
    item = loop.compute_dtype().itemsize
    if not loop.compiles():
        return _kept_by_eager_block(config, loop, rows, adapter)
    c, positions = config, rows * loop.context
    wide = c.num_attention_heads * c.head_dim
    stripes = -(-loop.context // stripe(loop.context))
    scores = round(rows * c.num_attention_heads * loop.context**2 * (stripes + 1) / (2 * stripes))
    if runtime.device().type == "cuda":
        scores = 0  # FlashAttention keeps none
    matrices = sum(c.parameter_parts()[part] for part in ("attention", "mlp")) // c.num_hidden_layers
    kept = positions * (4 * c.hidden_size + 4 * wide + 3 * c.intermediate_size) + scores
    return (kept + matrices * _copied(adapter)) * item


def _kept_by_eager_block(
    config: ModelConfig, loop: LoopRecipe, rows: int, adapter: lora.LoraConfig | None
) -> int:
    """Counted on tensors without content: every tensor that autograd keeps of a forward pass, once."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    dtype, kept = loop.compute_dtype(), dict[int, Tensor]()

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with FakeTensorMode(), torch.device(runtime.device()):
        block = _empty(replace(config, num_hidden_layers=1), loop, adapter).model.layers[0]
        x = torch.empty(rows, loop.context, config.hidden_size, dtype=dtype, requires_grad=True)
        angles = torch.empty(rows, 1, loop.context, config.head_dim, dtype=dtype)
        mask = torch.empty(rows, 1, loop.context, loop.context, dtype=dtype)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            block(x, (angles, angles), 0, lambda layer, q, k, v: masked_attention(q, k, v, mask))
    shared = {t.untyped_storage()._cdata for t in (*block.parameters(), *block.buffers(), angles, mask)}
    return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in shared)


def _scratch(optimizers: list[torch.optim.Optimizer], item: int) -> int:
    """Muon's step: every update, the stacks of equal shapes, the directions; the polar steps of one stack."""
    stacks: dict[tuple[int, ...], int] = {}
    for optimizer in optimizers:
        if isinstance(optimizer, optim.Muon):
            for p in (p for g in optimizer.param_groups for p in g["params"]):
                shape = tuple(sorted(p.shape))
                stacks[shape] = stacks.get(shape, 0) + p.numel()
    return 3 * MASTER * sum(stacks.values()) + 4 * item * max(stacks.values(), default=0)


def available() -> int:
    """Bytes that training may take here: free memory of the GPU, or of this machine and its container."""
    device = runtime.device()
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = [1 << 62]
    with suppress(OSError):
        free.append(_number(Path("/proc/meminfo"), r"^MemAvailable:\s+(\d+) kB") << 10)
    with suppress(OSError, ValueError):  # a container without a limit says max
        group = Path("/sys/fs/cgroup")
        cache = _number(group / "memory.stat", r"^inactive_file (\d+)")
        used = int((group / "memory.current").read_text()) - cache
        free.append(int((group / "memory.max").read_text()) - used)
    return min(free)


def _number(file: Path, pattern: str) -> int:
    found = re.search(pattern, file.read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"{file}: holds no {pattern}")
    return int(found[1])


def require_fit(memory: Memory, loop: LoopRecipe, ranks: int, room: int | None = None) -> None:
    """Refuse what `ranks` on this machine cannot hold in `room` bytes (none: what is free now)."""
    shared = 1 if runtime.device().type == "cuda" else ranks  # each rank has its own GPU
    room = available() if room is None else room
    if SLACK * memory.total * shared <= room:
        return
    each = f"{memory.total / 2**30:.1f} GiB" + (f" in each of {shared} processes" if shared > 1 else "")
    raise UserError(
        f"training needs about {each}, {room / 2**30:.1f} GiB are free; {_advice(memory, loop, shared, room)}"
    )


def _advice(memory: Memory, loop: LoopRecipe, shared: int, room: int) -> str:
    """What makes it fit: fewer rows at once if that is enough, else fewer processes, else a smaller model."""
    stays = memory.total - round(memory.holes * max(memory.activations + memory.logits, memory.scratch))
    left = (room / shared - stays) / memory.holes
    rows = int((left - memory.logits) / memory.activations * loop.micro_rows)  # logits come in chunks
    if rows >= 1 and memory.scratch <= left:
        return f"lower loop.micro_rows from {loop.micro_rows} to {min(rows, loop.micro_rows - 1) or 1}"
    if shared > 1 and memory.total <= room:
        return "lower parallel.processes"
    return "choose a smaller architecture, a shorter loop.context or fewer loop.micro_rows"
