"""Broken artifacts, artifacts that do not belong together, and places that are none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from artifacts import write_model, write_tokenizer
from broken_house import CORPUS, Prepare, Room

from microlm.core.artifact import open_artifact


def damaged(room: Room, name: str, words: list[str], at: float = 0.9) -> list[str]:
    room.flip(name, at)
    return words


def merge(room: Room, model: str = "sft", adapter: str = "lora") -> list[str]:
    return room.stage("merge", model=f"runs/{model}", adapter=f"runs/{adapter}")


def manifest(room: Room, change: Callable[[dict[str, Any]], Any]) -> list[str]:
    path = room.path / "runs/sft/manifest.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    return merge(room)


def raw_manifest(room: Room, data: bytes) -> list[str]:
    room.write("runs/sft/manifest.json", data)
    return merge(room)


def extra_file(room: Room) -> list[str]:
    room.write("runs/sft/more.bin", b"x")
    return merge(room)


def no_manifest(room: Room, folder: bool = False) -> list[str]:
    room.unlink("runs/sft/manifest.json")
    if folder:
        (room.path / "runs/sft/manifest.json").mkdir()
    return merge(room)


def other_tokenizer(room: Room) -> list[str]:
    data = open_artifact("runs/data")
    small = write_tokenizer(room.path / "runs/small", data, vocab_size=300)
    write_model(room.path / "runs/foreign", small, data)
    return room.stage("sft", model="runs/foreign", shards="runs/shards")


# kind → (how to break it and what to call, what the sentence says: the place, and what is wrong)
ARTIFACTS: dict[str, tuple[Prepare, str]] = {
    "flipped byte in the weights": (
        lambda r: damaged(r, "runs/sft/model.safetensors", merge(r)),
        r"runs/sft/model\.safetensors: changed since.*; ",
    ),
    "flipped byte in tokenizer.json": (
        lambda r: damaged(r, "runs/sft/tokenizer.json", merge(r)),
        r"runs/sft/tokenizer\.json: changed since.*; ",
    ),
    "flipped byte in config.json": (
        lambda r: damaged(r, "runs/sft/config.json", merge(r)),
        r"runs/sft/config\.json: changed since.*; ",
    ),
    "flipped byte in an adapter": (
        lambda r: damaged(r, "runs/lora/adapter_model.safetensors", merge(r)),
        r"runs/lora/adapter_model\.safet.*changed",
    ),
    "flipped byte in shards": (
        lambda r: damaged(
            r,
            "runs/shards/documents-train.tokens.bin",
            r.stage("pretrain", shards="runs/shards", architecture={"preset": "4m"}),
        ),
        r"runs/shards/documents-train\.tokens\.bin: changed since",
    ),
    "flipped byte in data": (
        lambda r: damaged(r, "runs/data/documents/train.jsonl", r.stage("tokenizer", data="runs/data")),
        r"runs/data/documents/train\.jsonl: changed since",
    ),
    "flipped byte in a log": (
        lambda r: damaged(r, "runs/data/logs/audit.json", r.stage("tokenizer", data="runs/data")),
        r"runs/data/logs/audit\.json: changed since",
    ),
    "flipped byte at a manifest's start": (
        lambda r: damaged(r, "runs/sft/manifest.json", merge(r), 0),
        r"runs/sft/manifest\.json: not valid JSON.*; ",
    ),
    "a file too much": (extra_file, r"runs/sft/more\.bin: extra since.*; "),
    "manifest missing": (no_manifest, r"runs/sft: no manifest\.json there.*; "),
    "manifest of another format": (
        lambda r: manifest(r, lambda m: m | {"format": 9}),
        r"runs/sft/manifest\.json: manifest format 9, this .* reads 1; ",
    ),
    "manifest without a field": (
        lambda r: manifest(r, lambda m: {k: v for k, v in m.items() if k != "files"}),
        r"manifest\.json: a field is missing",
    ),
    "manifest that leaves its folder": (
        lambda r: manifest(r, lambda m: m | {"files": [m["files"][0] | {"path": "../../x"}]}),
        r"manifest\.json: a field",
    ),
    "manifest is a list": (
        lambda r: manifest(r, lambda m: [m]),
        r"runs/sft/manifest\.json: manifest format None",
    ),
    "manifest is not JSON": (
        lambda r: raw_manifest(r, b"{oops"),
        r"runs/sft/manifest\.json: not valid JSON.*; ",
    ),
    "manifest is not UTF-8": (
        lambda r: raw_manifest(r, b'"\xff"'),
        r"runs/sft/manifest\.json: not valid JSON.*; ",
    ),
    "manifest is a folder": (
        lambda r: no_manifest(r, folder=True),
        r"runs/sft/manifest\.json: cannot be read",
    ),
    "adapter for another base": (
        lambda r: merge(r, adapter="other-lora"),
        r"runs/other-lora: the adapter was made for model.*; give the model",
    ),
    "a model for an adapter": (
        lambda r: merge(r, adapter="other"),
        r"runs/other: is of kind model, but 'adapter' takes adapter; give",
    ),
    "export of another model than was evaluated": (
        lambda r: r.stage("export", model="runs/other", scores="runs/scores"),
        r"runs/scores: the scores are of .*; export",
    ),
    "shards of another tokenizer": (
        other_tokenizer,
        r"runs/shards: was made with another tokenizer than that of .*; tokenize",
    ),
    "another artifact's place is no artifact": (
        lambda r: r.corpus(CORPUS, out=str(Path(r.write("mine/notes.txt", b"x")).parent)),
        r"mine: is in the way.*; move",
    ),
    "a file in the way": (
        lambda r: r.corpus(CORPUS, out=f"{r.write('f', b'x')}/data"),
        r"f.*: a file stands where.*; move",
    ),
    "lineage of no artifact": (
        lambda r: ["lineage", str(Path(r.write("mine/notes.txt", b"x")).parent)],
        r"mine: no artifact there or below; give",
    ),
    "lineage of nothing": (lambda r: ["lineage", "none"], r"none: .*; give"),
    "rm of what others need": (
        lambda r: ["runs", "rm", "tokenizer"],
        r"runs/tokenizer: '.*shards' was made from it; remove that first",
    ),
    "rm of nothing": (lambda r: ["runs", "rm", "none"], r"none: no such run in runs; see"),
    "rm of everything": (lambda r: ["runs", "rm", "."], r"\.: that is all of runs; name one run"),
    "runs list of nothing": (lambda r: ["runs", "list", "none"], r"none: no such directory; give"),
}
