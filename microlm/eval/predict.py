"""Stage `predict`: a model answers the held-out tasks.

Enters: model and data. Leaves: predictions.jsonl, documents.jsonl. Nothing is judged
here: `score` does that, without a model, as often as one likes.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Literal, TypeVar, get_args

from pydantic import Field

from microlm.core import runtime
from microlm.core.artifact import Artifact, Workspace, stage
from microlm.core.metrics import Progress
from microlm.core.recipe import Recipe, StageRecipe, artifact_input
from microlm.core.records import (
    Completion,
    Constraint,
    Conversation,
    Document,
    Extraction,
    Message,
    Prediction,
    Question,
    Sampling,
)
from microlm.core.records import to_json as record_json
from microlm.eval.predictor import EnginePredictor, Item, Predictor
from microlm.text import extraction
from microlm.text.read import read_records

PREDICTIONS, DOCUMENTS = "predictions.jsonl", "documents.jsonl"
Task = Literal["question", "extraction", "extraction_constrained", "chat", "bits_per_byte"]
T = TypeVar("T")
Named = TypeVar("Named", Question, Extraction)


class Limits(Recipe):
    """How many items of each kind are asked; null asks all. Fewer are drawn by the seed."""

    questions: int | None = Field(default=300, ge=1, description="questions of each kind and language")
    extraction: int | None = Field(
        default=300, ge=1, description="extraction records of each kind and language"
    )
    chats: int | None = Field(default=200, ge=1, description="chat prompts of the EOS check")
    documents: int | None = Field(default=200, ge=1, description="documents for bits per byte")


class MaxTokens(Recipe):
    """The token cap of an answer."""

    question: int = Field(default=48, ge=1, description="new tokens of an answer to a question")
    extraction: int = Field(default=256, ge=1, description="new tokens of an extraction")
    chat: int = Field(default=256, ge=1, description="new tokens of a chat reply")


class PredictRecipe(StageRecipe):
    """Ask one model everything that is held out."""

    model: str = artifact_input(kinds=("model",), description="model artifact to ask")
    data: str = artifact_input(kinds=("data",), description="data artifact with the held-out tasks")
    tasks: tuple[Task, ...] = Field(default=get_args(Task), description="what is asked")
    limits: Limits = Field(default=Limits(), description="how many items")
    max_tokens: MaxTokens = Field(default=MaxTokens(), description="token caps")
    chat_temperature: float = Field(default=0.7, ge=0, le=2, description="sampling temperature of chats")
    chat_top_p: float = Field(default=0.9, gt=0, le=1, description="nucleus of chats")
    batch_rows: int = Field(default=64, ge=1, le=1024, description="sequences answered at once")
    dtype: runtime.Dtype = Field(default="float32", description="precision of the engine")
    copied: bool = Field(
        default=False,
        description="in constrained extraction, heads and tails must be found in the text, letter by letter",
    )


@stage("predict", kind="predictions", version=4)
def run(recipe: PredictRecipe, work: Workspace) -> None:
    """Load the model once, ask task by task, write rows sorted by task and id."""
    predictor = EnginePredictor(work.inputs["model"].path, dtype=recipe.dtype, batch_rows=recipe.batch_rows)
    rows: list[Prediction] = []
    for task in recipe.tasks:
        if task != "bits_per_byte" and (items := items_of(recipe, work.inputs["data"], task)):
            rows += _answer(predictor, task, items, work)
    work.write_jsonl(PREDICTIONS, [record_json(r) for r in sorted(rows, key=lambda r: (r.task, r.id))])
    if "bits_per_byte" in recipe.tasks:
        _measure_documents(predictor, recipe, work)
    work.metrics["peak_rss_bytes"] = runtime.peak_rss_bytes()


def items_of(recipe: PredictRecipe, data: Artifact, task: Task) -> list[Item]:
    """What is asked in a task, in a stable order."""
    limits, caps = recipe.limits, recipe.max_tokens
    if task == "question":
        questions = read_records(data.file("questions/test.jsonl"), Question)
        sampling = Sampling(max_tokens=caps.question)
        chosen = _pick(named(questions).items(), limits.questions, recipe.seed, _group)
        return [Item(name, task, (Message("user", q.question),), sampling) for name, q in chosen]
    if task == "chat":
        chats = read_records(data.file("chats/test.jsonl"), Conversation)
        return [
            Item(f"chat-{i:05d}", task, chat.messages, _chat_sampling(recipe, i), chat.tools)
            for i, chat in _pick(enumerate(chats), limits.chats, recipe.seed, lambda _: "chat")
        ]
    records = read_records(data.file("extraction/test.jsonl"), Extraction)
    picked = _pick(named(records).items(), limits.extraction, recipe.seed, _group)
    items = [_extraction_item(name, r, task, caps.extraction) for name, r in picked]
    if task != "extraction_constrained":
        return items
    bounds = answer_bounds(data)
    return [_bound(item, r, bounds, recipe.copied) for item, (_, r) in zip(items, picked, strict=True)]


def answer_bounds(data: Artifact) -> extraction.Bounds:
    """Of the schema of an answer, learnt from the training split: what is held out does not shape it."""
    return extraction.Bounds().widened(read_records(data.file("extraction/train.jsonl"), Extraction))


def named(records: Iterable[Named]) -> dict[str, Named]:
    """Records by id; a second record of the same id (users' data) is `id#2`."""
    found: dict[str, Named] = {}
    seen: Counter[str] = Counter()
    for record in records:
        seen[record.id] += 1
        found[record.id if seen[record.id] == 1 else f"{record.id}#{seen[record.id]}"] = record
    return found


def _group(pair: tuple[str, Question | Extraction]) -> tuple[str, str]:
    return pair[1].kind, pair[1].lang


def _chat_sampling(recipe: PredictRecipe, number: int) -> Sampling:
    return Sampling(
        max_tokens=recipe.max_tokens.chat,
        temperature=recipe.chat_temperature,
        top_p=recipe.chat_top_p,
        seed=runtime.derive_seed(recipe.seed, "chat", number),
    )


def _extraction_item(name: str, record: Extraction, task: Task, max_tokens: int) -> Item:
    message = Message("user", extraction.prompt(record.text, record.allowed, record.lang))
    return Item(name, task, (message,), Sampling(max_tokens=max_tokens))


def _bound(item: Item, record: Extraction, bounds: extraction.Bounds, copied: bool) -> Item:
    """The item with an answer of the schema, all its heads and tails out of the text if `copied`."""
    schema = json.dumps(extraction.json_schema(record.allowed, bounds, copied), ensure_ascii=False)
    constraint = Constraint("json_schema", schema, record.text if copied else None)
    return replace(item, sampling=replace(item.sampling, constraint=constraint))


def _pick(records: Iterable[T], limit: int | None, seed: int, group: Callable[[T], object]) -> list[T]:
    """At most `limit` records of each group, drawn by the seed, in their first order."""
    groups: dict[object, list[tuple[int, T]]] = {}
    for i, record in enumerate(records):
        groups.setdefault(group(record), []).append((i, record))
    kept: list[tuple[int, T]] = []
    for name, members in groups.items():
        rng = runtime.rng(seed, "predict", name)
        kept += members if limit is None or len(members) <= limit else rng.sample(members, limit)
    return [record for _, record in sorted(kept, key=lambda pair: pair[0])]


def _answer(predictor: Predictor, task: Task, items: Sequence[Item], work: Workspace) -> list[Prediction]:
    started = time.monotonic()
    with Progress(f"predict {task}", len(items), "answers") as bar:
        completions = predictor.predict(items, bar.update)
    seconds = time.monotonic() - started
    tokens = sum(len(c.token_ids) for c in completions)
    work.metrics[task] = {"items": len(items), "tokens": tokens, "seconds": seconds}
    return [prediction(item, c) for item, c in zip(items, completions, strict=True)]


def prediction(item: Item, completion: Completion) -> Prediction:
    """A row: the last message asked, the raw answer, and what it cost."""
    asked = item.prompt if isinstance(item.prompt, str) else item.prompt[-1].content
    tokens = len(completion.token_ids)
    extra: dict[str, object] = {"prompt_tokens": completion.prompt_tokens, "tokens": tokens}
    if not isinstance(item.prompt, str) and len(item.prompt) > 1:
        extra["before"] = [record_json(m) for m in item.prompt[:-1]]
    if completion.error:
        extra["error"] = completion.error
    return Prediction(item.id, item.task, asked, completion.text, completion.finish_reason, extra)


def _measure_documents(predictor: Predictor, recipe: PredictRecipe, work: Workspace) -> None:
    """Bits and bytes of held-out documents; sums, so that a score can weigh them as it likes."""
    documents = read_records(work.inputs["data"].file("documents/test.jsonl"), Document)
    chosen = _pick(enumerate(documents), recipe.limits.documents, recipe.seed, lambda _: "documents")
    with Progress("predict bits_per_byte", len(chosen), "documents") as bar:
        measured = predictor.bits([d.text for _, d in chosen], bar.update)
    if measured is not None:
        rows = [
            {
                "id": f"document-{i:05d}", "source": d.source.partition(":")[0],
                "bits": round(m.bits, 4), "bytes": m.bytes, "tokens": m.tokens,
            }
            for (i, d), m in zip(chosen, measured, strict=True)
        ]  # fmt: skip
        work.write_jsonl(DOCUMENTS, rows)
