"""Every kind of broken corpus, recipe and artifact through the real command line: one sentence, or a count."""

from __future__ import annotations

import errno
import gzip
import json
import os
import random
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import zstandard
from broken_house import CORPUS, LINES, Room, fail_at, fill_disk, lock_folder, make_room, plain_web_server, write_run

from microlm.cli import main
from microlm.core.artifact import Workspace, open_artifact
from microlm.text.tokenizer import copy_files

NEXT_STEP = re.compile(r"; \w|, (expected|give|write|choose)|expected |did you mean|known: ")
PREFIX = {1: ("check failed: ", "damaged: "), 2: ("error: ",)}


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("house") / "runs")


@pytest.fixture
def room(finished_run: Path, tmp_path: Path) -> Iterator[Room]:
    with make_room(finished_run, tmp_path) as made:
        yield made


def call(words: list[str]) -> int:
    with pytest.raises(SystemExit) as e:
        main(words)
    return int(e.value.code or 0)


# ---- a broken line or file: dropped and counted -------------------------------------------------------------


def with_line(line: bytes) -> bytes:
    return b"\n".join([*LINES[:4], line, *LINES[4:]]) + b"\n"


def many() -> bytes:
    """Lines that do not pack well: three blocks of zstd."""
    drawn, letters = random.Random(0), [chr(c) for c in range(0x4E00, 0x9FA5)]
    rows = ("".join(drawn.choices(letters, k=400)) for _ in range(300))
    return b"".join(f'{{"text": "{row}"}}\n'.encode() for row in rows)


MANY = many()
LONG = b'{"text": "' + b"x" * (50 << 20) + b'"}'

# kind → (file name, bytes, reason of the drop)
COUNTED: dict[str, tuple[str, bytes, str]] = {
    "invalid UTF-8": ("c.jsonl", with_line(b'{"text": "\xe6\xff"}'), "invalid_utf8"),
    "lone surrogate, escaped": ("c.jsonl", with_line(b'{"text": "a\\ud800"}'), "lone_surrogate"),
    "lone surrogate, as bytes": ("c.jsonl", with_line(b'{"text": "\xed\xa0\x80"}'), "invalid_utf8"),
    "NUL": ("c.jsonl", with_line(b'{"text": "a\x00b"}'), "nul_byte"),
    "50 MB line": ("c.jsonl", with_line(LONG), "line_too_long"),
    "50 MB line, packed": ("c.jsonl.zst", zstandard.compress(with_line(LONG)), "line_too_long"),
    "half a JSON object": ("c.jsonl", with_line(b'{"text": "a'), "invalid_json"),
    "a list": ("c.jsonl", with_line(b'["a"]'), "not_an_object"),
    "wrong key": ("c.jsonl", with_line(b'{"txt": "a"}'), "missing_field:text (found txt)"),
    "wrong type": ("c.jsonl", with_line(b'{"text": 5}'), "text_not_a_string"),
    "null": ("c.jsonl", with_line(b'{"text": null}'), "text_null"),
    "unknown role": ("c.jsonl", with_line(b'{"messages": [{"role": "bot", "content": "x"}]}'), "bad_role"),
    "missing field of a message": (
        "c.jsonl", with_line(b'{"messages": [{"role": "user"}]}'), "missing_field:content (found role)",
    ),
    "half a gzip": ("c.jsonl.gz", gzip.compress(MANY)[: len(gzip.compress(MANY)) // 2], "truncated_file"),
    "half a zst": (
        "c.jsonl.zst", zstandard.compress(MANY)[: len(zstandard.compress(MANY)) // 2], "truncated_file",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", COUNTED)
def test_what_is_dropped_is_counted(room: Room, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, data, reason = COUNTED[kind]
    words = room.corpus(data, name)
    assert call(words) == 0, capsys.readouterr().err
    audit = json.loads(Path("out/data/logs/audit.json").read_bytes())
    read = audit["steps"]["read"]
    assert {r["reason"]: r["records"] for r in read["reasons"]} == {reason: 1}
    assert read["reasons"][0]["examples"][0].startswith(f"{name}:")
    dropped = sum(step["dropped"] for step in audit["steps"].values())
    accepted = sum(n for splits in audit["written"].values() for n in splits.values())
    assert accepted + dropped == read["read"] and accepted > 0
    assert "Traceback" not in capsys.readouterr().err


def test_a_byte_order_mark_is_no_fault(room: Room) -> None:
    assert call(room.corpus(b"\xef\xbb\xbf" + CORPUS)) == 0
    read = json.loads(Path("out/data/logs/audit.json").read_bytes())["steps"]["read"]
    assert (read["read"], read["kept"]) == (9, 9)


# ---- what cannot go on: one sentence ------------------------------------------------------------------------


def two_sources(room: Room, first: bytes, second: bytes) -> list[str]:
    return room.corpus(first, "train.jsonl", source=["jsonl:train.jsonl", f"jsonl:{room.write('valid.jsonl', second)}"])


def entities(room: Room, text: str) -> list[str]:
    return room.stage("data", entities=room.write("mine.jsonl", text))


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


def unsigned(room: Room) -> str:
    """A model directory without a manifest, to be damaged and asked directly."""
    (room.path / "runs/sft").rename(room.path / "model")
    (room.path / "model/manifest.json").unlink()
    return "model"


def asked(room: Room, change: Callable[[Path], Any], *words: str) -> list[str]:
    change(room.path / unsigned(room))
    return ["generate", "model", *(words or ("x",))]


def config(**fields: Any) -> Callable[[Path], Any]:
    def change(model: Path) -> None:
        data = json.loads((model / "config.json").read_text()) | fields
        (model / "config.json").write_text(json.dumps({k: v for k, v in data.items() if v is not ...}))

    return change


def cut(name: str, share: float) -> Callable[[Path], Any]:
    def change(model: Path) -> None:
        data = (model / name).read_bytes()
        (model / name).write_bytes(data[: int(share * len(data))])

    return change


def tokenizer_file(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    def rewrite(model: Path) -> None:
        data = json.loads((model / "tokenizer.json").read_text())
        change(data)
        (model / "tokenizer.json").write_text(json.dumps(data))

    return rewrite


def without_controls(data: dict[str, Any]) -> None:
    data["added_tokens"] = []
    for word in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"):
        data["model"]["vocab"][f"word{data['model']['vocab'].pop(word)}"] = 0


def one_prompt(room: Room, line: str) -> list[str]:
    return ["generate", "runs/sft", "--prompts", room.write("p.jsonl", '{"prompt": "a"}\n' + line)]


def dead_url() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def web(room: Room, *words: str) -> list[str]:
    stack = ExitStack()
    room.patch.setattr(room, "web", stack, raising=False)
    return [word.format(url=stack.enter_context(plain_web_server())) for word in words]


DATA = "stage: data\nout: out/data\nsource: jsonl:corpus.jsonl\n"
SCHEMA = '{"type": "nonsense"}'
Prepare = Callable[[Room], list[str]]

# kind → (how to break it and what to call, what the sentence says: the place, and what is wrong)
CORPORA: dict[str, tuple[Prepare, str]] = {
    "empty file": (lambda r: r.corpus(b""), r"corpus\.jsonl: holds no records, the file is empty; "),
    "empty gzip": (lambda r: r.corpus(gzip.compress(b""), "c.jsonl.gz"), r"c\.jsonl\.gz: holds no records"),
    "UTF-16": (lambda r: r.corpus(CORPUS.decode().encode("utf-16")), r"corpus\.jsonl: is UTF-16; save it as UTF-8"),
    "binary": (lambda r: r.corpus(os.urandom(4096)), r"corpus\.jsonl: looks like a binary file"),
    "a zip": (lambda r: r.corpus(b"PK\x03\x04xx"), r"corpus\.jsonl: is a zip archive; unpack it first"),
    "a JSON array": (lambda r: r.corpus(b'[{"text": "a"},\n{"text": "b"}]'), r"corpus\.jsonl: is not one JSON object"),
    "wrong key everywhere": (
        lambda r: r.corpus(CORPUS.replace(b"text", b"body")), r"corpus\.jsonl:1: .*'text'.*rename the field",
    ),
    "field renamed between splits": (
        lambda r: two_sources(r, CORPUS, CORPUS.replace(b"text", b"content")), r"valid\.jsonl:1: .*rename the field",
    ),
    "strict": (lambda r: r.corpus(with_line(b"{"), strict=True), r"corpus\.jsonl:5: .*set strict: false"),
    "strict and half a gzip": (
        lambda r: r.corpus(gzip.compress(MANY)[:-9], "c.jsonl.gz", strict=True), r"c\.jsonl\.gz:\d+: .*fetch the file",
    ),
    "no such file": (lambda r: r.stage("data", source="jsonl:none.jsonl"), r"none\.jsonl: no such file; check"),
    "a folder": (lambda r: r.stage("data", source="jsonl:runs"), r"runs: is a directory, expected a file"),
    "a folder without texts": (lambda r: r.stage("data", source="text:runs"), r"runs: holds no \.txt"),
    "unknown extension": (lambda r: r.corpus(b"text\nx\n", "c.csv"), r"c\.csv: '\.csv' is not one of .*convert it"),
    "unknown kind of source": (lambda r: r.stage("data", source="csv:a.csv"), r"data\.source 'csv:a\.csv': .*jsonl:"),
    "no source": (lambda r: r.stage("data", source=[]), r"data\.source: is an empty list; name at least one"),
    "a NUL in the name": (lambda r: r.stage("data", source="jsonl:a\0.jsonl"), r"a.*\.jsonl: .*; check the path"),
    "a remote source": (lambda r: r.stage("data", source="jsonl:s3://b/a.jsonl"), r"s3://b/a\.jsonl.*download"),
    "nothing is left": (
        lambda r: r.corpus(CORPUS, min_chars=99), r"data\.source: nothing is left of 9 records .*too_short 9.*; \w",
    ),
    "a binary text": (lambda r: r.corpus(b"\xff\x80" + b"x" * 99, "c.txt"), r"c\.txt: byte 0 is not UTF-8"),
    "entities: unknown topic": (
        lambda r: entities(r, '{"topic": "人", "name": "a", "facts": {"b": "c"}}'),
        r"mine\.jsonl:1: unknown topic '人'; did you mean '人物'",
    ),
    "entities: unknown relation": (
        lambda r: entities(r, '\n{"topic": "人物", "name": "a", "facts": {"出生": "c"}}'),
        r"mine\.jsonl:2: unknown relation '出生'; did you mean '出生",
    ),
    "entities: missing field": (
        lambda r: entities(r, '{"topic": "人物", "facts": {"b": "c"}}'), r"mine\.jsonl:1: key 'name' must be text",
    ),
    "entities: not JSON": (lambda r: entities(r, "李白"), r"mine\.jsonl:1: not a JSON object; expected"),
    "entities: missing": (lambda r: r.stage("data", entities="none.jsonl"), r"none\.jsonl: no such file; check"),
    "entities: empty": (lambda r: entities(r, ""), r"mine\.jsonl: holds no entities; expected"),
}  # fmt: skip

RECIPES: dict[str, tuple[Prepare, str]] = {
    "not YAML": (lambda r: r.recipe("a: [1,\nb: 2"), r"recipe\.yaml:2:\d+: not valid YAML"),
    "tabs": (lambda r: r.recipe("stage: data\nfactbook:\n\tdocuments: 5\n"), r"recipe\.yaml:3:1: .*\\t.*spaces"),
    "a list": (lambda r: r.recipe("- a\n"), r"recipe\.yaml: .*holds list"),
    "empty": (lambda r: r.recipe(""), r"recipe\.yaml: the recipe is empty"),
    "not UTF-8": (lambda r: r.recipe(DATA.encode() + b"# \xff"), r"recipe\.yaml: byte \d+ is not UTF-8; save"),
    "UTF-16": (lambda r: r.recipe(DATA.encode("utf-16")), r"recipe\.yaml: byte 0 is not UTF-8; save"),
    "NUL": (lambda r: r.recipe(DATA + "a: \0\n"), r"recipe\.yaml: not valid YAML .*; save"),
    "missing": (lambda r: ["run", "no.yaml"], r"no\.yaml: no such recipe; recipes/"),
    "a directory": (lambda r: ["run", "runs"], r"runs: is a directory, expected a recipe file"),
    "under a file": (lambda r: ["run", f"{r.write('a', b'')}/b.yaml"], r"a/b\.yaml: cannot be read .*; check the path"),
    "duplicate key": (lambda r: r.recipe(DATA + "out: x\n"), r"recipe\.yaml:4:1: .*key 'out' stands twice"),
    "alias": (lambda r: r.recipe("stage: &a data\nout: *a\n"), r"recipe\.yaml:2:6: .*aliases"),
    "unknown key": (lambda r: r.recipe(DATA + "min_char: 3\n"), r"unknown key 'min_char'; did you mean 'min_chars'"),
    "unknown key in a block": (
        lambda r: r.recipe(DATA + "factbook: {docs: 3}\n"), r"unknown key 'factbook\.docs'; did you mean 'documents'",
    ),
    "missing key": (lambda r: r.recipe("stage: tokenizer\nout: out/t\n"), r"recipe\.yaml: .*key 'data' is missing; add"),
    "no place": (lambda r: r.recipe("stage: data\n"), r"recipe\.yaml: key 'out' is missing; add"),
    "neither stage nor stages": (lambda r: r.recipe("out: x\n"), r"recipe\.yaml: has neither 'stages:' .*stage types"),
    "unknown stage": (lambda r: r.recipe("stages: [{stage: pretran}]"), r"entry 1: .*'pretran'; did you mean 'pretrain'"),
    "a stage's name leaves the run": (
        lambda r: r.recipe("stages: [{stage: data, name: ../../x}]"), r"entry 1: name '\.\./\.\./x' cannot",
    ),
    "two stages of one name": (lambda r: r.recipe("stages: [{stage: data}, {stage: data}]"), r"entry 2: a second stage"),
    "unknown input name": (lambda r: r.pipeline("tokenizer.data=dta"), r"tokenizer\.data: 'dta' is no earlier stage; did"),
    "input of a later stage": (
        lambda r: r.recipe("stages: [{stage: tokenizer, data: data}, {stage: data}]"), r"tokenizer\.data: .*move it up",
    ),
    "input is no artifact": (lambda r: r.stage("tokenizer", data="./none"), r"\./none: no manifest\.json there.*; check"),
    "input of another kind": (lambda r: r.stage("tokenize", data="runs/data", tokenizer="runs/sft"), r"runs/sft: .*kind"),
    "wrong type": (lambda r: r.corpus(CORPUS, min_chars="many"), r"recipe\.yaml: .*min_chars: .*\(found 'many'\)"),
    "a list for a number": (lambda r: r.corpus(CORPUS, min_chars=[1]), r"min_chars: .*\(found \[1\]\)"),
    "out of range": (lambda r: r.corpus(CORPUS, test_share=1.5), r"test_share: .*less than 1 .*\(found 1\.5\)"),
    "infinite": (lambda r: r.recipe(DATA + "test_share: .inf\n"), r"test_share: .*finite.*\(found inf\)"),
    "both shares together": (
        lambda r: r.corpus(CORPUS, test_share=0.6, validation_share=0.5), r"test_share.*; ",
    ),
    "vocabulary too small": (
        lambda r: r.stage("tokenizer", data="runs/data", vocab_size=10), r"vocab_size 10 is too small.*; set vocab_size",
    ),
    "override without =": (lambda r: r.pipeline("data.min_chars"), r"override 'data\.min_chars': expected key=value"),
    "override of an unknown stage": (lambda r: r.pipeline("dta.strict=true"), r"'dta' is neither .*; did you mean 'data'"),
    "override of an unknown key": (lambda r: r.pipeline("data.stict=true"), r"unknown key 'stict'; did you mean 'strict'"),
    "override of a stage": (lambda r: r.pipeline("data=3"), r"override 'data=3': 'data' is a stage; write data\.KEY"),
    "override of a value's part": (
        lambda r: r.pipeline("data.source.x=1"), r"override '.*source\.x=1': 'source' is a value, not a block",
    ),
    "override that is not YAML": (lambda r: r.pipeline("data.strict={"), r"override '.*strict=\{'.*: not valid YAML"),
    "a recipe of another stage": (
        lambda r: ["sft", r.stage("merge", model="a", adapter="b")[1]], r"recipe\.yaml: is a recipe of stage 'merge'",
    ),
    "a pipeline without the stage": (
        lambda r: ["pretrain", r.pipeline()[1]], r"recipe\.yaml: holds no stage of type 'pretrain'",
    ),
}  # fmt: skip

ARTIFACTS: dict[str, tuple[Prepare, str]] = {
    "flipped byte in the weights": (
        lambda r: damaged(r, "runs/sft/model.safetensors", merge(r)), r"runs/sft/model\.safetensors: changed since.*; ",
    ),
    "flipped byte in tokenizer.json": (
        lambda r: damaged(r, "runs/sft/tokenizer.json", merge(r)), r"runs/sft/tokenizer\.json: changed since.*; ",
    ),
    "flipped byte in config.json": (
        lambda r: damaged(r, "runs/sft/config.json", merge(r)), r"runs/sft/config\.json: changed since.*; ",
    ),
    "flipped byte in an adapter": (
        lambda r: damaged(r, "runs/lora/adapter_model.safetensors", merge(r)), r"runs/lora/adapter_model\.safet.*changed",
    ),
    "flipped byte in shards": (
        lambda r: damaged(
            r, "runs/shards/documents-train.tokens.bin", r.stage("pretrain", shards="runs/shards")
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
        lambda r: damaged(r, "runs/sft/manifest.json", merge(r), 0), r"runs/sft/manifest\.json: not valid JSON.*; ",
    ),
    "a file too much": (
        lambda r: [*merge(r), *(r.write("runs/sft/more.bin", b"x") and [])], r"runs/sft/more\.bin: extra since.*; ",
    ),
    "manifest missing": (
        lambda r: [*merge(r), *((r.path / "runs/sft/manifest.json").unlink() or [])], r"runs/sft: no manifest\.json there",
    ),
    "manifest of another format": (
        lambda r: manifest(r, lambda m: m | {"format": 9}), r"runs/sft/manifest\.json: manifest format 9, this .* reads 1; ",
    ),
    "manifest without a field": (
        lambda r: manifest(r, lambda m: {k: v for k, v in m.items() if k != "files"}), r"manifest\.json: a field is missing",
    ),
    "manifest that leaves its folder": (
        lambda r: manifest(r, lambda m: m | {"files": [m["files"][0] | {"path": "../../x"}]}), r"manifest\.json: a field",
    ),
    "manifest is a list": (lambda r: manifest(r, lambda m: [m]), r"runs/sft/manifest\.json: manifest format None"),
    "manifest is not JSON": (lambda r: raw_manifest(r, b"{oops"), r"runs/sft/manifest\.json: not valid JSON.*; "),
    "manifest is not UTF-8": (lambda r: raw_manifest(r, b'"\xff"'), r"runs/sft/manifest\.json: not valid JSON.*; "),
    "manifest is a folder": (
        lambda r: [*merge(r), *((r.path / "runs/lora/manifest.json").unlink() or []),
                   *((r.path / "runs/lora/manifest.json").mkdir() or [])],
        r"runs/lora/manifest\.json: cannot be read",
    ),
    "adapter for another base": (
        lambda r: merge(r, adapter="other-lora"), r"runs/other-lora: the adapter was made for model.*; give the model",
    ),
    "a model for an adapter": (lambda r: merge(r, adapter="other"), r"runs/other: holds no 'adapter_config\.json'"),
    "export of another model than was evaluated": (
        lambda r: r.stage("export", model="runs/other", scores="runs/scores"), r"runs/scores: the scores are of .*; export",
    ),
    "shards of another tokenizer": (
        lambda r: other_tokenizer(r), r"runs/shards: was made with another tokenizer than that of .*; tokenize",
    ),
    "another artifact's place is no artifact": (
        lambda r: r.corpus(CORPUS, out=str(Path(r.write("mine/notes.txt", b"x")).parent)), r"mine: is in the way.*; move",
    ),
    "a file in the way": (lambda r: r.corpus(CORPUS, out=f"{r.write('f', b'x')}/data"), r"f.*: a file stands where.*; move"),
    "lineage of no artifact": (
        lambda r: ["lineage", str(Path(r.write("mine/notes.txt", b"x")).parent)], r"mine: no artifact there or below; give",
    ),
    "lineage of nothing": (lambda r: ["lineage", "none"], r"none: .*; give"),
    "rm of what others need": (
        lambda r: ["runs", "rm", "tokenizer"], r"runs/tokenizer: '.*shards' was made from it; remove that first",
    ),
    "rm of nothing": (lambda r: ["runs", "rm", "none"], r"none: no such run in runs; see"),
    "rm of everything": (lambda r: ["runs", "rm", "."], r"\.: that is all of runs; name one run"),
    "runs list of nothing": (lambda r: ["runs", "list", "none"], r"none: no such directory; give"),
}  # fmt: skip


def other_tokenizer(room: Room) -> list[str]:
    from artifacts import sign, write_model, write_tokenizer

    data = open_artifact("runs/data")
    small = write_tokenizer(room.path / "runs/small", data, vocab_size=300)
    write_model(room.path / "runs/foreign", small, data)
    assert sign is not None
    return room.stage("sft", model="runs/foreign", shards="runs/shards")


MODELS: dict[str, tuple[Prepare, str]] = {
    "truncated weights": (lambda r: asked(r, cut("model.safetensors", 0.5)), r"model\.safetensors: not a whole .*; copy"),
    "weights cut in their head": (lambda r: asked(r, cut("model.safetensors", 0.01)), r"model\.safetensors: not a whole"),
    "empty weights": (lambda r: asked(r, cut("model.safetensors", 0)), r"model\.safetensors: not a whole"),
    "weights missing": (lambda r: asked(r, lambda m: (m / "model.safetensors").unlink()), r"model: no model\.safetensors"),
    "flipped byte in the weights' head": (
        lambda r: asked(r, lambda m: r.flip("model/model.safetensors", 0)), r"model/model\.safetensors: not a whole",
    ),
    "flipped byte in tokenizer.json": (
        lambda r: asked(r, lambda m: r.flip("model/tokenizer.json", 0)), r"model/tokenizer\.json: not a tokenizer file",
    ),
    "flipped byte in config.json": (
        lambda r: asked(r, lambda m: r.flip("model/config.json", 0)), r"model/config\.json: not valid JSON; export",
    ),
    "config of gpt2": (lambda r: asked(r, config(model_type="gpt2")), r"config\.json: model_type 'gpt2' is not supported"),
    "config without a size": (lambda r: asked(r, config(hidden_size=...)), r"config\.json: key 'hidden_size' is missing"),
    "config with a word for a size": (lambda r: asked(r, config(hidden_size="big")), r"config\.json: .*whole number"),
    "config with another size": (lambda r: asked(r, config(hidden_size=64)), r"model: '.*' has shape .*config\.json says"),
    "config with endless layers": (
        lambda r: asked(r, config(num_hidden_layers=10**9)), r"config\.json: num_hidden_layers .*; ",
    ),
    "config with a smaller vocabulary": (
        lambda r: asked(r, config(num_attention_heads=3)), r"config\.json: 3 heads, 2 key-value heads.*; heads",
    ),
    "config of rotary scaling": (
        lambda r: asked(r, config(rope_parameters={"rope_type": "yarn"})), r"config\.json: rotary scaling .*; use",
    ),
    "config missing": (lambda r: asked(r, lambda m: (m / "config.json").unlink()), r"model: no model there.*; finish"),
    "tokenizer missing": (
        lambda r: asked(r, lambda m: (m / "tokenizer.json").unlink()), r"model: no tokenizer\.json there",
    ),
    "tokenizer without control tokens": (
        lambda r: asked(r, tokenizer_file(without_controls)), r"model: the tokenizer has no <\|endoftext\|>; ",
    ),
    "tokenizer larger than the model": (
        lambda r: asked(r, tokenizer_file(lambda t: t["model"]["vocab"].update({f"x{i}": 400 + i for i in range(9)}))),
        r"model: the tokenizer has \d+ tokens, the model \d+; ",
    ),
    "no model there": (lambda r: ["generate", "none", "x"], r"none: no such directory; give a run"),
    "a run without a model": (lambda r: ["generate", "runs/data", "x"], r"runs/data: no model there.*; finish"),
    "empty prompt": (lambda r: ["generate", "runs/sft", ""], r"prompt: is empty; write"),
    "no prompt": (lambda r: ["generate", "runs/sft"], r"generate: give either a PROMPT or --prompts"),
    "prompt longer than the window": (
        lambda r: ["generate", "runs/sft", "好" * 999], r"prompt: \d+ tokens, but the window is 128 .*; shorten",
    ),
    "prompt with half a character": (lambda r: ["generate", "runs/sft", "a\udcff"], r"prompt: character 1 is half of"),
    "window larger than the model's": (
        lambda r: ["generate", "runs/sft", "x", "--max-seq-len", "9999"], r"max_seq_len.*9999.*128",
    ),
    "no new tokens": (lambda r: ["generate", "runs/sft", "x", "--max-new-tokens", "0"], r"max_tokens.*; "),
    "negative temperature": (lambda r: ["generate", "runs/sft", "x", "--temperature", "-1"], r"temperature.*-1"),
    "a schema that is none": (
        lambda r: ["generate", "runs/sft", "x", "--json-schema", r.write("s.json", SCHEMA)], r"schema.*; ",
    ),
    "a schema that is missing": (
        lambda r: ["generate", "runs/sft", "x", "--json-schema", "no.json"], r"no\.json: cannot be read .*; check",
    ),
    "a prompts file that is missing": (
        lambda r: ["generate", "runs/sft", "--prompts", "no.jsonl"], r"no\.jsonl: cannot be read .*; check",
    ),
    "a prompts file that is not JSON": (lambda r: one_prompt(r, "oops"), r"p\.jsonl:2: not valid JSON; expected"),
    "a prompts file with another key": (lambda r: one_prompt(r, '{"text": "a"}'), r"p\.jsonl:2: no 'prompt' with a text"),
    "an answers file that is there": (
        lambda r: [*one_prompt(r, ""), "--out", r.write("o.jsonl", b"mine")], r"o\.jsonl: exists already; remove it",
    ),
    "chat with a dead URL": (lambda r: ["chat", dead_url()], r"http://127.*: cannot connect .*is 'microlm serve DIR'"),
    "chat with no URL": (lambda r: ["chat", "http://"], r"'http://': not an address; expected a URL"),
    "chat with no model": (lambda r: ["chat", "none"], r"none: no such directory; give"),
    "chat with a plain web server": (lambda r: web(r, "chat", "{url}"), r"/v1/models: .*OpenAI"),
    "serve on a public address": (
        lambda r: ["serve", "runs/sft", "--host", "0.0.0.0"], r"--host 0\.0\.0\.0: other machines.*; give --api-key-file",
    ),
    "serve with a short key": (
        lambda r: ["serve", "runs/sft", "--port", "0", "--api-key-file", r.write("k", "abc")], r"k: .*shorter than 8.*; make",
    ),
    "serve with a key of two lines": (
        lambda r: ["serve", "runs/sft", "--port", "0", "--api-key-file", r.write("k", "a\nb")], r"k: an API key is one line",
    ),
    "serve with a missing key": (
        lambda r: ["serve", "runs/sft", "--port", "0", "--api-key-file", "no"], r"no: the API key cannot be read .*; write",
    ),
    "serve on no port": (lambda r: ["serve", "runs/sft", "--port", "99999"], r"--port 99999: a port is a number"),
    "serve of nothing": (lambda r: ["serve", "none", "--port", "0"], r"none: no such directory; give"),
    "verify where nothing listens": (lambda r: ["verify", dead_url()], r"http://127.*: cannot connect .*; is"),
    "verify of no address": (lambda r: ["verify", "localhost:8000"], r"'localhost:8000': not an address; expected"),
}  # fmt: skip

CASES = {
    f"{group}: {kind}": case
    for group, table in {"corpus": CORPORA, "recipe": RECIPES, "artifact": ARTIFACTS, "model": MODELS}.items()
    for kind, case in table.items()
}


def require_one_sentence(err: str, code: int, says: str) -> str:
    """Exactly one line is an error; it names the place and a next step, and nothing is a traceback."""
    told = [line for line in err.splitlines() if line.startswith(PREFIX[code])]
    assert len(told) == 1 and err.splitlines()[-1] == told[0], err
    assert "Traceback" not in err
    sentence = told[0].partition(": ")[2]
    assert re.search(says, sentence), sentence
    assert code == 1 or NEXT_STEP.search(sentence), f"no next step: {sentence}"
    assert sentence.isprintable() and len(sentence) < 600, sentence
    return sentence


def require_nothing_left(room: Room, before: dict[str, str]) -> None:
    """No finished file changed, and what is new lies in a `.tmp` folder."""
    after = room.files()
    assert {name: after.get(name) for name in before} == before
    new = [name for name in after if name not in before]
    assert not [n for n in new if not any(part.endswith(".tmp") for part in Path(n).parts)], new
    assert not [n for n in new if n.endswith(("manifest.json", ".lock"))], new


@pytest.mark.parametrize("kind", CASES)
def test_what_is_broken_is_one_sentence(room: Room, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    prepare, says = CASES[kind]
    words = prepare(room)
    before = room.files()
    capsys.readouterr()
    code = call(words)
    out, err = capsys.readouterr()
    assert code == 2, err
    require_one_sentence(err, 2, says)
    assert out == ""
    require_nothing_left(room, before)


def test_there_are_more_than_forty_kinds() -> None:
    assert len(CASES) + len(COUNTED) + len(DISKS) >= 100


# ---- a check that failed: exit code 1 -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "data/documents/train.jsonl", "tokenizer/tokenizer.json", "shards/documents-train.tokens.bin",
        "shards/index.json", "sft/model.safetensors", "sft/config.json", "sft/tokenizer.json",
        "lora/adapter_model.safetensors", "scores/scores.json", "data/logs/audit.json",
    ],
)  # fmt: skip
@pytest.mark.parametrize("at", [0.0, 0.5, 1.0])
def test_lineage_finds_a_flipped_byte(room: Room, name: str, at: float, capsys: pytest.CaptureFixture[str]) -> None:
    room.flip(f"runs/{name}", at)
    assert call(["lineage", "runs"]) == 1
    out, err = capsys.readouterr()
    require_one_sentence(err, 1, f"runs/{name.replace('/', ': ', 1)}: changed")
    assert "DAMAGED" in out


def test_lineage_finds_a_flipped_byte_anywhere_in_a_manifest(room: Room, capsys: pytest.CaptureFixture[str]) -> None:
    path = room.path / "runs/scores/manifest.json"
    data = path.read_bytes()
    for i in range(0, len(data), max(1, len(data) // 40)):
        path.write_bytes(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :])
        assert call(["lineage", "runs/scores"]) in (1, 2), (i, data[max(0, i - 20) : i + 20])
        err = capsys.readouterr().err
        assert "runs/scores" in err and "manifest.json" in err and "Traceback" not in err


def test_verify_of_a_plain_web_server_fails_line_by_line(room: Room, capsys: pytest.CaptureFixture[str]) -> None:
    with plain_web_server() as url:
        assert call(["verify", url]) == 1
    out, err = capsys.readouterr()
    require_one_sentence(err, 1, r"verify: \d+ of 12 checks failed \(models, chat")
    assert "pass         chat" not in out


# ---- disks that refuse --------------------------------------------------------------------------------------

FULL, READ_ONLY, DENIED = errno.ENOSPC, errno.EROFS, errno.EACCES
TOKENIZER: dict[str, Any] = {"data": "runs/data", "vocab_size": 300}

# kind → (the stage that runs, how the disk refuses, what the sentence says)
DISKS: dict[str, tuple[Prepare, Callable[[pytest.MonkeyPatch], None], str]] = {
    **{
        f"disk full after {n} bytes": (
            lambda r: r.corpus(CORPUS), lambda p, n=n: fill_disk(p, n), r"out/data.*: the disk is full; free some space",
        )
        for n in (0, 70, 300, 900, 1500, 4000)
    },
    **{
        f"disk full at fsync {n}": (
            lambda r: r.corpus(CORPUS), lambda p, n=n: fail_at(p, os, "fsync", FULL, n), r"out.*: the disk is full; free",
        )
        for n in (0, 1, 5, 15)
    },
    "disk full at the last rename": (
        lambda r: r.corpus(CORPUS), lambda p: fail_at(p, Path, "rename", FULL), r"out/data.*: the disk is full; free",
    ),
    "disk full under the tokenizer": (
        lambda r: r.stage("tokenizer", **TOKENIZER), lambda p: fill_disk(p, 500), r"out/tokenizer.*: the disk is full",
    ),
    "disk full in safetensors": (
        merge,
        lambda p: fail_at(p, directory_module(), "save_file", FULL),
        r"out/merge.*: the disk is full; free",
    ),
    "disk full while files are copied": (
        merge, lambda p: fail_at(p, __import__("shutil"), "copyfile", FULL), r"out/merge.*|tokenizer.*: the disk is full",
    ),
    "read-only file system": (
        lambda r: r.corpus(CORPUS), lambda p: lock_folder(p, "out", READ_ONLY), r"out.*: the file system is read-only; choose",
    ),
    "folder without permission": (
        lambda r: r.corpus(CORPUS), lambda p: lock_folder(p, "out", DENIED), r"out.*: permission denied; change",
    ),
}  # fmt: skip


def directory_module() -> Any:
    from microlm.model import directory

    return directory


@pytest.mark.parametrize("kind", DISKS)
def test_a_disk_that_refuses_is_one_sentence_and_the_next_run_finishes(
    room: Room, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare, refuse, says = DISKS[kind]
    words = prepare(room)
    assert call([*words, "output=undisturbed"]) == 0
    before = room.files()
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        refuse(patch)
        code = call(words)
    out, err = capsys.readouterr()
    assert code == 2, err
    require_one_sentence(err, 2, says)
    assert out == ""
    require_nothing_left(room, before)
    assert call(words) == 0
    made = next((room.path / "out").iterdir())
    assert open_artifact(str(made)).digest == open_artifact("undisturbed").digest


@pytest.mark.parametrize("n", [0, 900, 4000])
def test_a_full_disk_leaves_the_earlier_artifact(room: Room, n: int, capsys: pytest.CaptureFixture[str]) -> None:
    words = room.corpus(CORPUS)
    assert call(words) == 0
    before = room.files()
    with pytest.MonkeyPatch.context() as patch:
        fill_disk(patch, n)
        assert call([*words, "seed=5"]) == 2
    require_one_sentence(capsys.readouterr().err, 2, "the disk is full")
    require_nothing_left(room, before)


def test_generate_leaves_no_half_answers_file(room: Room, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*one_prompt(room, '{"prompt": "b"}\n'), "--max-new-tokens", "2", "--out", "o.jsonl"]
    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, os, "fsync", FULL, 3)
        assert call(words) == 2
    require_one_sentence(capsys.readouterr().err, 2, r"o\.jsonl.*: the disk is full; free")
    assert not Path("o.jsonl").exists()
    assert call(words) == 0 and len(Path("o.jsonl").read_text().splitlines()) == 2


def unused() -> tuple[Any, ...]:
    return Workspace, copy_files
