"""The process in which strangers' Jinja runs: the environment of transformers in a sandbox, no file to open.

A program of its own that knows nothing of MicroLM; `sandbox.Compiled` starts it. Enters, on stdin: frames,
the template's first. Leaves, on stdout: a frame for each: what was rendered, or why not and in which line.
"""

from __future__ import annotations

import datetime
import json
import resource
import sys
import time
import traceback
from collections.abc import Mapping
from typing import Any, BinaryIO, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

TODAY = datetime.date(2024, 7, 26)
"""The day of every rendering, so that equal conversations are equal tokens (Llama 3 falls back to it too)."""
_HEAD_BYTES = 8
_REASON_CHARS = 300


def write_frame(file: BinaryIO, value: Any) -> None:
    """One JSON value, its size before it."""
    data = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
    file.write(len(data).to_bytes(_HEAD_BYTES, "big") + data)
    file.flush()


def read_frame(file: BinaryIO) -> Any:
    """The next value; EOFError where there is none."""
    head = file.read(_HEAD_BYTES)
    data = file.read(int.from_bytes(head, "big"))
    if len(head) < _HEAD_BYTES or len(data) < int.from_bytes(head, "big"):
        raise EOFError
    return json.loads(data.decode("utf-8", "surrogatepass"))


class Environment(ImmutableSandboxedEnvironment):
    """What templates of models may use; `pieces` and `blocks` are of the rendering that is under way."""

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.filters["tojson"] = _tojson
        del self.filters["random"], self.globals["lipsum"]
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": TODAY.strftime}
        self.length = 0
        self.blocks: list[tuple[int, int, str]] = []


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
        start = self.environment.length  # type: ignore[attr-defined]
        self.environment.blocks.append((start, start + len(said), said))  # type: ignore[attr-defined]
        return said


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


def compiled(environment: Environment, source: str) -> tuple[jinja2.Template | None, dict[str, Any]]:
    """The template, or None and the answer that says why."""
    try:
        return environment.from_string(source), {}
    except jinja2.TemplateSyntaxError as e:
        return None, {"reason": f"not a Jinja template ({e.message})", "line": e.lineno}
    except (MemoryError, OverflowError, RecursionError, SyntaxError, ValueError) as e:
        return None, {"reason": f"cannot be compiled ({type(e).__name__})", "line": 0}


def rendered(template: jinja2.Template, variables: Mapping[str, Any], longest: int) -> dict[str, Any]:
    """The answer with the text and its `{% generation %}` blocks, or with the reason and the line."""
    environment, pieces = template.environment, []
    assert isinstance(environment, Environment)
    environment.length, environment.blocks = 0, []
    try:
        for piece in template.generate(dict(variables)):
            pieces.append(piece)
            environment.length += len(piece)
            if environment.length > longest:
                raise SecurityError(f"it writes more than {longest:,} characters")
    except Exception as e:  # a template's expression can raise anything
        return {"reason": _reason(e), "line": _line(e)}
    text = "".join(pieces)
    if any(text[a:b] != said for a, b, said in environment.blocks):
        return {"reason": "a {% generation %} block stands inside a macro or a set block", "line": 0}
    return {"text": text, "blocks": [block[:2] for block in environment.blocks]}


def _reason(error: Exception) -> str:
    if isinstance(error, SecurityError):
        return f"the sandbox refuses it: {str(error)[:_REASON_CHARS]}"
    if isinstance(error, MemoryError):
        return "the sandbox refuses it: it takes too much memory"
    if type(error) is jinja2.TemplateError:
        return f"it refuses this conversation: {str(error)[:_REASON_CHARS]}"
    if isinstance(error, RecursionError):
        return "a macro calls itself without end"
    return f"{type(error).__name__}: {str(error)[:_REASON_CHARS]}"


def _line(error: Exception) -> int:
    """The template's line that was running."""
    frames = traceback.walk_tb(error.__traceback__)
    lines = [line for frame, line in frames if frame.f_code.co_filename == "<template>"]
    return lines[-1] if lines else 0


def lock() -> None:
    """From here on no file, socket or core dump can be made; what is imported late was used once before."""
    environment = Environment()
    for source in ("{{ missing.x }}", "{{ '%s' % [1] | tojson | upper }}{{ strftime_now('%d %B') }}"):
        template, _ = compiled(environment, source)
        assert template is not None
        rendered(template, {}, 100)
    compiled(environment, "{% if %}")
    for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        resource.setrlimit(kind, (0, 0))


def asked(file: BinaryIO) -> dict[str, Any]:
    """The next request; its limits of memory and of CPU time from now on hold. More time is death."""
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    found: dict[str, Any] = read_frame(file)
    resource.setrlimit(resource.RLIMIT_AS, (found["memory_bytes"], resource.RLIM_INFINITY))
    used = int(time.process_time()) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (used + found["seconds"], resource.RLIM_INFINITY))
    return found


def main() -> None:
    """Answer frame by frame until there are no more."""
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    lock()
    try:
        template, answer = compiled(Environment(), asked(source)["source"])
        write_frame(sink, answer)
        while template is not None:
            request = asked(source)
            write_frame(sink, rendered(template, request["variables"], request["longest"]))
    except (EOFError, BrokenPipeError):
        pass


if __name__ == "__main__":
    main()
