"""Stage `grpo`: prompts, the model's own answers, checkable rewards → a better model, or an adapter.

Group-relative policy optimisation (2402.03300). Who answers (the engine) and who judges come from above.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from microlm.core import runtime
from microlm.core.artifact import Workspace, stage
from microlm.core.errors import UserError
from microlm.core.manifest import Artifact, hash_file
from microlm.core.recipe import StageRecipe, artifact_input, unkeyed
from microlm.core.records import Conversation
from microlm.model import directory
from microlm.model.config import ModelConfig
from microlm.model.transformer import Decoder
from microlm.text.read import read_records
from microlm.text.tokenizer import Tokenizer
from microlm.train import memory
from microlm.train.batches.answers import Judge, Respondent, Reward, Rollout
from microlm.train.batches.order import Order
from microlm.train.batches.prompts import CanJudge, Prompts, make_prompts
from microlm.train.batches.rollouts import AnswersRecipe, HeldOutAnswers, RolloutRows
from microlm.train.job import Job, LoopRecipe, Sampler, fingerprint
from microlm.train.loop import require_room
from microlm.train.objectives import policy
from microlm.train.optim import OptimRecipe
from microlm.train.pretrain import TOKENIZER, finish
from microlm.train.ranks import Ranks, launch, processes, warn_idle
from microlm.train.tuning import lora_recipe
from microlm.train.tuning.leaving import kind_of, train_and_leave, weights_saver
from microlm.train.tuning.lora_recipe import LoraRecipe
from microlm.train.tuning.scorers import drawing_scorers, start_scorer

RewardName = Literal["extraction", "json", "arithmetic", "ended", "length"]
RATES = OptimRecipe(
    matrices="adamw", matrix_lr=2e-4, embedding_lr=2e-4, head_lr=2e-4, adapter_lr=5e-4, warmup_steps=10,
    schedule="constant", adam_beta1=0.9,
)  # fmt: skip


class GrpoRecipe(StageRecipe):
    """Train a model on its own answers."""

    model: str = artifact_input(kinds=("model",), description="model artifact to start from")
    data: str = artifact_input(kinds=("data",), description="data artifact; its conversations are asked")
    tasks: tuple[str, ...] = Field(default=(), description="tasks of the conversations; empty: all")
    rewards: dict[RewardName, float] = Field(
        description="what is judged → its weight: extraction, json, arithmetic, ended, length"
    )
    json_schema: str | None = unkeyed(None, description="file with the schema that json asks for")
    steps: int = Field(default=200, ge=1, description="optimizer steps")
    answers: AnswersRecipe = Field(default=AnswersRecipe(), description="how many, how they are drawn")
    clip: float = Field(default=0.2, gt=0, lt=1, description="how far a step may move a token's probability")
    kl_weight: float = Field(
        default=0.0, ge=0, description="cost of the KL divergence from the start; 0: none is computed"
    )
    validation_prompts: int = unkeyed(
        64, ge=0, description="prompts of the validation split that are answered greedily"
    )
    lora: LoraRecipe | None = Field(
        default=None, description="train an adapter of this shape; none: all weights"
    )
    loop: LoopRecipe = Field(default=LoopRecipe(), description="length, batch, precision")
    optim: OptimRecipe = Field(default=RATES, description="rates and schedule")

    @field_validator("rewards")
    @classmethod
    def _counts(cls, value: dict[str, float]) -> dict[str, float]:
        if not any(weight > 0 for weight in value.values()):
            raise ValueError("none has a weight above 0; name at least one, for example extraction: 1")
        return value

    @model_validator(mode="after")
    def _sized_by_answers(self) -> GrpoRecipe:
        for name in ("tokens", "batch_rows"):
            if name in self.loop.model_fields_set:
                raise ValueError(
                    f"loop.{name} follows from the answers here; set steps, answers.prompts and answers.group"
                )
        if not self.loop.document_mask:
            raise ValueError(
                "loop.document_mask must be true: answers that share a row must not see each other"
            )
        if self.lora and self.lora.dropout:
            raise ValueError("lora.dropout must be 0: answers are drawn without it")
        if self.answers.max_tokens >= self.loop.context:
            raise ValueError(
                f"answers.max_tokens {self.answers.max_tokens} leaves no room for a prompt in loop.context "
                f"{self.loop.context}"
            )
        return self

    @property
    def sized(self) -> LoopRecipe:
        """The loop with its length: a step has at most as many rows as answers."""
        rows = self.answers.prompts * self.answers.group
        size = {"batch_rows": rows, "tokens": self.steps * rows * self.loop.context}
        return self.loop.model_copy(update=size)


def reference_of(recipe: GrpoRecipe, config: ModelConfig) -> ModelConfig | None:
    """The frozen start that the KL divergence needs; under an adapter the base is there already."""
    return config if recipe.kl_weight and recipe.lora is None else None


def answering_bytes(recipe: GrpoRecipe, config: ModelConfig) -> int:
    """The engine's own weights, and pages for `answers.rows` whole rows."""
    how, auto = recipe.answers, recipe.loop.compute_dtype().itemsize
    item = {"float32": 4, "bfloat16": 2, "int8": 1}.get(how.precision, auto)
    page_item = auto if how.precision == "int8" else item  # quantized weights leave the cache as it is
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return config.parameters * item + how.rows * recipe.loop.context * token * page_item


OpenRollout = Callable[[Path, Decoder, GrpoRecipe], Rollout]
"""`(tokenizer's directory, live decoder, recipe) → who answers by its weights of now`; the engine's."""
FindReward = Callable[[str, GrpoRecipe], tuple[Reward, CanJudge]]
"""A reward by name, and which gold answers it can judge by; the evaluation room's."""


@dataclass(frozen=True)
class Tools:
    """What the stage is given by rooms that it may not import."""

    rollout: OpenRollout
    reward: FindReward
    sample: Sampler | None = None


def _schema(recipe: GrpoRecipe) -> Mapping[str, Any]:
    """The user's file that the result depends on."""
    if recipe.json_schema is None:
        return {}
    if not Path(recipe.json_schema).is_file():
        raise UserError(f"json_schema: {recipe.json_schema} is no file; check the path")
    return {"json_schema": hash_file(Path(recipe.json_schema))}


VERSION = 1


@stage("grpo", kind_of, VERSION, fingerprint=_schema)
def run(
    recipe: GrpoRecipe,
    work: Workspace,
    rollout: OpenRollout | None = None,
    reward: FindReward | None = None,
    sample: Sampler | None = None,
) -> None:
    """Load the model, let it answer and learn on every rank, save weights or adapter with its tokenizer."""
    if rollout is None or reward is None:
        raise UserError(
            "grpo: needs somebody who answers and who judges; start it by the microlm command, or pass "
            "rollout= and reward= to the stage"
        )
    model, data = work.inputs["model"], work.inputs["data"]
    loop = recipe.sized
    sized = recipe.model_copy(update={"loop": loop})
    config, adapter = directory.read_config(model.path), recipe.lora.config() if recipe.lora else None
    require_room(config, "grpo", loop.context)
    memory.check(config, sized, adapter, reference_of(recipe, config), answering_bytes(recipe, config))
    work.processes = processes(recipe.parallel)
    warn_idle("grpo", recipe.parallel, loop.batch_rows, loop.micro_rows)
    made_for = fingerprint(f"grpo {VERSION}", recipe, work.inputs, model.file(TOKENIZER)) | dict(
        _schema(recipe)
    )
    tools = Tools(rollout, reward, sample)
    if launch(recipe.parallel, _rank, recipe, model, data, work.path, made_for, tools):
        finish(work, model.path)


def _rank(
    ranks: Ranks,
    recipe: GrpoRecipe,
    model: Artifact,
    data: Artifact,
    out: Path,
    made_for: Mapping[str, Any],
    tools: Tools,
) -> None:
    decoder, job = prepare(recipe, model, data, out, ranks, tools)
    job.fingerprint = made_for
    train_and_leave(ranks, decoder, job)


def prepare(
    recipe: GrpoRecipe, model: Artifact, data: Artifact, out: Path, ranks: Ranks, tools: Tools
) -> tuple[Decoder, Job]:
    """The decoder as training begins, and the job that binds it to prompts, judges and the folder `out`."""
    runtime.set_seed(recipe.seed)
    decoder = lora_recipe.load(model.path, recipe.loop.compute_dtype(), recipe.lora, recipe.seed)
    decoder.to(runtime.device())
    rows, held_out = _rows(recipe, decoder, model, data, ranks, tools)
    loop = recipe.sized
    if held_out:
        asked = len(held_out.prompts.asked)
        loop = loop.model_copy(update={"validation_rows": -(-asked // loop.micro_rows) * loop.micro_rows})
    learnt = policy.Policy(recipe.clip, recipe.kl_weight, recipe.answers.temperature)
    objective = policy.make(learnt, rows.figures)
    job = Job(loop, recipe.optim, objective, rows, held_out, out, "grpo", sampler=tools.sample)
    job.tokenizer, job.save_weights = model.path, weights_saver(recipe, model)
    return decoder, job


def _rows(
    recipe: GrpoRecipe, decoder: Decoder, model: Artifact, data: Artifact, ranks: Ranks, tools: Tools
) -> tuple[RolloutRows, HeldOutAnswers | None]:
    """Rows of training, and of validation where there are prompts for it; rank 0 alone answers those."""
    loop, how, seed = recipe.sized, recipe.answers, recipe.seed
    longest = loop.context - how.max_tokens
    tokenizer = Tokenizer.load(model.path)
    chats = read_records(data.file("conversations/train.jsonl"), Conversation)
    judges: dict[str, Judge] = {
        n: Judge(weight, *tools.reward(n, recipe)) for n, weight in sorted(recipe.rewards.items())
    }
    can_judge = _judged_by_one(judges)
    asked = make_prompts(chats, recipe.tasks, tokenizer, longest, can_judge)
    respondent = Respondent(tools.rollout(model.path, decoder, recipe), judges, ranks, how.max_tokens)
    drawn = drawing_scorers(decoder, loop, ranks, how.temperature) if how.updates > 1 else {}
    start = start_scorer(decoder, model.path, loop, how.temperature) if recipe.kl_weight else None
    scorers = {**drawn, "reference": start(ranks)} if start else drawn
    rows = RolloutRows(asked, respondent, how, loop.context, loop.micro_rows, seed, scorers)
    chosen = None if ranks.rank else _held_out_prompts(recipe, data, tokenizer, longest, can_judge)
    if chosen is None:
        return rows, None
    alone = Ranks(0, 1)
    scorers = {"reference": start(alone)} if start else {}
    return rows, HeldOutAnswers(
        chosen, replace(respondent, ranks=alone), how, loop.context, loop.micro_rows, seed, scorers
    )


def _judged_by_one(judges: Mapping[str, Judge]) -> CanJudge:
    """Whether one of the rewards that are trained on can judge by a gold answer."""
    return lambda gold: any(judge.can_judge(gold) for judge in judges.values() if judge.weight)


def _held_out_prompts(
    recipe: GrpoRecipe, data: Artifact, tokenizer: Tokenizer, longest: int, can_judge: CanJudge
) -> Prompts | None:
    """Some prompts of the validation split, always the same; None when none can be asked."""
    file, most = data.path / "conversations/validation.jsonl", recipe.validation_prompts
    if not most or not file.exists():
        return None
    chats = [c for c in read_records(file, Conversation) if not recipe.tasks or c.task in recipe.tasks]
    order = Order(len(chats), runtime.derive_seed(recipe.seed, "validation prompts"))
    chosen = [chats[i] for i in order.take(0, len(chats)).tolist()]
    try:
        return make_prompts(chosen, (), tokenizer, longest, can_judge, most)
    except UserError as e:
        warnings.warn(f"grpo: nothing is validated: validation split: {e}", stacklevel=2)
        return None
