"""What the model writes while it is trained: prompts of the recipe → `samples.jsonl`, a row for each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from microlm.core import storage
from microlm.core.errors import UserError
from microlm.core.metrics import read_metrics
from microlm.model.transformer import Decoder
from microlm.text.tokenizer import Tokenizer
from microlm.train.checkpoint import Position
from microlm.train.job import Job

FILE = "samples.jsonl"


class SampleLog:
    """Rows `{step, tokens, prompt, text}`; after a resume those of later steps are dropped."""

    def __init__(self, job: Job, at: Position, decoder: Decoder) -> None:
        self._job, self._at, self._decoder = job, at, decoder
        self._file: IO[str] | None = None
        self._written = -1  # the step of the last rows
        if job.loop.samples.steps:
            self._require_writer()
        self.reopen()

    def _require_writer(self) -> None:
        job, window = self._job, self._decoder.config.max_position_embeddings
        if job.sampler is None or job.tokenizer is None:
            raise UserError(
                f"{job.name}: loop.samples needs somebody who can generate; start it by the microlm command, "
                "or pass sample= to the stage"
            )
        tokenizer = Tokenizer.load(job.tokenizer)
        for number, prompt in enumerate(job.loop.samples.prompts, 1):
            if (size := len(tokenizer.encode(prompt))) >= window:
                raise UserError(
                    f"{job.name}: prompt {number} of loop.samples has {size} tokens, but the model has "
                    f"{window} positions and must write at least one more; shorten it"
                )

    def reopen(self) -> None:
        """Keep the rows up to where the run stands."""
        self.close()
        samples, at = self._job.loop.samples, self._at
        if not samples.steps:
            return
        path = self._job.logs / FILE
        kept = [row for row in read_metrics(path) if row["step"] <= at.step] if at.step else []
        here = [row for row in kept if row["step"] == at.step]
        self._written = at.step if len(here) == len(samples.prompts) else -1
        if self._written < 0:
            kept = [row for row in kept if row["step"] < at.step]
        storage.write_atomic(path, "".join(map(_line, kept)).encode())
        with storage.explain_write(path):
            self._file = path.open("a", encoding="utf-8", newline="\n")

    def due(self) -> bool:
        """Whether this step has samples that are not there yet; the last one always has."""
        every, step = self._job.loop.samples.steps, self._at.step
        if not every or step in (0, self._written):
            return False
        return step % every == 0 or step == self._job.loop.steps

    def add(self, check: Callable[[], None]) -> None:
        """Let the decoder go on with every prompt; `check` is called between tokens and may raise."""
        job, at = self._job, self._at
        assert self._file and job.sampler and job.tokenizer
        prompts, tokens = job.loop.samples.prompts, job.loop.samples.tokens
        texts = job.sampler(self._decoder, job.tokenizer, prompts, tokens, check)
        rows = [
            {"step": at.step, "tokens": at.tokens, "prompt": p, "text": t}
            for p, t in zip(prompts, texts, strict=True)
        ]
        with storage.explain_write(job.logs / FILE):
            self._file.writelines(map(_line, rows))
            self._file.flush()
        self._written = at.step

    def close(self) -> None:
        """Close the file."""
        if self._file:
            self._file.close()
            self._file = None


def read_samples(logs: Path) -> list[dict[str, Any]]:
    """The rows of a run's samples; none when it has none."""
    return read_metrics(logs / FILE)


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
