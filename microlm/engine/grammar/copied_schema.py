"""A JSON schema and a text → a grammar whose free strings are copied from the text.

What no string is part of, and strings that enum, const, pattern or format bound, are left to `llguidance`.
Names of properties that the schema does not list are free strings, too.
"""

from __future__ import annotations

import itertools
import json
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from microlm.core.errors import UserError
from microlm.engine.grammar.copying import Copies, no_copy
from microlm.engine.grammar.limits import NOTES

MAX_RULES = 4_096
MAX_COUNT = 1_000_000
_KEYWORDS: dict[str, set[str]] = {
    "object": {
        "properties", "required", "additionalProperties", "propertyNames", "minProperties", "maxProperties",
    },
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "string": {"minLength", "maxLength", "pattern", "format"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
    "boolean": set(),
    "null": set(),
}  # fmt: skip
_OTHER = {"type", "enum", "const", "anyOf", "$ref"}


class _Count(NamedTuple):
    """How many at least, and at most (None: no end)."""

    low: int
    high: int | None

    def less(self, n: int) -> _Count:
        """What is left when there are n already."""
        return _Count(max(0, self.low - n), None if self.high is None else self.high - n)


def copied_schema(schema: Mapping[str, Any], copies: Copies, options: Mapping[str, Any]) -> str:
    """The grammar in Lark; a UserError names what cannot be combined with copying."""
    return _Rules(schema, copies, options).text()


class _Rules:
    """The rules of one schema: each subschema is one, written once. Nothing here calls itself."""

    def __init__(self, root: Mapping[str, Any], copies: Copies, options: Mapping[str, Any]) -> None:
        self._root = root
        self._copies = copies
        self._options = options
        self._names: dict[str, str] = {}
        self._waiting: deque[tuple[str, Any]] = deque()
        self._lines: list[str] = []
        self._numbers = itertools.count()

    def text(self) -> str:
        """All rules, from `start` on."""
        self._lines.append(f"start: {self._rule(self._root)}")
        while self._waiting:
            name, schema = self._waiting.popleft()
            self._add(name, self._expression(schema))
        return "\n".join([*self._lines, *self._copies.lines])

    def _rule(self, schema: Any) -> str:
        """The name of a subschema's rule, which is written later if it is new."""
        if not isinstance(schema, dict | bool):
            raise UserError(f"json_schema: expected a schema (an object), found {_short(schema)}")
        bare = {k: v for k, v in schema.items() if k not in NOTES} if isinstance(schema, dict) else schema
        key = json.dumps({} if bare is True else bare, ensure_ascii=False)
        if key not in self._names:
            self._names[key] = f"v{len(self._names)}"
            self._waiting.append((self._names[key], {} if bare is True else bare))
        return self._names[key]

    def _add(self, name: str, expression: str) -> None:
        self._lines.append(f"{name}: {expression}")
        if len(self._lines) > MAX_RULES:
            raise UserError(f"json_schema: more than {MAX_RULES} rules with copy_from; make it smaller")

    def _expression(self, schema: Any) -> str:
        if schema is False:
            raise UserError("json_schema: false admits nothing; with copy_from leave such a part out")
        known = _OTHER.union(*_KEYWORDS.values())
        if unknown := sorted(set(schema) - known):
            raise UserError(
                f"json_schema: with copy_from '{unknown[0]}' is not supported; "
                "use properties, propertyNames, items, enum, const, anyOf and $ref, or leave copy_from out"
            )
        for single in ("$ref", "anyOf"):
            if single in schema:
                if len(schema) > 1:
                    raise UserError(
                        f"json_schema: with copy_from nothing stands beside '{single}'; put it into the parts"
                    )
                return self._rule(self._target(schema["$ref"])) if single == "$ref" else self._any(schema)
        if "enum" in schema or "const" in schema:
            return self._closed(schema)
        types = _types(schema)
        if len(types) == 1:
            return self._of_type(types[0], schema)
        return " | ".join(self._rule({"type": t} | _keywords(schema, t)) for t in types)

    def _any(self, schema: Mapping[str, Any]) -> str:
        parts = schema["anyOf"]
        if not isinstance(parts, list) or not parts:
            raise UserError(f"json_schema: 'anyOf' is {_short(parts)}, expected a list of schemas")
        return " | ".join(self._rule(part) for part in parts)

    def _target(self, reference: Any) -> Any:
        """What a reference of this document points to."""
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            raise UserError(f"json_schema: $ref {_short(reference)} is not in this schema; expected '#/…'")
        place: Any = self._root
        for word in reference.split("/")[1:]:
            word = word.replace("~1", "/").replace("~0", "~")
            if not isinstance(place, dict) or word not in place:
                raise UserError(
                    f"json_schema: $ref {_short(reference)}: nothing is there; define it in $defs"
                )
            place = place[word]
        return place

    def _closed(self, schema: Mapping[str, Any]) -> str:
        """What holds no free string."""
        return "%json " + json.dumps(dict(schema) | {"x-guidance": self._options}, ensure_ascii=False)

    def _of_type(self, kind: str, schema: Mapping[str, Any]) -> str:
        mine = _keywords(schema, kind)
        if kind == "object":
            return self._object(mine)
        if kind == "array":
            return self._array(mine)
        if kind == "string" and not {"pattern", "format"} & set(mine):
            return self._string(mine, (), "json_schema")
        return self._closed({"type": kind} | mine)

    def _string(self, schema: Mapping[str, Any], without: Iterable[str], place: str) -> str:
        low, high = _count(schema, "minLength", "maxLength")
        name = self._copies.terminal(low, high, tuple(without))
        if name is None:
            raise no_copy(low, high, place)
        return name

    def _object(self, schema: Mapping[str, Any]) -> str:
        """The listed properties in their order, then others: first and later ones differ by the comma."""
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(properties, dict) or not _is_names(required):
            raise UserError("json_schema: expected 'properties' as an object, 'required' as a list of names")
        other = schema.get("additionalProperties", True)
        listed = properties | {name: other for name in required if name not in properties}
        parts = [(n, s, n in required) for n, s in listed.items() if s is not False or n in required]
        count = _count(schema, "minProperties", "maxProperties")
        if count != (0, None) and not all(must for _, _, must in parts):
            raise UserError(
                "json_schema: with copy_from minProperties and maxProperties need all properties required"
            )
        rest = count.less(len(parts))
        pair = self._other_pair(schema, listed, other) if other is not False and rest.high != 0 else None
        pairs = [f'{_literal(json.dumps(n, ensure_ascii=False))} ":" {self._rule(s)}' for n, s, _ in parts]
        if (rest.high is not None and rest.high < 0) or (pair is None and rest.low > 0):
            raise UserError("json_schema: an object has more required properties than it may have; widen it")
        ends = _Count(0, 0) if pair is None else rest
        return self._listing("{}", pairs, [must for _, _, must in parts], pair or "", ends)

    def _other_pair(self, schema: Mapping[str, Any], listed: Iterable[str], other: Any) -> str | None:
        """A property that is not listed; None where the text has no name for one."""
        names = schema.get("propertyNames", {})
        if not isinstance(names, dict) or set(names) - {"type", "minLength", "maxLength"}:
            raise UserError(
                "json_schema: with copy_from 'propertyNames' may have minLength and maxLength only"
            )
        key = self._copies.terminal(*_count(names, "minLength", "maxLength"), tuple(listed))
        return None if key is None else f'{key} ":" {self._rule(other)}'

    def _array(self, schema: Mapping[str, Any]) -> str:
        """The items that have a place of their own, then the others."""
        firsts, other = schema.get("prefixItems", []), schema.get("items", True)
        if not isinstance(firsts, list):
            raise UserError(f"json_schema: 'prefixItems' is {_short(firsts)}, expected a list of schemas")
        low, high = _count(schema, "minItems", "maxItems")
        firsts = firsts if high is None else firsts[:high]
        rest = _Count(0, 0) if other is False else _Count(low, high).less(len(firsts))
        if low > len(firsts) + (low if rest.high is None else rest.high):
            raise UserError("json_schema: an array needs more items than it may have; widen it")
        item = self._rule(other) if rest.high != 0 else ""
        return self._items([self._rule(s) for s in firsts], low, item, rest)

    def _listing(self, braces: str, parts: list[str], must: list[bool], other: str, rest: _Count) -> str:
        """Parts in their order, each there or not, then others. `later` is what follows a part."""
        later = _repeated(_after_comma(other), rest) if other else ""
        first = [_some(other, rest)] if other and (rest.high is None or rest.high > 0) else []
        nothing = rest.low == 0
        for part, needed in zip(reversed(parts), reversed(must), strict=True):
            name = self._name()
            follow = f"{part} {later}".strip()
            first = [follow] if needed else [follow, *first]
            nothing = nothing and not needed
            whole = _after_comma(follow)
            self._add(name, whole if needed else f"{whole} | {later or _EMPTY}")
            later = name
        options = [f'"{braces[0]}" ({option}) "{braces[1]}"' for option in first]
        return " | ".join([*options, *([f'"{braces[0]}" "{braces[1]}"'] if nothing else [])])

    def _items(self, firsts: list[str], low: int, item: str, rest: _Count) -> str:
        """A list that may end after any item from the `low`-th on."""
        if not firsts:
            options = [_some(item, rest)] if item else []
            empty = ['"[" "]"'] if low == 0 else []
            return " | ".join([*(f'"[" {o} "]"' for o in options), *empty])
        tail = _repeated(_after_comma(item), rest) if item else ""
        for place in range(len(firsts) - 1, 0, -1):
            name = self._name()
            follow = f'"," {firsts[place]} {tail}'.strip()
            self._add(name, follow if place < low else f"{follow} | {_EMPTY}")
            tail = name
        whole = f'"[" {firsts[0]} {tail} "]"'
        return whole if low > 0 else f'{whole} | "[" "]"'

    def _name(self) -> str:
        return f"r{next(self._numbers)}"


_EMPTY = '""'


def _some(item: str, count: _Count) -> str:
    """One item or more, with commas between them."""
    more = count.less(1)
    return f"{item} {_repeated(_after_comma(item), more)}"


def _after_comma(item: str) -> str:
    return f'"," {item}'


def _repeated(item: str, count: _Count) -> str:
    if count.high == 0:
        return ""
    return f"({item}){{{count.low},{'' if count.high is None else count.high}}}"


def _keywords(schema: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """What a schema says about values of a type."""
    return {k: v for k, v in schema.items() if k in _KEYWORDS["number" if kind == "integer" else kind]}


def _types(schema: Mapping[str, Any]) -> list[str]:
    """The types of a value: those named, or all."""
    named = schema.get("type", list(_KEYWORDS))
    types = [named] if isinstance(named, str) else named
    if not isinstance(types, list) or not types or not all(t in {*_KEYWORDS, "integer"} for t in types):
        raise UserError(
            f"json_schema: 'type' is {_short(named)}, expected one of {', '.join(_KEYWORDS)}, integer"
        )
    return [t for t in types if t != "integer" or "number" not in types]


def _count(schema: Mapping[str, Any], low: str, high: str) -> _Count:
    """Two bounds as whole numbers."""
    for name in (low, high):
        value = schema.get(name, 0)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_COUNT:
            raise UserError(
                f"json_schema: '{name}' is {_short(value)}, expected a number from 0 to {MAX_COUNT}"
            )
    return _Count(schema.get(low, 0), schema.get(high))


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _short(value: Any) -> str:
    return repr(value)[:60]
