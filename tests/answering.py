"""A tiny model that answers prompts and is trained on its answers: for tests of the stage `grpo`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from artifacts import sign
from tiny_model import write_tiny_model
from training import make_job

from microlm.cli.training.rollouts import open_rollout
from microlm.core.artifact import Artifact, Workspace
from microlm.core.recipe import build
from microlm.core.records import Completion, Conversation, Message
from microlm.model import directory
from microlm.model.transformer import Decoder
from microlm.text.tokenizer import Tokenizer
from microlm.train.batches.answers import Judge, Respondent, Rollout
from microlm.train.batches.prompts import Prompt, make_prompts
from microlm.train.batches.rollouts import RolloutRows
from microlm.train.job import Job
from microlm.train.loop import train
from microlm.train.objectives import policy
from microlm.train.optim import OptimRecipe
from microlm.train.ranks import Ranks
from microlm.train.tuning.grpo import GrpoRecipe
from microlm.train.tuning.scorers import drawing_scorers, start_scorer

CONTEXT = 64
ONE = {"processes": 1, "threads": 1}
RATES = {"matrices": "adamw", "matrix_lr": 0.01, "embedding_lr": 0.01, "head_lr": 0.01, "warmup_steps": 1}


def chat(*contents: str, task: str = "chat") -> Conversation:
    """User and assistant by turns."""
    return Conversation(
        tuple(Message("assistant" if i % 2 else "user", c) for i, c in enumerate(contents)), task
    )


CHATS = [chat(f"say {word}", word) for word in ("aaa", "bb", "cab", "dd", "edge")]


def wanted_share(prompt: Prompt, answer: Completion) -> float:
    """The share of the answer that is the letter a."""
    return answer.text.count("a") / max(1, len(answer.text))


def recipe(**fields: Any) -> GrpoRecipe:
    """A few short answers a step, in float32, not compiled."""
    values: dict[str, Any] = {
        "out": "-", "model": "-", "data": "-", "rewards": {"length": 1.0}, "steps": 4, "optim": RATES,
        "parallel": ONE,
        "answers": {"prompts": 3, "group": 4, "max_tokens": 6} | fields.pop("answers", {}),
        "loop": {
            "context": CONTEXT, "micro_rows": 2, "dtype": "float32", "compile": False, "log_steps": 1,
            "checkpoint_steps": 2, "validation_steps": 2,
        } | fields.pop("loop", {}),
    }  # fmt: skip
    return build(GrpoRecipe, values | fields, "grpo")


def make_rows(
    model: Path, decoder: Decoder, asked: GrpoRecipe, ranks: Ranks, rollout: Rollout | None = None
) -> RolloutRows:
    """Rows of the decoder's own answers, judged by `wanted_share`."""
    how = asked.answers
    prompts = make_prompts(CHATS, (), Tokenizer.load(model), CONTEXT - how.max_tokens)
    answering = rollout or open_rollout(model, decoder, asked)
    respondent = Respondent(answering, {"share": Judge(1.0, wanted_share)}, ranks, how.max_tokens)
    scorers = dict(drawing_scorers(decoder, asked.sized, ranks, how.temperature)) if how.updates > 1 else {}
    if asked.kl_weight:
        scorers["reference"] = start_scorer(decoder, model, asked.sized, how.temperature)(ranks)
    return RolloutRows(prompts, respondent, how, CONTEXT, asked.loop.micro_rows, asked.seed, scorers)


def answering_job(
    folder: Path, model: Path, asked: GrpoRecipe, ranks: Ranks, rollout: Rollout | None = None
) -> tuple[Decoder, Job]:
    """A decoder and the job that trains it on its answers."""
    decoder = directory.load(model, asked.loop.compute_dtype())
    rows = make_rows(model, decoder, asked, ranks, rollout)
    learnt = policy.Policy(asked.clip, asked.kl_weight, asked.answers.temperature)
    objective = policy.make(learnt, rows.figures)
    rates = OptimRecipe(**RATES)
    job = make_job(folder, asked.sized, optim=rates, objective=objective, train=rows, validation=None)
    return decoder, job


def answer_on_rank(ranks: Ranks, folder: Path, model: Path, fields: dict[str, Any]) -> None:
    """Train on every rank; rank 0 saves the weights."""
    decoder, job = answering_job(folder, model, recipe(**fields), ranks)
    train(ranks, decoder, job)
    if ranks.rank == 0:
        directory.save(decoder, folder)


def write_artifacts(folder: Path) -> tuple[Artifact, Artifact]:
    """A signed model, and the conversations that it is asked."""
    model = sign(folder / "model", "model", lambda work: _move(write_tiny_model(folder / "plain"), work))

    def talks(work: Workspace) -> None:
        lines = [{"messages": [{"role": m.role, "content": m.content} for m in c.messages]} for c in CHATS]
        work.write_jsonl("conversations/train.jsonl", lines)
        work.write_jsonl("conversations/validation.jsonl", lines[:2])

    return model, sign(folder / "data", "data", talks)


def _move(source: Path, work: Workspace) -> None:
    for file in source.iterdir():
        file.rename(work.path / file.name)
