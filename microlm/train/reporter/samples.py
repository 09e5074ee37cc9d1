"""What the model writes while it is trained: prompts of the recipe → `samples.jsonl`, a row for each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, Any

from microlm.core import storage
from microlm.core.errors import UserError
from microlm.core.metrics import read_metrics
from microlm.model.transformer import Decoder
from microlm.train.checkpoint import Position
from microlm.train.job import Job

FILE = "samples.jsonl"


class SampleLog:
    """Rows `{step, tokens, prompt, text}`; after a resume those of later steps are dropped."""

    def __init__(self, job: Job, at: Position) -> None:
        self._job, self._at = job, at
        self._file: IO[str] | None = None
        if job.loop.samples.steps and (job.sampler is None or job.tokenizer is None):
            raise UserError(
                f"{job.name}: loop.samples needs somebody who can generate; start it by the microlm command, "
                "or pass sample= to the stage"
            )
        self.reopen()

    def reopen(self) -> None:
        """Keep the rows up to where the run stands."""
        self.close()
        if not self._job.loop.samples.steps:
            return
        path = self._job.logs / FILE
        kept = [row for row in read_metrics(path) if row["step"] <= self._at.step] if self._at.step else []
        with storage.explain_write(path):
            self._file = path.open("w", encoding="utf-8", newline="\n")
            self._write(kept)

    def due(self) -> bool:
        """Whether this step has samples; the last one always has."""
        every, step = self._job.loop.samples.steps, self._at.step
        return bool(every) and step > 0 and (step % every == 0 or step == self._job.loop.steps)

    def add(self, decoder: Decoder) -> None:
        """Let the decoder go on with every prompt."""
        job, at = self._job, self._at
        assert self._file and job.sampler and job.tokenizer
        prompts = job.loop.samples.prompts
        texts = job.sampler(decoder, job.tokenizer, prompts, job.loop.samples.tokens)
        said = zip(prompts, texts, strict=True)
        with storage.explain_write(job.logs / FILE):
            self._write([{"step": at.step, "tokens": at.tokens, "prompt": p, "text": t} for p, t in said])

    def close(self) -> None:
        """Close the file."""
        if self._file:
            self._file.close()
            self._file = None

    def _write(self, rows: list[dict[str, Any]]) -> None:
        assert self._file
        self._file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self._file.flush()


def read_samples(logs: Path) -> list[dict[str, Any]]:
    """The rows of a run's samples; none when it has none."""
    return read_metrics(logs / FILE)
