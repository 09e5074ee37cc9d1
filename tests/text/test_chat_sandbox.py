"""Strangers' Jinja: what escapes elsewhere is refused, what runs without end stops, errors have a line."""

from __future__ import annotations

import copy
import resource
import time
from pathlib import Path
from typing import Any

import jinja2
import pytest
from chat_models import write_model
from jinja2.sandbox import ImmutableSandboxedEnvironment

from microlm.core.errors import UserError
from microlm.core.records import Message
from microlm.text.chat import render
from microlm.text.chat.sandbox import MAX_SOURCE, TODAY, Compiled, TemplateFault
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
NS = "{% set n = namespace(x='ab') %}{% for a in range(60) %}"
BIG = "{% set s = 'x' * 99999 %}"
ENDLESS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a filtered loop": "{% for a in range(9999) %}{% for b in range(9999) if 0 %}{% endfor %}{% endfor %}",
    "a long range": "{% for a in range(10 ** 9) %}{% endfor %}",
    "a macro of macros": "{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n }}{% endmacro %}{{ f(60) }}",
    "a macro without end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a recursive loop": "{% for a in [[1, 1]] * 9 recursive %}{{ loop([[1]] * 9) }}{% endfor %}",
    "a product": "{{ ('a' * 10 ** 10) | length }}",
    "a product of lists": "{{ ([1] * 10 ** 10) | length }}",
    "a power": "{{ (9 ** 999999999) % 2 }}",
    "squares": "{% set n = namespace(x=9) %}{% for a in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "doubling by ~": NS + "{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling by +": NS + "{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling by a block": NS + "{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}",
    "doubling by join": NS + "{% set n.x = [n.x, n.x] | join %}{% endfor %}",
    "replace": "{% set n = namespace(x='aa') %}{% for a in range(60) %}"
    "{% set n.x = n.x.replace('a', n.x) %}{% endfor %}",
    "ljust": "{{ 'x'.ljust(9999999999) | length }}",
    "center": "{{ ('x' | center(9999999999)) | length }}",
    "a field": "{{ ('%09999999999d' % 1) | length }}",
    "a field of format": "{{ '{:09999999999d}'.format(1) | length }}",
    "a field of the filter": "{{ ('%09999999999d' | format(1)) | length }}",
    "a field of given width": "{{ ('%*d' % (10 ** 9, 1)) | length }}",
    "a field of a field": "{{ ('{:{w}}'.format(1, w=10 ** 9)) | length }}",
    "translate": "{{ ('a' * 99999).translate({97: 'x' * 99999}) | length }}",
    "one text many times, as JSON": BIG + "{{ ([s] * 99999) | tojson | length }}",
    "many times, as a text": BIG + "{{ ([s] * 99999) | string | length }}",
    "many times, in each other": BIG + "{{ ([[[s] * 999] * 999] * 999) | string | length }}",
    "many times, as items": BIG + "{{ {'a': [s] * 99999}.items() | string | length }}",
    "many times, in a namespace": BIG + "{% set n = namespace(x=[s] * 99999) %}{{ n | string | length }}",
    "many times, in a row": BIG + "{{ (([s] * 99999) | map('trim') | join) | length }}",
    "many times, beside a text": BIG + "{{ (([s] * 99999) ~ 'x') | length }}",
    "many times, in %": BIG + "{{ ('%s' % ([s] * 99999,)) | length }}",
    "many times, in format": BIG + "{{ '{}'.format([s] * 99999) | length }}",
    "lists that are added up": "{{ ([[1] * 9999] * 9999) | sum(start=[]) | length }}",
    "indent": "{{ (('a\n' * 99999) | indent('x' * 99999)) | length }}",
    "output": "{% for a in range(99999) %}{% for b in range(99) %}" + "x" * 999 + "{% endfor %}{% endfor %}",
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


@pytest.mark.parametrize("name", ENDLESS)
def test_what_runs_or_writes_without_end_stops(name: str) -> None:
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(TemplateFault, match=r"sandbox refuses|without end|Range too big"):
        Compiled(ENDLESS[name]).render(HELLO, 5)
    assert time.process_time() - start < 8
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150_000


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


def test_the_sandbox_of_transformers_would_run_on() -> None:
    """Why there is a budget: their environment has none."""
    theirs = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    source = "{% for a in range(3000) %}{% for b in range(3000) %}{% endfor %}{% endfor %}"
    assert theirs.from_string(source).render() == ""
    with pytest.raises(TemplateFault, match="without end"):
        Compiled(source).render(HELLO, 5)
