"""YAML and `key=value` words → a frozen, typed recipe. An unknown key is an error naming the nearest key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from microlm.core.errors import UserError

R = TypeVar("R", bound="Recipe")


class Recipe(BaseModel):
    """Base of every recipe block: frozen, strict about unknown keys, documented field by field."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), validate_default=True, allow_inf_nan=False
    )

    def keyed(self) -> dict[str, Any]:
        """The fields that change the result, as plain JSON values."""
        result = {}
        for name, value in self.model_dump(mode="json").items():
            inner = getattr(self, name)
            if _mark(type(self).model_fields[name], "keyed", True):
                result[name] = inner.keyed() if isinstance(inner, Recipe) else value
        return result


class Parallel(Recipe):
    """What differs between a laptop and a cluster; never changes a result's key."""

    processes: int = Field(default=2, ge=1, le=64, description="worker processes on this machine")
    threads: int = Field(default=1, ge=1, le=256, description="threads of each process")


def unkeyed(default: Any = ..., **kwargs: Any) -> Any:
    """A field that does not change the result (paths, device, logging), left out of the key."""
    return Field(default, json_schema_extra={"keyed": False}, **kwargs)


def artifact_input(default: Any = ..., kinds: tuple[str, ...] = (), **kwargs: Any) -> Any:
    """A field that names an input artifact's directory; its key stands for it in our key.

    An artifact of another kind than one of `kinds` is refused before the stage runs.
    """
    extra: dict[str, Any] = {"keyed": False, "artifact": True, "kinds": list(kinds)}
    return Field(default, json_schema_extra=extra, **kwargs)


class StageRecipe(Recipe):
    """The fields every stage has."""

    out: str = unkeyed(description="directory (or fsspec URL) of the artifact")
    seed: int = Field(0, ge=0, description="seed of everything random in this stage")
    parallel: Parallel = unkeyed(Parallel(), description="processes and threads")

    @classmethod
    def input_fields(cls) -> tuple[str, ...]:
        """The fields that name input artifacts."""
        return tuple(k for k, f in cls.model_fields.items() if _mark(f, "artifact", False))

    @classmethod
    def input_kinds(cls, name: str) -> tuple[str, ...]:
        """The kinds of artifact that an input field takes; empty for any."""
        return tuple(_mark(cls.model_fields[name], "kinds", ()))

    def inputs(self) -> dict[str, str]:
        """Field name → directory of every input artifact that is set."""
        named = {k: getattr(self, k) for k in self.input_fields()}
        return {k: v for k, v in named.items() if v}


def _mark(field: Any, name: str, default: Any) -> Any:
    extra = field.json_schema_extra
    return extra.get(name, default) if isinstance(extra, dict) else default


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars: `1e-4` is a number, `yes`, `no`, `12:30` and dates are text. No aliases."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Refuse `*alias`: a recipe of aliases of aliases grows without bound."""
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not supported", mark)
        return super().compose_node(parent, index)


_OWN = {f"tag:yaml.org,2002:{name}" for name in ("int", "float", "bool", "timestamp")}
_Loader.yaml_implicit_resolvers = {
    k: [(t, r) for t, r in v if t not in _OWN] for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^(?:[-+]?\d[\d_]*|0o[0-7]+|0x[0-9a-fA-F]+)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\d[\d_]*\.[\d_]*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.(?:inf|nan))$"
    ),
    list("-+0123456789."),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|false|True|False|TRUE|FALSE)$"), list("tfTF")
)


def _integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node)).replace("_", "")
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def _no_duplicates(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str | int | float | bool):
            raise yaml.constructor.ConstructorError(
                None, None, "a key must be plain text", key_node.start_mark
            )
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"key '{key}' stands twice", key_node.start_mark
            )
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _no_duplicates)


def parse_yaml(text: str, where: str) -> Any:
    """YAML text → plain values; a syntax error names `where`, line and column."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark
        place = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else where
        step = "indent with spaces, not with tabs" if "\\t" in str(e.problem) else "fix this line"
        raise UserError(f"{place}: not valid YAML ({e.problem}); {step}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as e:
        first = (str(e).splitlines() or [type(e).__name__])[0]
        raise UserError(f"{where}: not valid YAML ({first}); save the recipe as plain UTF-8 YAML") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A recipe file → dict. Errors are sentences with file and line."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe; recipes/ holds the ones that come with MicroLM") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a directory, expected a recipe file (.yaml)") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: byte {e.start} is not UTF-8; save the recipe as UTF-8") from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); check the path") from None
    data = parse_yaml(text, str(path))
    if data is None:
        raise UserError(f"{path}: the recipe is empty; recipes/ holds examples")
    if not isinstance(data, dict):
        raise UserError(
            f"{path}: a recipe is a mapping of keys to values, this file holds a {type(data).__name__}; "
            "recipes/ holds examples"
        )
    return data


def parse_override(word: str) -> tuple[list[str], Any]:
    """`a.b=3e-4` → (["a", "b"], 0.0003); the value is read as YAML."""
    name, sep, value = word.partition("=")
    path = name.strip().split(".")
    if not sep or not all(path):
        raise UserError(f"override '{word}': expected key=value, for example pretrain.loop.tokens=1e6")
    return path, parse_yaml(value, f"override '{word}'")


def apply_overrides(data: Mapping[str, Any], words: Iterable[str]) -> dict[str, Any]:
    """A copy of `data` with every dotted `key=value` set, making blocks on the way."""
    result = _copy(data)
    for word in words:
        path, value = parse_override(word)
        node = result
        for part in path[:-1]:
            child = node.setdefault(part, {})
            if child is None:
                child = node[part] = {}
            if not isinstance(child, dict):
                raise UserError(f"override '{word}': '{part}' is a value, not a block; write {part}=VALUE")
            node = child
        node[path[-1]] = value
    return result


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _copy(v) for k, v in value.items()}
    return [_copy(v) for v in value] if isinstance(value, list) else value


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint `; did you mean 'x'?`, or the list of known names."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(names)}"


def build(cls: type[R], data: Mapping[str, Any], where: str) -> R:
    """Plain values → recipe, or a UserError that names the key and the nearest known one."""
    try:
        return cls.model_validate(dict(data))
    except ValidationError as e:
        raise UserError(_sentence(cls, e, where)) from None


def _sentence(cls: type[Recipe], error: ValidationError, where: str) -> str:
    first = error.errors(include_url=False)[0]
    path = ".".join(str(p) for p in first["loc"])
    if first["type"] == "extra_forbidden":
        block = _block(cls, first["loc"][:-1])
        return f"{where}: unknown key '{path}'; {nearest(str(first['loc'][-1]), block.model_fields)}"
    if first["type"] == "missing":
        return f"{where}: key '{path}' is missing; add it"
    message = first["msg"].removeprefix("Value error, ")
    if not path:  # what the recipe as a whole must be: there is no one value to show
        return f"{where}: {message}"
    shown = repr(first.get("input"))
    return f"{where}: {path}: {message[:1].lower()}{message[1:]} (found {shown[:80]}); change it"


def _block(cls: type[Recipe], loc: tuple[Any, ...]) -> type[Recipe]:
    block: type[Recipe] = cls
    for part in loc:
        field = block.model_fields.get(str(part))
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
        inner = [k for k in kinds if isinstance(k, type) and issubclass(k, Recipe)]
        if not inner:
            break
        block = inner[0]
    return block
