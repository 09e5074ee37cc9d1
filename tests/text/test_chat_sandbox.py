"""Strangers' Jinja: what escapes elsewhere is refused, what runs without end stops, errors have a line."""

from __future__ import annotations

import concurrent.futures
import copy
import multiprocessing
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jinja2
import pytest
from chat_models import write_model
from jinja2.sandbox import ImmutableSandboxedEnvironment

from microlm.core import runtime
from microlm.core.errors import UserError
from microlm.core.records import Message
from microlm.text.chat import render, renderer, sandbox
from microlm.text.chat.renderer import TODAY
from microlm.text.chat.sandbox import MAX_SOURCE, Compiled, TemplateFault
from microlm.text.tokenizer import Tokenizer

HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "tools": None}
ESCAPES = {
    "subclasses": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "<class 'type'>"),
    "globals of a global": ("{{ cycler.__init__.__globals__.os.getcwd() }}", "/"),
    "globals by attr": ("{{ (cycler | attr('__init__') | attr('__globals__'))['os'].getcwd() }}", "/"),
    "globals by map": ("{{ [cycler] | map(attribute='__init__.__globals__.os') | list }}", "<module 'os'"),
    "format": ("{{ '{0.__class__.__mro__}'.format(messages) }}", "<class 'list'>"),
    "format by attr": ("{{ ('{0.__class__.__mro__}' | attr('format'))(messages) }}", "<class 'list'>"),
    "change of the messages": ("{% set _ = messages.append(1) %}{{ messages | length }}", "2"),
    "change of a message": ("{% set _ = messages[0].update({'role': 'system'}) %}{{ messages }}", "system"),
}
BIG = "{% set s = 'x' * 99999 %}"
NS = "{% set n = namespace(x='ab', t=(1,), u=[1], v=[1]) %}"
TIME = {  # each would run for minutes, or for ever
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a macro of macros": "{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n }}{% endmacro %}{{ f(60) }}",
    "a power": "{{ ((messages | length + 9) ** 999999999) % 2 }}",
    "squares": NS + "{% set n.x = 9 %}{% for a in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "an equal graph": NS + "{% for a in range(60) %}{% set n.u = [n.u, n.u] %}{% set n.v = [n.v, n.v] %}"
    "{% endfor %}{{ n.u == n.v }}",
    "a rounded number": "{{ (messages | length + 1) | round(-30000000) }}",
    "stripped": "{{ ('a' * 2000000).strip('b' * 1000000 ~ 'a') | length }}",
}
MEMORY = {
    "a product": "{{ ('a' * 10 ** 10) | length }}",
    "a product of lists": "{{ ([1] * 10 ** 10) | length }}",
    "doubling by ~": NS + "{% for a in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling by a block": NS
    + "{% for a in range(60) %}{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}",
    "replace": NS + "{% for a in range(60) %}{% set n.x = n.x.replace('a', n.x) %}{% endfor %}",
    "center": "{{ ('x' | center(9999999999)) | length }}",
    "a field": "{{ ('%0999999999d' % 1) | length }}",
    "a field of a field": "{{ ('{:{w}}'.format(1, w=10 ** 9)) | length }}",
    "bytes": "{{ 'x'.encode().ljust(400000000) | length }}",
    "translate": "{{ ('a' * 99999).translate({97: 'x' * 99999}) | length }}",
    "many times, as JSON": BIG + "{{ ([s] * 99999) | tojson | length }}",
    "many times, in format": BIG + "{{ ('{0}' * 9000).format(s) | length }}",
    "many times, as a reason": BIG + "{{ raise_exception([s] * 99999) }}",
    "many times, as a name": BIG + "{{ {}[[s] * 99999].y }}",
    "indented": "{{ [[1] * (999999 + messages | length)] | tojson(indent=4000) | length }}",
    "output": "{% for a in range(99999) %}{% for b in range(99) %}" + "x" * 999 + "{% endfor %}{% endfor %}",
}
BROKEN = {  # ends the process itself
    "a deep tuple": NS
    + "{% for a in range(6) %}{% for b in range(99999) %}{% set n.t = (n.t,) %}{% endfor %}"
    "{% endfor %}{{ {n.t: 1} | length }}",
}


def plain() -> jinja2.Environment:
    return jinja2.Environment(trim_blocks=True, lstrip_blocks=True)


@pytest.mark.parametrize("name", ESCAPES)
def test_what_works_in_plain_jinja_is_refused(name: str) -> None:
    """Plain Jinja does what the payload asks for; here it is an error, or gives nothing away."""
    source, given_away = ESCAPES[name]
    variables = copy.deepcopy(HELLO)
    assert given_away in plain().from_string(source).render(**copy.deepcopy(HELLO))
    with pytest.raises(TemplateFault, match=r"sandbox refuses|Undefined"):
        Compiled(source).render(variables, 5)
    assert variables == HELLO


@pytest.mark.parametrize("name", [*TIME, *MEMORY, *BROKEN])
def test_what_runs_or_writes_without_end_stops(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process that has a limit; this one hardly works, does not grow, and goes on with another."""
    monkeypatch.setattr(sandbox, "SECONDS", 1 if name in TIME else 8)
    hostile = (TIME | MEMORY | BROKEN)[name]
    made = Compiled("{% if messages %}{{ messages[0].content }}{% else %}" + hostile + "{% endif %}")
    before, start = runtime.peak_rss_bytes(), time.process_time()
    for _ in range(2):
        with pytest.raises(TemplateFault) as fault:
            made.render({"messages": []}, 5)
        reasons = {"TIME": "more than 1 s", "BROKEN": "breaks Python"}
        kind = "TIME" if name in TIME else "BROKEN" if name in BROKEN else "MEMORY"
        assert re.search(reasons.get(kind, r"memory|MB|characters|OverflowError"), fault.value.reason)
        if name in TIME:
            break
    assert made.render(HELLO, 5)[0] == "hello"
    assert time.process_time() - start < 1
    assert runtime.peak_rss_bytes() - before < 16 << 20


def test_a_process_that_renders_ends_with_its_owner(tmp_path: Path) -> None:
    code = (
        "from microlm.text.chat.sandbox import Compiled; import os, signal; made = Compiled('x')\n"
        "print(made._child.process.pid, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -9
    until = time.monotonic() + 10
    while Path(f"/proc/{int(done.stdout)}").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not Path(f"/proc/{int(done.stdout)}").exists()


MADE: list[Compiled] = []


def _rendered(number: int) -> str:
    return MADE[0].render({"messages": [{"content": str(number)}]}, 1)[0]


def test_a_forked_process_has_a_renderer_of_its_own() -> None:
    MADE[:] = [Compiled("{{ messages[0].content }}")]
    assert _rendered(9) == "9"
    with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        assert list(pool.map(_rendered, range(40))) == [str(n) for n in range(40)]
    assert _rendered(9) == "9"


def test_the_process_opens_nothing(tmp_path: Path) -> None:
    """Should a template find a way out of Jinja, there is no file and no socket for it."""
    code = (
        f"import runpy, sys; made = runpy.run_path({renderer.__file__!r})\n"
        "import socket; made['lock']()\n"
        "for act in (lambda: open('/etc/passwd'), lambda: open('x', 'w'), socket.socket):\n"
        "    try: act(); print('opened')\n"
        "    except OSError as e: print(e.errno)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split() == ["24", "24", "24"]  # EMFILE
    unlocked = code.replace("made['lock']()", "")
    done = subprocess.run([sys.executable, "-c", unlocked], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split() == ["opened"] * 3


def test_templates_of_the_same_words_cost_what_they_should() -> None:
    """A long conversation is no attack: a million characters through a filter, turn by turn."""
    source = "{% for m in messages %}{{ (m.role ~ m.content | trim).split('x') | join('y') }}{% endfor %}"
    messages = [{"role": "user", "content": " wort" * 200}] * 1000
    text, _ = Compiled(source).render({"messages": messages}, 1_000_000)
    assert len(text) > 990_000


FUNCTIONS = {
    "{{ {'b': '中', 'a': [1, 2.5, none, true]} | tojson }}": '{"b": "中", "a": [1, 2.5, null, true]}',
    "{{ {'a': 1} | tojson(indent=2) }}": '{\n  "a": 1\n}',
    "{{ '<>&' | tojson }}": '"<>&"',
    "{{ strftime_now('%d %b %Y') }}": TODAY.strftime("%d %b %Y"),
    "{% for a in [1, 2, 3] %}{% if a == 2 %}{% continue %}{% endif %}{{ a }}{% endfor %}": "13",
    "{% for a in [1, 2, 3] %}{{ loop.index0 }}{{ loop.last }}{% endfor %}": "0False1False2True",
    "{{ messages[::-1][0].content | upper ~ '%s-%d' % ('a', 3) }}": "HELLOa-3",
    "{{ missing }}{{ missing is defined }}": "False",
    "{{ '**%s** 2023 {\"a\": {\"b\": 1}}' % 'x' }}": '**x** 2023 {"a": {"b": 1}}',
    "{{ ('word ' * 20000) | truncate(9) }}": "word...",
    "{{ '{{{}}}: {:>2}'.format('a', 1) }}": "{a}:  1",
    "{{ [1, 2] | sum }}{{ [3, 1] | sort | first }}{{ ['a', 'b'] | map('upper') | join('-') }}": "31A-B",
    "{{ {'a': [1, 'x']} }}{{ {'a': 1}.items() | list }}": "{'a': [1, 'x']}[('a', 1)]",
    "{{ '{}{x:>3}'.format(1, x=2) }}{{ 2 ** 10 + 7 % 4 }}": "1  21027",
    "{% set n = namespace(a=0) %}{% for m in messages %}{% set n.a = n.a + 1 %}{% endfor %}{{ n.a }}": "1",
    "{% macro f(a, b=2) %}{{ a }}{{ b }}{{ caller() }}{% endmacro %}{% call f(1) %}c{% endcall %}": "12c",
    "a\n  {%- if true %}\n  b\n  {% endif %}\nc": "a  b\nc",
}


@pytest.mark.parametrize("source", FUNCTIONS)
def test_what_templates_may_use_is_there(source: str) -> None:
    assert Compiled(source).render(HELLO, 5) == (FUNCTIONS[source], [])


@pytest.mark.parametrize(
    ("source", "line", "reason"),
    [
        ("\n\n{% if %}", 3, "not a Jinja template"),
        ("a\n{% for m in messages %}", 2, "not a Jinja template"),
        ("{{ 1 }}\n{{ messages[7].content.x }}", 2, "UndefinedError"),
        ("\n{% for m in messages %}\n{{ raise_exception('nur Nutzer') }}{% endfor %}", 3, "nur Nutzer"),
        ("{{ 1 / 0 }}", 1, "ZeroDivisionError"),
        ("{% include 'other' %}", 1, ""),
        ("{{ 1 | random }}", 1, "random"),
        ("{{ lipsum() }}", 1, "undefined"),
        ("(" * 10 + "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", 0, "cannot be compiled"),
    ],
)
def test_a_fault_has_its_line(tmp_path: Path, source: str, line: int, reason: str) -> None:
    with pytest.raises(TemplateFault) as fault:
        Compiled(source).render(HELLO, 5)
    assert fault.value.line == line and reason in fault.value.reason
    with pytest.raises(UserError, match=f"chat template line {line}: " if line else "chat template: "):
        render(Tokenizer.load(write_model(tmp_path / "t", source)), [Message("user", "x")])


def test_a_template_of_a_megabyte_is_not_read() -> None:
    with pytest.raises(TemplateFault, match="characters"):
        Compiled("x" * (MAX_SOURCE + 1))


def test_the_sandbox_of_transformers_would_go_on() -> None:
    """Why there is a process with limits: their environment makes all that is asked for."""
    theirs = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    source = "{{ ('x' | center(300000000)) | length }}"
    assert theirs.from_string(source).render() == "300000000"
    with pytest.raises(TemplateFault, match="memory"):
        Compiled(source).render(HELLO, 5)
