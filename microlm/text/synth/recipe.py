"""What a synthesis is made of: seeds, templates, an endpoint, how answers are drawn. Wrong words end here."""

from __future__ import annotations

from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from microlm.core.endpoint import root_url
from microlm.core.errors import UserError
from microlm.core.recipe import Recipe, StageRecipe, artifact_input, unkeyed
from microlm.text.synth.check import check_schema
from microlm.text.synth.templates import Syntax, check_template

NAME = r"^[\w-]{1,64}$"  # a task becomes a token set's name, as in sources.is_task


class Result(Recipe):
    """The conversation that is kept, when it is not the prompt and the answer as they are.

    Templates over the seed's fields and `reply`: the parsed JSON under a schema, else the text.
    """

    system: str = Field("", description="system message; empty for none")
    prompt: str = Field(min_length=1, description="what the user says")
    answer: str = Field(min_length=1, description="what the assistant says")


class Template(Recipe):
    """One kind of request. Without `answer` the endpoint is asked."""

    name: str = Field("template", pattern=NAME, description="its name in ids and counts")
    task: str = Field("chat", pattern=NAME, description="what the conversation teaches")
    system: str = Field("", description="system message; empty for none")
    prompt: str = Field(min_length=1, description="what the user says")
    answer: str | None = Field(None, min_length=1, description="the answer; null asks the endpoint")
    json_schema: dict[str, Any] | None = Field(None, description="JSON schema that an answer must fit")
    constrain: bool = Field(
        True, description="send the schema as response_format; false for an endpoint without it"
    )
    result: Result | None = Field(None, description="the conversation kept, if not prompt and answer")
    unique_answers: bool = Field(
        True, description="drop an endpoint's answer that says what an earlier one of this template said"
    )

    @field_validator("json_schema")
    @classmethod
    def _schema(cls, schema: dict[str, Any] | None) -> dict[str, Any] | None:
        if schema is not None:
            check_schema(schema)
        return schema

    @field_validator("task")
    @classmethod
    def _not_documents(cls, task: str) -> str:
        if task == "documents":
            raise ValueError("a task cannot be named like the token set of the documents")
        return task

    @model_validator(mode="after")
    def _answered_once(self) -> Self:
        if self.answer is not None and (self.json_schema is not None or self.result is not None):
            raise ValueError("json_schema and result belong to an endpoint's answer; leave 'answer' out")
        return self

    def texts(self) -> list[str]:
        """Everything in it that is rendered."""
        kept = [self.result.system, self.result.prompt, self.result.answer] if self.result else []
        return [self.system, self.prompt, self.answer or "", *kept]


class Prompts(Recipe):
    """The seeds are conversations, pairs or extraction records: the endpoint answers them anew."""

    tasks: tuple[str, ...] = Field((), description="tasks of the conversations that are asked; empty: all")
    system: str = Field("", description="system message of conversations that have none; empty for none")
    thinking: bool = Field(True, description="keep what the endpoint thought before its answer")


class Endpoint(Recipe):
    """Who answers and how hard it may be asked. Only `model` changes the result."""

    url: str = unkeyed(description="address of an OpenAI-compatible server, with or without /v1")
    model: str | None = Field(None, description="model to ask; null: the first one served")
    api_key_file: str | None = unkeyed(None, description="file with the API key; default MICROLM_API_KEY")
    concurrency: int = unkeyed(8, ge=1, le=100, description="requests under way at once")
    requests_per_minute: float | None = unkeyed(None, gt=0, description="limit; null for none")
    tokens_per_minute: float | None = unkeyed(
        None, gt=0, description="limit of prompt and new tokens together; null for none"
    )
    timeout_s: float = unkeyed(120.0, gt=0, description="limit of each request")
    retries: int = unkeyed(
        8, ge=0, le=100, description="repetitions of a request that met a busy or silent endpoint"
    )
    max_refusals: int = unkeyed(20, ge=1, description="refused requests in a row that stop the run")

    @field_validator("url")
    @classmethod
    def _address(cls, url: str) -> str:
        try:
            root_url(url)
        except UserError as e:
            raise ValueError(str(e)) from None
        if "@" in urlsplit(url).netloc:
            # not a ValueError: that would be told with the value
            raise UserError("endpoint.url: holds a password, which would be recorded; use api_key_file")
        return url


class Draw(Recipe):
    """How an answer is drawn; the seed of each request is derived from the recipe's."""

    samples: int = Field(1, ge=1, le=1000, description="answers to each prompt")
    attempts: int = Field(3, ge=1, le=100, description="times an answer is drawn until it passes the checks")
    max_tokens: int = Field(512, ge=1, description="new tokens of an answer")
    temperature: float = Field(0.7, ge=0, le=2, description="0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus")
    top_k: int = Field(0, ge=0, description="0 for all")
    stop: tuple[str, ...] = Field((), description="texts that end an answer")


class SynthRecipe(StageRecipe):
    """Seeds × templates → conversations, by the templates alone or by an endpoint's answers."""

    seeds: str | None = unkeyed(
        None,
        description="JSONL whose fields fill the templates (also .gz, .zst); with 'data' a file in it",
    )
    data: str | None = artifact_input(None, kinds=("data",), description="artifact that holds the seeds")
    count: int | None = Field(None, ge=1, description="without seeds: so many, each with a 'number' from 0")
    limit: int | None = Field(None, ge=1, description="at most so many conversations are asked for")
    syntax: Syntax = Field("jinja", description="jinja (sandboxed), or slots: {field} and nothing else")
    prompts: Prompts | None = Field(None, description="in place of templates: the seeds are what is asked")
    templates: list[Template] = Field([], max_length=1000, description="kinds of requests")
    each: Literal["all", "one"] = Field("all", description="templates for each seed: all, or one drawn")
    endpoint: Endpoint | None = Field(None, description="who answers templates without an answer")
    draw: Draw = Field(Draw.model_validate({}), description="how answers are drawn")
    licence: str = Field("", description="licence of what is made; default: the seed's own")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.prompts is not None:
            return self._fits_prompts()
        if not self.templates:
            raise ValueError("give 'templates' (kinds of requests), or 'prompts' (the seeds are asked)")
        if (self.seeds is None) == (self.count is None):
            raise ValueError("give either 'seeds' (a JSONL file) or 'count'")
        if self.data is not None and self.seeds is None:
            raise ValueError("'data' needs 'seeds', a file in it such as documents/train.jsonl")
        names = [t.name for t in self.templates]
        if twice := next((n for n in names if names.count(n) > 1), None):
            raise ValueError(f"two templates are named '{twice}'; rename one")
        open_one = next((t.name for t in self.templates if t.answer is None), None)
        if open_one and self.endpoint is None:
            raise ValueError(f"template '{open_one}' has no answer and there is no 'endpoint' to give one")
        for template in self.templates:
            for text in template.texts():
                check_template(text, self.syntax)
        return self

    def _fits_prompts(self) -> Self:
        """What answers to the seeds themselves need."""
        if self.templates or self.count is not None:
            raise ValueError("'prompts' asks what the seeds say; leave 'templates' and 'count' out")
        if self.seeds is None or self.endpoint is None:
            raise ValueError("'prompts' needs 'seeds' (what is asked) and 'endpoint' (who answers)")
        if not self.licence:
            raise ValueError(
                "'prompts' needs 'licence': that under which the endpoint's answers may be learnt from "
                "(unknown, if nobody says)"
            )
        return self
