"""The house's contracts as functions over a source tree: each returns sentences, none when all is well."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

FLOORS = {
    "core": 0, "text": 1, "model": 1, "train": 2, "engine": 2, "export": 2, "serve": 3,
    "eval": 4, "rag": 4, "agent": 4, "cli": 5, "studio": 5,
}  # fmt: skip
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_ARGUMENTS, MAX_FILES = 350, 60, 8, 12


def sources(package: Path) -> Iterator[tuple[str, ast.Module, str]]:
    """(path relative to the package's parent, syntax tree, text) of every Python file."""
    for path in sorted(package.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        yield path.relative_to(package.parent).as_posix(), ast.parse(text), text


def layers(package: Path) -> list[str]:
    """A room imports only lower floors and itself; lazy, conditional and relative imports count."""
    found = []
    for name, tree, _ in sources(package):
        here = name.split("/")
        room = here[1] if len(here) > 2 else None  # files beside the rooms: __init__, __main__
        for node in ast.walk(tree):
            for target in _imports(node, here[:-1]):
                parts = target.split(".")
                if parts[0] != package.name or len(parts) < 2 or parts[1] == room:
                    continue
                if problem := _wrong_way(room, parts[1], package):
                    found.append(f"{name}:{getattr(node, 'lineno', 0)}: {problem}")
    return found


def _wrong_way(room: str | None, other: str, package: Path) -> str | None:
    if other not in FLOORS:
        return None if not (package / other).is_dir() else f"room '{other}' has no floor"
    if room is None:
        return None if other == "cli" else f"only the cli is imported beside the rooms, not {other}"
    if room not in FLOORS:
        return f"room '{room}' has no floor"
    if FLOORS[room] <= FLOORS[other]:
        return f"{room} (floor {FLOORS[room]}) imports {other} (floor {FLOORS[other]})"
    return None


def _imports(node: ast.AST, folder: list[str]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (a.name for a in node.names)
    elif isinstance(node, ast.ImportFrom):
        up = folder[: len(folder) - node.level + 1] if node.level else []
        base = ".".join([*up, *([node.module] if node.module else [])])
        yield from (f"{base}.{a.name}" for a in node.names)
    elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = _dotted(node.func)
        if called.endswith(("import_module", "__import__")):
            yield str(node.args[0].value)


def _dotted(node: ast.AST) -> str:
    """`a.b.c` of a name or attribute; what is called before the first dot does not matter."""
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def undeclared(package: Path, project: Mapping[str, Any]) -> list[str]:
    """Imports of what pyproject.toml does not declare; what an extra brings may only be imported lazily."""
    extras = {k: v for k, v in project["optional-dependencies"].items() if k != "dev"}
    always = _modules(project["dependencies"]) | {*sys.stdlib_module_names, package.name}
    optional = {name for words in extras.values() for name in _modules(words)}
    found = []
    for name, tree, _ in sources(package):
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
        lazy = {id(inner) for function in functions for inner in ast.walk(function)}
        for node in ast.walk(tree):
            modules = {target.partition(".")[0] for target in _imports(node, name.split("/")[:-1])}
            for module in sorted(modules - always - (optional if id(node) in lazy else set())):
                why = (
                    "comes with an extra; import it where it is used" if module in optional else "undeclared"
                )
                found.append(f"{name}:{getattr(node, 'lineno', 0)}: {module} {why}")
    return found


def _modules(requirements: Iterable[str]) -> set[str]:
    """The modules that requirements bring: named as they are, but for PyYAML."""
    names = (re.split(r"[^\w.-]", word)[0].lower().replace("-", "_") for word in requirements)
    return {{"pyyaml": "yaml"}.get(name, name) for name in names}


def placeholders(text: str) -> list[str]:
    """Words that stand for what is still to be written or measured."""
    return re.findall(r"\b(?:TBM|TBD|TODO|FIXME|XXX)\b", text)


def sizes(package: Path, allowed: Mapping[str, str]) -> list[str]:
    """Files, functions, arguments and folders that are too large and not on the allow-list."""
    found: dict[str, str] = {}
    folders: dict[str, int] = {}
    for name, tree, text in sources(package):
        folder, _, file = name.rpartition("/")
        folders[folder] = folders.get(folder, 0) + (file != "__init__.py")
        if (lines := text.count("\n")) > MAX_FILE_LINES:
            found[name] = f"{lines} lines, at most {MAX_FILE_LINES}"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found |= _function(name, node)
    for folder, count in folders.items():
        if count > MAX_FILES:
            found[folder] = f"{count} files, at most {MAX_FILES}"
    unused = [
        f"allow-list: '{place}' is not too large any more; take it off"
        for place in allowed
        if place not in found
    ]
    return [f"{place}: {what}" for place, what in found.items() if place not in allowed] + unused


def _function(name: str, node: ast.FunctionDef | ast.AsyncFunctionDef) -> dict[str, str]:
    place = f"{name}:{node.name}"
    lines = (node.end_lineno or 0) - node.lineno + 1
    if lines > MAX_FUNCTION_LINES:
        return {place: f"{lines} lines, at most {MAX_FUNCTION_LINES}"}
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    count = len([a for a in arguments if a.arg not in ("self", "cls")])
    return {place: f"{count} arguments, at most {MAX_ARGUMENTS}"} if count > MAX_ARGUMENTS else {}


def forbidden(package: Path) -> list[str]:
    """What runs foreign code or hides state; `print` and the environment outside their one place."""
    found = []
    for name, tree, _ in sources(package):
        room = name.split("/")[1]
        for node in ast.walk(tree):
            if what := _construct(node, is_cli=room == "cli", is_runtime=name.endswith("core/runtime.py")):
                found.append(f"{name}:{getattr(node, 'lineno', 0)}: {what}")
    return found


_MODULES = ("pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib")
_CALLS = {
    "eval": "eval( runs foreign code",
    "exec": "exec( runs foreign code",
    "compile": "compile( makes code from text",
    "torch.load": "torch.load reads pickles; use safetensors",
    "os.system": "os.system starts a shell",
    "os.popen": "os.popen starts a shell",
    "yaml.unsafe_load": "yaml.unsafe_load runs foreign code",
}
_ENVIRONMENT = ("os.environ", "os.getenv", "os.putenv")


def _construct(node: ast.AST, *, is_cli: bool, is_runtime: bool) -> str | None:
    if isinstance(node, ast.Import | ast.ImportFrom):
        return _import_problem(node, is_runtime)
    if isinstance(node, ast.Call):
        called = _dotted(node.func)
        if called in _CALLS:
            return _CALLS[called]
        if called == "print" and not is_cli:
            return "print outside the cli; return the text, or use core.metrics.Progress"
        for keyword in node.keywords:
            value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
            if keyword.arg == "shell" and value is not False:
                return "shell=True; pass a list of arguments"
            if keyword.arg == "trust_remote_code" and value is not False:
                return "trust_remote_code=True runs foreign code"
            if keyword.arg == "allow_pickle" and value is not False:
                return "allow_pickle=True reads pickles"
    if isinstance(node, ast.Attribute) and _dotted(node) in _ENVIRONMENT and not is_runtime:
        return "environment variables are read in core/runtime only"
    if isinstance(node, ast.ExceptHandler) and node.type is None:
        return "bare except; name the errors"
    return None


def _import_problem(node: ast.Import | ast.ImportFrom, is_runtime: bool) -> str | None:
    modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
    for module in modules:
        if module.split(".")[0] in _MODULES:
            return f"{module} reads code from files; use JSON or safetensors"
    if isinstance(node, ast.ImportFrom):
        names = [a.name for a in node.names]
        if node.module == "os" and {"environ", "getenv"} & set(names) and not is_runtime:
            return "environment variables are read in core/runtime only"
        if node.module == "torch" and "load" in names:
            return _CALLS["torch.load"]
    return None
