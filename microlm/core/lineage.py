"""The family tree of an artifact, every file of it checked against its manifest.

Enters: an artifact's directory, or a run directory that holds several. Leaves: `Node`s, as text or JSON.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from microlm.core import manifest, storage
from microlm.core.errors import UserError

MAX_DEPTH = 4  # how far below a run directory artifacts are looked for


@dataclass
class Node:
    """An artifact in the tree. `problems` are damage; `notes` are no damage (an input that is gone)."""

    url: str
    kind: str = "?"
    digest: str = ""
    key: str = ""
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    inputs: dict[str, Node] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The last part of its place."""
        return self.url.rstrip("/").rpartition("/")[2]

    def walk(self) -> Iterator[Node]:
        """This node and everything it was made from, each once."""
        seen: set[str] = set()
        waiting = [self]
        while waiting:
            node = waiting.pop()
            if node.url not in seen:
                seen.add(node.url)
                yield node
                waiting.extend(node.inputs.values())


def tree(url: str, *, verify: bool = True) -> Node:
    """The artifact at `url` with all its ancestors. Without `verify` only manifests are read."""
    manifest.open_artifact(url)
    return _node(_absolute(url), {}, verify)


def forest(url: str, *, verify: bool = True) -> list[Node]:
    """The trees of the artifact at `url`, or of those under it that none of the others was made from."""
    urls = [url] if manifest.find(url) else list(find_artifacts(url))
    if not urls:
        raise UserError(f"{url}: no artifact there or below; give a run directory or a stage's directory")
    made: dict[str, Node] = {}
    nodes = [_node(_absolute(u), made, verify) for u in urls]
    used = {child.url for node in made.values() for child in node.inputs.values()}
    return [node for node in nodes if node.url not in used] or nodes


def check(url: str) -> list[str]:
    """What is wrong with one artifact's own files, `name: what`; empty when every byte is right."""
    return [f"{name}: {what}" for name, what in manifest.damages(manifest.open_artifact(url)).items()]


def is_intact(nodes: Sequence[Node]) -> bool:
    """Whether no artifact in these trees has a problem."""
    return not any(part.problems for node in nodes for part in node.walk())


def find_artifacts(url: str, depth: int = MAX_DEPTH) -> Iterator[str]:
    """Every finished artifact at or below `url`, sorted; what is being made (`.tmp`) is passed over."""
    names = storage.list_names(url)
    if manifest.MANIFEST in names:
        yield url
    elif depth:
        for name in names:
            if not name.startswith(".") and not name.endswith(".tmp"):
                yield from find_artifacts(storage.join(url, name), depth - 1)


def input_url(url: str, path: str) -> str:
    """Where an input lies that the manifest of `url` names; paths are relative to the artifact's parent."""
    if storage.is_remote(path) or storage.is_remote(url) or path.startswith(storage.BUILTIN):
        return path
    return str((storage.local_path(url).resolve().parent / path).resolve())


def render(nodes: Sequence[Node]) -> str:
    """The trees as text, one artifact a line; one that was shown before is not unfolded again."""
    lines: list[str] = []
    seen: set[str] = set()
    for node in nodes:
        _lines(node, "", "", "", lines, seen)
    return "\n".join(lines)


def to_json(nodes: Sequence[Node]) -> dict[str, Any]:
    """The trees as one JSON object: a flat list of artifacts that name their inputs, and the roots."""
    parts = {part.url: part for node in nodes for part in node.walk()}
    rows = [
        {
            "name": n.name,
            "path": n.url,
            "kind": n.kind,
            "digest": n.digest or None,
            "key": n.key or None,
            "ok": not n.problems,
            "problems": n.problems,
            "notes": n.notes,
            "inputs": {k: child.url for k, child in n.inputs.items()},
        }
        for n in parts.values()
    ]
    return {"schema": 1, "ok": is_intact(nodes), "roots": [n.url for n in nodes], "artifacts": rows}


def _absolute(url: str) -> str:
    return url.rstrip("/") if storage.is_remote(url) else str(storage.local_path(url).resolve())


def _node(url: str, made: dict[str, Node], verify: bool) -> Node:
    if url in made:
        return made[url]
    node = made[url] = Node(url)
    try:
        artifact = manifest.open_artifact(url)
    except UserError as e:
        node.problems.append(str(e).removeprefix(f"{url}/"))
        return node
    node.kind, node.digest, node.key = artifact.kind, artifact.digest, artifact.key
    if verify:
        node.problems += [f"{name}: {what}" for name, what in manifest.damages(artifact).items()]
    for name, reference in artifact.manifest["inputs"].items():
        _add_input(node, name, reference, made, verify)
    return node


def _add_input(node: Node, name: str, reference: dict[str, str], made: dict[str, Node], verify: bool) -> None:
    place = input_url(node.url, reference["path"])
    if manifest.find(place) is None:
        node.notes.append(f"input {name} ({reference['path']}, digest {reference['digest'][:12]}) is gone")
        return
    child = node.inputs[name] = _node(place, made, verify)
    if child.digest and child.digest != reference["digest"]:
        was, now = reference["digest"][:12], child.digest[:12]
        node.problems.append(f"input {name} ({reference['path']}) was {was} and is now {now}")


def _lines(node: Node, field_name: str, lead: str, below: str, lines: list[str], seen: set[str]) -> None:
    again = node.url in seen
    seen.add(node.url)
    state = "DAMAGED" if node.problems else "ok"
    head = f"{field_name}: {node.name}" if field_name and field_name != node.name else node.name
    text = f"{lead}{head}  {node.kind}  digest {node.digest[:12] or '?'}  key {node.key[:12] or '?'}  {state}"
    lines.append(text + ("  (see above)" if again and node.inputs else ""))
    if again:
        return
    mark = "│ " if node.inputs else "  "
    lines += [f"{below}{mark}! {problem}" for problem in node.problems]
    lines += [f"{below}{mark}· {note}" for note in node.notes]
    children = list(node.inputs.items())
    for i, (name, child) in enumerate(children):
        last = i == len(children) - 1
        fork, next_below = ("└─ ", "   ") if last else ("├─ ", "│  ")
        _lines(child, name, below + fork, below + next_below, lines, seen)
