"""What people see: rows, bits per byte, shares of time, samples, trackers, the page at the end."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from artifacts import PROSE, write_data, write_tokenizer
from tiny_model import write_tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from training import CONTEXT, Disturbed, add_lora, make_job, tiny_decoder, tiny_loop, token_set

from microlm.cli.training.samples import sample
from microlm.core.errors import UserError
from microlm.core.metrics import read_metrics
from microlm.core.recipe import build
from microlm.core.records import Sampling
from microlm.engine import Engine
from microlm.model import directory
from microlm.model.transformer import Decoder
from microlm.text.tokenizer import Tokenizer
from microlm.train.batches import Batch, PackedRows
from microlm.train.job import Job, LoopRecipe
from microlm.train.loop import train
from microlm.train.ranks import Ranks
from microlm.train.reporter import TIMED, write_summary
from microlm.train.reporter.samples import read_samples
from microlm.train.reporter.speed import position_flops
from microlm.train.reporter.summary import speed
from microlm.train.reporter.validation import token_byte_counts
from microlm.train.step import losses, make_forward

ALONE = Ranks(0, 1)
TEXTS = ("a small text.", "another one, a little longer", "words and words", "the end of it")


def metrics(job: Job) -> list[dict[str, Any]]:
    return read_metrics(job.logs / "metrics.jsonl")


def text_job(folder: Path, **fields: Any) -> tuple[Job, Decoder]:
    """A job on texts of a byte-level tokenizer, and its model."""
    model = write_tiny_model(folder / "model")
    tokenizer = Tokenizer.load(model)
    ids = [[*tokenizer.encode(text), tokenizer.eos_id] for text in TEXTS]
    sets = {"documents": token_set("documents", ids)}
    parts = {"tokenizer": model, "train": PackedRows(sets, {}, CONTEXT, 0)}
    parts["validation"] = PackedRows(sets, {}, CONTEXT, 0)
    loop = fields.pop("loop", tiny_loop())
    return make_job(folder, loop, **(parts | fields)), directory.load(model)


def test_a_row_tells_everything(tmp_path: Path) -> None:
    job, decoder = text_job(tmp_path)
    train(ALONE, decoder, job)
    found = metrics(job)
    told = {"schema", "step", "time", "tokens", "loss", "rate", "grad_norm", *TIMED}
    assert set(found[1]) == told
    assert set(found[-1]) == told | {"validation_loss", "bits_per_byte"}
    for row in found[1:]:
        assert row["tokens_per_s"] > 0
        assert 0 < row["mfu"] < 1.5
        assert 0 <= row["data_wait_share"] <= 1
        assert row["peak_memory_bytes"] > 1e7


@torch.no_grad()
def test_bits_per_byte_by_hand(tmp_path: Path) -> None:
    """Two rows of validation, each piece predicted alone; EOS costs bits, but is no byte."""
    job, decoder = text_job(tmp_path, loop=tiny_loop(validation_rows=2, micro_rows=2))
    with torch.enable_grad():
        train(ALONE, decoder, job)
    tokenizer = Tokenizer.load(tmp_path / "model")
    assert job.validation
    batch = next(job.validation.batches(2))
    bits, size = 0.0, 0
    for r, segments in enumerate(batch.segments):
        for segment in range(int(segments.max()) + 1):
            here = segments == segment
            scores = decoder(batch.input_ids[r, here][None])[0].log_softmax(-1)
            labels = batch.labels[r, here]
            bits -= float(scores[range(len(labels)), labels].sum()) / math.log(2)
            size += len(tokenizer.decode(i for i in labels.tolist() if i != tokenizer.eos_id).encode())
    assert metrics(job)[-1]["bits_per_byte"] == pytest.approx(bits / size, rel=1e-5)


def test_the_bytes_of_ids_are_those_of_the_text(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer", write_data(tmp_path / "data"))
    counts = token_byte_counts(tokenizer.path)
    encoder = Tokenizer.load(tokenizer.path)
    for text in PROSE:
        assert int(counts[encoder.encode(text)].sum()) == len(text.encode())
    assert counts[[encoder.eos_id, encoder.pad_id]].tolist() == [0, 0]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_slow_reader_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    """One batch of a run takes a second longer to read: it is in the rows, but for what is hidden."""
    loop = tiny_loop(steps=6, log_steps=1, workers=workers)
    quick, slow = (make_job(tmp_path / f, loop) for f in ("quick", "slow"))
    train(ALONE, tiny_decoder(), quick)
    assemble, left = PackedRows.assemble, [4]

    def held_up(self: PackedRows, rows: Sequence[Any]) -> Batch:
        left[0] -= len(rows) == 4  # not the rows of a validation
        time.sleep(1.0 if left[0] == 0 else 0.0)
        return assemble(self, rows)

    monkeypatch.setattr(PackedRows, "assemble", held_up)
    train(ALONE, tiny_decoder(), slow)
    waits = [
        [row["data_wait_share"] * 4 * CONTEXT / row["tokens_per_s"] for row in metrics(job)[1:]]
        for job in (quick, slow)
    ]
    assert sum(waits[1]) > 0.3 > sum(waits[0])
    if not workers:
        assert waits[1][3] == max(waits[1]) > 0.9


@pytest.mark.parametrize("adapter", [False, True])
def test_flops_are_those_that_torch_counts(tmp_path: Path, adapter: bool) -> None:
    decoder = tiny_decoder(num_attention_heads=4, num_key_value_heads=4)
    if adapter:
        add_lora(decoder)
    job = make_job(tmp_path, tiny_loop())
    batch = next(job.train.batches(8))  # 256 labels: what the head is rounded up to
    assert batch.label_count == 256
    forward = make_forward(decoder, job.loop)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        losses(forward, decoder, batch, job.objective).total.backward()
    body, head = position_flops(decoder, CONTEXT)
    ours = batch.input_ids.numel() * body + batch.label_count * head
    assert counted.get_total_flops() == pytest.approx(ours, rel=0.03)


def test_the_line_tells_how_it_goes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    job, decoder = text_job(tmp_path)
    train(ALONE, decoder, job)
    line = capfd.readouterr().err.splitlines()[-1]
    assert re.match(r"tiny: 1,280/1,280 \(100%\) tokens, [\d,]+ tokens/s ", line)
    for what in (r"loss \d\.\d+", r"bpb \d\.\d+", r"val \d\.\d+", r"MFU \d+%", r"mem [\d.]+ GB"):
        assert re.search(f" {what}", line)


def remembered(
    decoder: Decoder, tokenizer: Path, prompts: Sequence[str], tokens: int, check: Callable[[], None]
) -> list[str]:
    size = float(decoder.lm_head.weight.detach().norm())
    return [f"{prompt}: {size:.6f} {tokens}" for prompt in prompts]


SAMPLES = {"steps": 4, "prompts": ["one", "two"], "tokens": 5}


def test_samples_at_intervals_and_at_the_end(tmp_path: Path) -> None:
    loop = tiny_loop(samples=SAMPLES)
    whole, decoder = text_job(tmp_path / "whole", loop=loop, sampler=remembered)
    train(ALONE, decoder, whole)
    rows = read_samples(whole.logs)
    assert [(r["step"], r["prompt"]) for r in rows] == [(s, p) for s in (4, 8, 10) for p in ("one", "two")]
    assert rows[-1]["tokens"] == 10 * 4 * CONTEXT

    act = Disturbed(19, lambda: signal.raise_signal(signal.SIGINT))
    cut, decoder = text_job(tmp_path / "cut", loop=loop, sampler=remembered, objective=act)
    with pytest.raises(KeyboardInterrupt):
        train(ALONE, decoder, cut)
    with (cut.logs / "samples.jsonl").open("a") as f:
        f.write('{"step": 10, "prompt": "of a step that is done again"}\n{"ste')
    again, decoder = text_job(tmp_path / "cut", loop=loop, sampler=remembered)
    train(ALONE, decoder, again)
    assert read_samples(cut.logs) == rows


def test_samples_are_what_the_engine_writes_and_change_nothing(tmp_path: Path) -> None:
    prompts = ["a small", "the"]
    loop = tiny_loop(samples={"steps": 3, "prompts": prompts, "tokens": 12})
    plain, without = text_job(tmp_path / "plain")
    train(ALONE, without, plain)
    job, decoder = text_job(tmp_path / "samples", loop=loop, sampler=sample)
    train(ALONE, decoder, job)
    assert all(torch.equal(p, q) for p, q in zip(without.parameters(), decoder.parameters(), strict=True))
    directory.save(decoder, tmp_path / "samples/model")
    engine = Engine(tmp_path / "samples/model")
    expected = [c.text for c in engine.generate(prompts, Sampling(max_tokens=12))]
    assert [r["text"] for r in read_samples(job.logs)][-2:] == expected
    assert any(expected)


def test_a_stop_does_not_wait_for_samples(tmp_path: Path) -> None:
    """Nor for a row with samples to come: what is missing is written when the run goes on."""
    loop = tiny_loop(samples=SAMPLES)
    whole, decoder = text_job(tmp_path / "whole", loop=loop, sampler=remembered)
    train(ALONE, decoder, whole)

    def endless(*words: Any) -> list[str]:
        signal.raise_signal(signal.SIGINT)
        for _ in range(1000):
            words[-1]()
        raise AssertionError

    cut, decoder = text_job(tmp_path / "cut", loop=loop, sampler=endless)
    with pytest.raises(KeyboardInterrupt):
        train(ALONE, decoder, cut)
    assert max(p.name for p in cut.resume.glob("step-*")) == "step-00000004"
    assert read_samples(cut.logs) == []
    again, decoder = text_job(tmp_path / "cut", loop=loop, sampler=remembered)
    train(ALONE, decoder, again)
    assert read_samples(cut.logs) == read_samples(whole.logs)
    untold = {"time", *TIMED}
    kept = [[{k: v for k, v in r.items() if k not in untold} for r in metrics(j)] for j in (cut, whole)]
    assert kept[0] == kept[1]


def test_the_engine_asks_between_tokens(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path)
    left = [3]

    def check() -> None:
        left[0] -= 1
        if left[0] == 0:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        sample(directory.load(model), model, ["a", "b"], 20, check)


def test_a_prompt_without_room_is_refused_before_the_first_step(tmp_path: Path) -> None:
    loop = tiny_loop(samples={"steps": 3, "prompts": ["the", "a b c d " * 200], "tokens": 5})
    job, decoder = text_job(tmp_path, loop=loop, sampler=remembered)
    with pytest.raises(UserError, match=r"prompt 2 of loop.samples has \d+ tokens, but the model has \d+ "):
        train(ALONE, decoder, job)
    assert metrics(job) == []


def test_samples_without_a_prompt_or_a_writer_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"asks for samples; give prompts: beginnings of texts"):
        build(LoopRecipe, {"samples": {"steps": 3}}, "loop")
    job, decoder = text_job(tmp_path, loop=tiny_loop(samples=SAMPLES))
    with pytest.raises(UserError, match=r"loop.samples needs somebody who can generate"):
        train(ALONE, decoder, job)


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_a_tracker_gets_every_row_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    """The real package where it is installed; where it is not, a sentence before anything runs."""
    if importlib.util.find_spec(kind) is None:
        with pytest.raises(UserError, match=f"{kind} is not installed; pip install {kind}, or leave tracker"):
            build(LoopRecipe, {"tracker": kind}, "loop")
        return
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    job = make_job(tmp_path, tiny_loop(tracker=kind))
    train(ALONE, tiny_decoder(), job)
    kept = b"".join(f.read_bytes() for f in tmp_path.rglob("*") if f.suffix in (".wandb", ".db", ".db-wal"))
    for word in ("grad_norm", "validation_loss", "data_wait_share", (job.logs / "tracker-run").read_text()):
        assert word.encode() in kept
    assert not any(path.is_symlink() for path in job.logs.rglob("*"))
    assert capfd.readouterr().out == ""


def test_speed_over_all_rows_by_hand() -> None:
    def row(tokens: float, rate: float, mfu: float, wait: float, memory: float) -> dict[str, Any]:
        return {"tokens": tokens, **dict(zip(TIMED, (rate, mfu, wait, memory), strict=True))}

    rows = [{"tokens": 0.0}, row(100, 10, 0.5, 0.2, 7), row(400, 100, 0.1, 0.0, 9)]  # 10 s, then 3 s
    assert speed(rows) == pytest.approx(
        {"tokens_per_s": 400 / 13, "mfu": 5.3 / 13, "data_wait_share": 2 / 13, "peak_memory_bytes": 9}
    )
    assert speed([{"tokens": 0.0}]) == dict.fromkeys(TIMED)


def test_the_page_at_the_end_stands_alone(tmp_path: Path) -> None:
    loop = tiny_loop(samples=SAMPLES | {"prompts": ["<b>one"]})
    job, decoder = text_job(tmp_path, loop=loop, sampler=remembered)
    at = train(ALONE, decoder, job)
    write_summary(job, decoder, at)
    told = json.loads((job.logs / "summary.json").read_text())
    assert told["padding_share"] == 0.0
    assert told["epochs"]["documents"] > 1
    assert told["bits_per_byte"] == metrics(job)[-1]["bits_per_byte"]
    text = (job.logs / "loss.html").read_text(encoding="utf-8")
    assert not re.search(r"<script|https?://(?!www.w3.org)|<link|<img", text)
    assert text.count("<svg") == 6
    assert "&lt;b&gt;one" in text
    assert "<b>one" not in text
    for word in ("training", "validation", "bits per byte", "tokens/s", "MFU", "waiting for data"):
        assert word in text
    if importlib.util.find_spec("matplotlib"):
        assert (job.logs / "loss.png").read_bytes().startswith(b"\x89PNG")
