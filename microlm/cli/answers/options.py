"""How an answer is drawn and what bounds it, as options of several commands. Leaves: a `Sampling`.

A command takes a group of options as one argument: `grouped` makes options of the group's fields.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from microlm.cli.answers.texts import read_text
from microlm.core.errors import UserError
from microlm.core.payload import constraint_of
from microlm.core.records import Constraint, Sampling

Option = typer.Option
AsJson = Annotated[bool, Option("--json", help="print one JSON object on stdout")]
Base = Annotated[bool, Option("--base", help="of a run, take the pretrained model")]


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """A command for typer; an argument whose type is a dataclass is made of its fields, as options."""
    signature = inspect.signature(command, eval_str=True)
    groups: dict[str, Any] = {}
    for name, parameter in signature.parameters.items():
        if is_dataclass(parameter.annotation):
            groups[name] = parameter.annotation

    def run(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{f.name: given.pop(f.name) for f in fields(group)})
        command(**given)

    flat: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        if name in groups:
            hints = get_type_hints(groups[name], include_extras=True)
            for f in fields(groups[name]):
                flat.append(
                    inspect.Parameter(
                        f.name, parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name]
                    )
                )
        else:
            flat.append(parameter.replace(kind=parameter.KEYWORD_ONLY))
    functools.update_wrapper(run, command)
    run.__signature__ = signature.replace(parameters=flat)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in flat}
    return run


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are drawn."""

    max_new_tokens: Annotated[
        int | None, Option("--max-new-tokens", help="new tokens at most; default: 128, in a chat 256")
    ] = None
    temperature: Annotated[
        float, Option("--temperature", help="0 takes the likeliest token, 1 draws by the model's odds")
    ] = 0.0
    top_p: Annotated[float, Option("--top-p", help="draw from the likeliest tokens of this total mass")] = 1.0
    top_k: Annotated[int, Option("--top-k", help="draw from the k likeliest tokens; 0: from all")] = 0
    min_p: Annotated[
        float, Option("--min-p", help="leave out tokens less likely than this share of the likeliest one")
    ] = 0.0
    repetition_penalty: Annotated[
        float, Option("--repetition-penalty", help="above 1, tokens of prompt and answer become less likely")
    ] = 1.0
    presence_penalty: Annotated[
        float, Option("--presence-penalty", help="taken off the score of tokens that the answer holds")
    ] = 0.0
    frequency_penalty: Annotated[
        float,
        Option("--frequency-penalty", help="taken off a token's score for each time the answer holds it"),
    ] = 0.0
    logit_bias: Annotated[
        list[str] | None, Option("--logit-bias", metavar="ID=V", help="add V to a token's score; repeatable")
    ] = None
    seed: Annotated[int | None, Option("--seed", help="makes random draws repeatable")] = None
    stop: Annotated[
        list[str] | None, Option("--stop", help="end before this text (\\n is a line end); repeatable")
    ] = None
    ignore_eos: Annotated[bool, Option("--ignore-eos", help="go on after the token that ends answers")] = (
        False
    )

    def sampling(self, max_tokens: int, constraint: Constraint | None, **more: Any) -> Sampling:
        """The settings; `max_tokens` where the user gave none. `more` are fields of `Sampling`."""
        return Sampling(
            max_tokens=max_tokens if self.max_new_tokens is None else self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=tuple(map(_bias, self.logit_bias or ())),
            seed=self.seed,
            stop=tuple(text.replace("\\n", "\n") for text in self.stop or ()),
            ignore_eos=self.ignore_eos,
            constraint=constraint,
            **more,
        )


@dataclass(frozen=True)
class ConstraintOptions:
    """What the answer must be; at most one of them, and `--copy-from` beside it or alone."""

    json_object: Annotated[bool, Option("--json-object", help="the answer is a JSON object")] = False
    json_schema: Annotated[
        Path | None, Option("--json-schema", metavar="F", help="file with a JSON schema that the answer fits")
    ] = None
    regex: Annotated[str | None, Option("--regex", help="the whole answer matches this pattern")] = None
    choice: Annotated[
        list[str] | None, Option("--choice", metavar="TEXT", help="the answer is one of these; repeatable")
    ] = None
    grammar: Annotated[
        Path | None, Option("--grammar", metavar="F.lark", help="file with a grammar in the Lark form")
    ] = None
    copy_from: Annotated[
        Path | None,
        Option("--copy-from", metavar="F", help="free texts of the answer are parts of this file"),
    ] = None

    copy_words: Annotated[
        bool, Option("--copy-words", help="beside --copy-from: a copy begins and ends where words do")
    ] = False

    def constraint(self) -> Constraint | None:
        """The constraint; None where the answer is free."""
        return constraint_of(
            json_schema=read_text(self.json_schema) if self.json_schema else None,
            json_object=self.json_object,
            regex=self.regex,
            choice=self.choice,
            grammar=read_text(self.grammar) if self.grammar else None,
            copy_from=read_text(self.copy_from) if self.copy_from else None,
            copy_words=self.copy_words,
        )


def _bias(word: str) -> tuple[int, float]:
    token, _, value = word.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise UserError(f"--logit-bias {word}: expected ID=VALUE, for example 42=-100") from None
