"""Templates: sandboxed Jinja, or plain `{field}` slots. Enters: a text and a seed's fields; leaves: a text.

What cannot be rendered is a `Fault` with its reason.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import jinja2
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from microlm.text.read import Fault

Syntax = Literal["jinja", "slots"]
MAX_CHARS = 1_000_000
T = TypeVar("T")
_SLOT = re.compile(r"\{\{([^\W\d]\w*)\}\}|\{([^\W\d]\w*)\}")
_QUOTED = re.compile(r"'([^']*)'")
_DICE = "_dice"


class Renderer:
    """Renders texts of one syntax. Equal dice give equal texts: `| random` draws from them alone."""

    def __init__(self, syntax: Syntax) -> None:
        self._syntax = syntax
        self._environment = _environment()
        self._known: dict[str, jinja2.Template] = {}

    def render(self, text: str, fields: Mapping[str, Any], dice: random.Random) -> str:
        """The text with its fields filled in, without blanks around it; raises Fault."""
        made = _fill(text, fields) if self._syntax == "slots" else self._jinja(text, fields, dice)
        if len(made) > MAX_CHARS:
            raise Fault("too_long", f"the rendered text has {len(made)} characters, at most {MAX_CHARS}")
        return require_utf8(made.strip())

    def _jinja(self, text: str, fields: Mapping[str, Any], dice: random.Random) -> str:
        if text not in self._known:
            self._known[text] = self._environment.from_string(text)
        try:
            return self._known[text].render({**fields, "record": fields, _DICE: dice})
        except jinja2.UndefinedError as e:
            names = _QUOTED.findall(str(e))
            raise Fault(f"missing_field:{names[-1][:40] if names else '?'}", str(e)) from None
        except Exception as e:  # an expression of the user's can raise anything
            raise Fault("template_error", f"{type(e).__name__}: {e}") from None


def check_template(text: str, syntax: Syntax) -> None:
    """ValueError when a template cannot be parsed."""
    if syntax == "jinja":
        try:
            _environment().from_string(text)
        except jinja2.TemplateError as e:
            line = getattr(e, "lineno", 1)
            raise ValueError(f"not a Jinja template (line {line}: {e.message})") from None


def require_utf8(text: str) -> str:
    """The text, or a Fault when half a surrogate pair is in it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Fault("lone_surrogate", "the text holds half a surrogate pair") from None
    return text


def _fill(text: str, fields: Mapping[str, Any]) -> str:
    def value(match: re.Match[str]) -> str:
        if match[1]:
            return "{" + match[1] + "}"
        if match[2] not in fields:
            raise Fault(f"missing_field:{match[2][:40]}", f"the seed has no field '{match[2]}'")
        return _plain(fields[match[2]])

    return _SLOT.sub(value, text)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else _dumps(value)


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


@jinja2.pass_context
def _draw(context: Context, values: Sequence[T]) -> T:
    dice: random.Random = context[_DICE]
    return dice.choice(values)


def _environment() -> ImmutableSandboxedEnvironment:
    """A sandbox without Jinja's own random numbers, and with JSON as people write it."""
    made = ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, autoescape=False, trim_blocks=True, lstrip_blocks=True
    )
    made.filters["random"] = _draw
    made.filters["tojson"] = _dumps
    made.globals.pop("lipsum", None)
    return made
