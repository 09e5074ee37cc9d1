"""Numbers move only on purpose: the losses of 20 steps of a fixed tiny fp32 run.

`PYTHONPATH=.:tests python tests/golden/test_golden_loss.py` writes the file anew, after a change that is
meant to move them.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from training import CONTEXT, add_lora, make_job, random_set, tiny_decoder, tiny_loop

from microlm.core.metrics import read_metrics
from microlm.train.batches import PackedRows
from microlm.train.loop import train
from microlm.train.optim import OptimRecipe
from microlm.train.ranks import Ranks

GOLDEN = Path(__file__).with_name("loss.json")
RUNS = ("pretrain", "sft", "lora")


def losses(name: str, folder: Path) -> list[float]:
    """The loss of every step, then the validation loss before and after."""
    decoder = tiny_decoder()
    fields: dict[str, Any] = {"optim": OptimRecipe(warmup_steps=5, schedule="wsd", stable_share=0.5)}
    if name != "pretrain":
        with torch.no_grad():
            decoder.lm_head.weight.mul_(20)
        talks = {
            "question": random_set("question", 2, conversations=True),
            "documents": random_set("documents", 0),
        }
        fields["train"] = PackedRows(talks, {"question": 0.7, "documents": 0.3}, CONTEXT, 0)
    if name == "lora":
        add_lora(decoder)
    loop = tiny_loop(steps=20, log_steps=1, checkpoint_steps=100, validation_steps=100)
    train(Ranks(0, 1), decoder, make_job(folder, loop, **fields))
    rows = read_metrics(folder / "logs/metrics.jsonl")
    found = [r["loss"] for r in rows if "loss" in r] + [
        r["validation_loss"] for r in rows if "validation_loss" in r
    ]
    assert len(found) == 22
    return found


@pytest.mark.parametrize("name", RUNS)
def test_the_loss_is_the_golden_one(name: str, tmp_path: Path) -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert losses(name, tmp_path) == pytest.approx(golden[name], rel=1e-4)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        made = {name: losses(name, Path(place) / name) for name in RUNS}
    GOLDEN.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
