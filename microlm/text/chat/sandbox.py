"""Jinja of strangers: the environment of transformers in a sandbox, with a budget for time and memory.

Enters: a template's text and variables. Leaves: the rendered text and the places of `{% generation %}` in it,
or a `TemplateFault` with the line.
"""

from __future__ import annotations

import datetime
import json
import re
import threading
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import wraps
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

TODAY = datetime.date(2024, 7, 26)
"""The day of every rendering, so that equal conversations are equal tokens (Llama 3 falls back to it too)."""
MAX_SOURCE = 1_000_000
MAX_SIZE = 1 << 26  # characters, or elements, that one operation may make, if the budget is as large
BUDGET = 5_000_000  # of a rendering: an iteration or a call costs 16, a character that is made costs 1
BUDGET_PER_CHAR = 200  # more for each character of the conversation
_STEP = 16
_WIDTH = re.compile(r"\*|\d{4}|\{[^{}]*\{")  # given beside the text, large, or itself a field
_MULTIPLYING = frozenset({"replace", "join", "expandtabs", "center", "ljust", "rjust", "zfill", "indent"})
_MULTIPLYING_FILTERS = _MULTIPLYING | {"wordwrap", "batch", "slice", "tojson", "truncate", "format"}
# filters that do not write out what a list or a mapping holds
_KEEPING = frozenset({"attr", "batch", "count", "d", "default", "dictsort", "first", "groupby", "items"}) | {
    *("last", "length", "list", "map", "max", "min", "reject", "rejectattr", "reverse", "select"),
    *("selectattr", "slice", "sort", "sum", "unique"),
}


class TemplateFault(Exception):
    """Why a template does not render; `line` is where, 0 where that is not known."""

    def __init__(self, reason: str, line: int) -> None:
        super().__init__(reason)
        self.reason = reason
        self.line = line


class Compiled:
    """A template ready to render; renderings of one template go one after another."""

    def __init__(self, source: str) -> None:
        if len(source) > MAX_SOURCE:
            raise TemplateFault(f"it has {len(source)} characters, at most {MAX_SOURCE} are read", 0)
        self._environment = _Sandbox()
        self._lock = threading.Lock()
        try:
            self._template = self._environment.from_string(source)
        except jinja2.TemplateSyntaxError as e:
            raise TemplateFault(f"not a Jinja template ({e.message})", e.lineno) from None
        except (RecursionError, SyntaxError, ValueError) as e:
            raise TemplateFault(f"cannot be compiled ({type(e).__name__})", 0) from None

    def render(self, variables: Mapping[str, Any], size: int) -> tuple[str, list[tuple[int, int]]]:
        """The text, and its `{% generation %}` blocks; `size` is how many characters the conversation has."""
        with self._lock:
            state = self._environment.state = _State(BUDGET + BUDGET_PER_CHAR * size)
            try:
                for block in self._template.generate(dict(variables)):
                    state.pieces.append(block)
                    state.length += len(block)
            except Exception as e:  # a template's expression can raise anything
                raise TemplateFault(_reason(e), _line(e)) from None
        text = "".join(state.pieces)
        if any(text[a:b] != said for a, b, said in state.blocks):
            raise TemplateFault("a {% generation %} block stands inside a macro or a set block", 0)
        return text, [(start, end) for start, end, _ in state.blocks]


class _State:
    """One rendering: what is written, the generation blocks, and what may still be spent."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.pieces: list[str] = []
        self.length = 0
        self.blocks: list[tuple[int, int, str]] = []

    def spend(self, units: int) -> None:
        self.budget -= units
        if self.budget < 0:
            raise SecurityError("it runs or writes without end")


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`: what the assistant writes, as in transformers."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        """The block as a call of `_said`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

    def _said(self, caller: Macro) -> str:
        said = str(caller())
        state = self.environment.state  # type: ignore[attr-defined]
        state.blocks.append((state.length, state.length + len(said), said))
        return said


class _Sandbox(ImmutableSandboxedEnvironment):
    """Every loop, macro, call, filter and output is paid for."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.state = _State(BUDGET)
        self.filters = {name: self._paid(name, f) for name, f in self.filters.items() if name != "random"}
        self.filters["tojson"] = self._paid("tojson", _tojson)
        self.globals.pop("lipsum")
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": TODAY.strftime}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        parsed: nodes.Template = _Paying().visit(super()._parse(source, name, filename))
        return parsed

    def step(self, data: int) -> None:
        """Pay for one run of a body that holds so many characters of text."""
        self.state.spend(_STEP + data)

    def counted(self, values: Any) -> Any:
        """What a loop goes over, paid for."""
        if not hasattr(values, "__len__"):
            return list(map(self.made, values)) if isinstance(values, Iterable) else values
        self.state.spend(_STEP * len(values))
        return values

    def made(self, value: Any) -> Any:
        """A value that was made, its size paid for."""
        if isinstance(value, str | bytes | list | tuple | dict):
            self.state.spend(len(value))
        return value

    def written(self, value: Any) -> Any:
        """A value that is about to be written out, all that it holds paid for."""
        waiting = [value]
        while waiting:
            held = waiting.pop()
            if isinstance(held, str | bytes):
                self.state.spend(len(held))
            elif isinstance(held, Namespace):
                raise SecurityError("a namespace is not written out")
            elif isinstance(held, Collection):
                self.state.spend(len(held))
                waiting.extend(held)
                waiting.extend(held.values() if isinstance(held, Mapping) else ())
        return value

    def call(self, context: Any, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        """A call of the template's; what would make too much is refused before it is made."""
        name, subject = getattr(called, "__name__", ""), getattr(called, "__self__", None)
        if subject is self:
            return called(*args)
        self.state.spend(_STEP)
        if isinstance(subject, str):
            if name == "translate":
                raise SecurityError("a text is not translated")
            self.written([*args, *kwargs.values()])
            self._limit(name in _MULTIPLYING, subject, (*args, *kwargs.values()))
        return self.made(super().call(context, called, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """`+ * ** %` of the template's."""
        if operator == "%" and isinstance(left, str):
            _check_widths(left)
            self.written(right)
        if operator == "**" and not (abs(left) <= 1 << 32 and abs(right) <= 16):
            raise SecurityError("a power this large is not computed")
        for a, b in ((left, right), (right, left)):
            if operator == "*" and isinstance(b, int):
                if isinstance(a, int) and a.bit_length() + b.bit_length() > 4096:
                    raise SecurityError("a number this large is not computed")
                self._limit(hasattr(a, "__len__"), a, (b,))
        return self.made(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format` in the sandbox, without wide fields."""
        format_ = super().wrap_str_format(value)
        if format_ is None:
            return None
        _check_widths(value.__self__)

        def paid(*args: Any, **kwargs: Any) -> str:
            self.written([*args, *kwargs.values()])
            return format_(*args, **kwargs)

        return paid

    def _paid(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that pays for what it makes."""
        first = 1 if hasattr(function, "jinja_pass_arg") else 0

        @wraps(function)
        def paid(*args: Any, **kwargs: Any) -> Any:
            self.state.spend(_STEP)
            if isinstance(args[first], Iterator):
                args = (*args[:first], [self.made(value) for value in args[first]], *args[first + 1 :])
            subject, others = args[first], (*args[first + 1 :], *kwargs.values())
            if name == "sum" and any(isinstance(o, Collection) and not isinstance(o, str) for o in others):
                raise SecurityError("lists are not added up")
            if name not in _KEEPING:
                self.written([subject, *others] if name == "format" else subject)
            self._limit(name in _MULTIPLYING_FILTERS, subject, others)
            if name == "format":
                _check_widths(str(subject))
            return self.made(function(*args, **kwargs))

        return paid

    def _limit(self, multiplies: bool, subject: Any, arguments: Iterable[Any]) -> None:
        """Refuse what makes a multiple of what it is given, and more than may still be spent."""
        if not multiplies:
            return
        size = len(subject) if hasattr(subject, "__len__") else 1
        for argument in arguments:
            times = len(argument) if hasattr(argument, "__len__") else argument
            if isinstance(times, int) and max(size, 1) * abs(times) > min(MAX_SIZE, self.state.budget):
                raise SecurityError("a text this long is not made")


class _Paying(NodeTransformer):
    """A syntax tree in which loops, macros, joined texts and outputs report to the environment."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = _asked("counted", node.iter)
        return self._stepping(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:
        return self._stepping(self.generic_visit(node))

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.CallBlock:
        return self._stepping(self.generic_visit(node))

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        node.nodes = [_asked("written", n) for n in node.nodes]
        return _asked("made", node)

    def visit_Output(self, node: nodes.Output) -> nodes.Output:
        self.generic_visit(node)
        node.nodes = [n if isinstance(n, nodes.TemplateData) else _asked("written", n) for n in node.nodes]
        return node

    def _stepping(self, node: Any) -> Any:
        data = sum(len(text.data) for part in node.body for text in part.find_all(nodes.TemplateData))
        step = nodes.ExprStmt(_asked("step", nodes.Const(data, lineno=node.lineno)), lineno=node.lineno)
        node.body.insert(0, step)
        return node


def _asked(method: str, value: Any) -> nodes.Call:
    """`environment.method(value)`."""
    found = nodes.EnvironmentAttribute(method, lineno=value.lineno)
    return nodes.Call(found, [value], [], None, None, lineno=value.lineno)


def _check_widths(text: str) -> None:
    if _WIDTH.search(text.replace("{{", "").replace("}}", "")):
        raise SecurityError("a field of a given or a large width is not formatted")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _reason(error: Exception) -> str:
    if isinstance(error, SecurityError):
        return f"the sandbox refuses it: {error}"
    if type(error) is jinja2.TemplateError:
        return f"it refuses this conversation: {error}"
    if isinstance(error, RecursionError):
        return "a macro calls itself without end"
    return f"{type(error).__name__}: {str(error)[:200]}"


def _line(error: Exception) -> int:
    """The template's line that was running."""
    frames = traceback.walk_tb(error.__traceback__)
    lines = [line for frame, line in frames if frame.f_code.co_filename == "<template>"]
    return lines[-1] if lines else 0
