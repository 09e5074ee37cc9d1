"""Broken model directories, prompts, keys and addresses."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from broken_house import Prepare, Room


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
        data["model"]["vocab"][f"word {word}"] = data["model"]["vocab"].pop(word)


def one_prompt(room: Room, line: str) -> list[str]:
    return ["generate", "runs/sft", "--prompts", room.write("p.jsonl", '{"prompt": "a"}\n' + line)]


def dead_url() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


# kind → (how to break it and what to call, what the sentence says: the place, and what is wrong)
MODELS: dict[str, tuple[Prepare, str]] = {
    "truncated weights": (
        lambda r: asked(r, cut("model.safetensors", 0.5)),
        r"model\.safetensors: not a whole .*; copy",
    ),
    "weights cut in their head": (
        lambda r: asked(r, cut("model.safetensors", 0.01)),
        r"model\.safetensors: not a whole",
    ),
    "empty weights": (lambda r: asked(r, cut("model.safetensors", 0)), r"model\.safetensors: not a whole"),
    "weights missing": (
        lambda r: asked(r, lambda m: (m / "model.safetensors").unlink()),
        r"model: no model\.safetensors",
    ),
    "flipped byte in the weights' head": (
        lambda r: asked(r, lambda m: r.flip("model/model.safetensors", 0)),
        r"model/model\.safetensors: not a whole",
    ),
    "flipped byte in tokenizer.json": (
        lambda r: asked(r, lambda m: r.flip("model/tokenizer.json", 0)),
        r"model/tokenizer\.json: not a tokenizer file",
    ),
    "flipped byte in config.json": (
        lambda r: asked(r, lambda m: r.flip("model/config.json", 0)),
        r"model/config\.json: not valid JSON; export",
    ),
    "config of gpt2": (
        lambda r: asked(r, config(model_type="gpt2")),
        r"config\.json: model_type 'gpt2' is not supported",
    ),
    "config without a size": (
        lambda r: asked(r, config(hidden_size=...)),
        r"config\.json: key 'hidden_size' is missing",
    ),
    "config with a word for a size": (
        lambda r: asked(r, config(hidden_size="big")),
        r"config\.json: .*whole number",
    ),
    "config with another size": (
        lambda r: asked(r, config(hidden_size=64)),
        r"model: '.*' has shape .*config\.json says",
    ),
    "config with endless layers": (
        lambda r: asked(r, config(num_hidden_layers=10**9)),
        r"config\.json: num_hidden_layers .*; ",
    ),
    "config with endless positions": (
        lambda r: asked(r, config(max_position_embeddings=10**12)),
        r"config\.json: max_position_embeddings .*; ",
    ),
    "config with an endless vocabulary": (
        lambda r: asked(r, config(vocab_size=10**12)),
        r"model: '.*' has shape .*, config\.json says .*; export",
    ),
    "config with heads that do not fit": (
        lambda r: asked(r, config(num_attention_heads=3)),
        r"config\.json: 3 heads, 2 key-value heads.*; heads",
    ),
    "config of rotary scaling": (
        lambda r: asked(r, config(rope_parameters={"rope_type": "yarn"})),
        r"config\.json: rotary scaling .*; use",
    ),
    "config missing": (
        lambda r: asked(r, lambda m: (m / "config.json").unlink()),
        r"model: no model there.*; finish",
    ),
    "tokenizer missing": (
        lambda r: asked(r, lambda m: (m / "tokenizer.json").unlink()),
        r"model: no tokenizer\.json there",
    ),
    "tokenizer without control tokens": (
        lambda r: asked(r, tokenizer_file(without_controls)),
        r"model: the tokenizer lacks ChatML.s control tokens and names no eos_token .*; name one",
    ),
    "tokenizer larger than the model": (
        lambda r: asked(
            r, tokenizer_file(lambda t: t["model"]["vocab"].update({f"x{i}": 400 + i for i in range(9)}))
        ),
        r"model: the tokenizer has \d+ tokens, the model \d+; ",
    ),
    "no model there": (lambda r: ["generate", "none", "x"], r"none: no such directory; give a run"),
    "a run without a model": (
        lambda r: ["generate", "runs/data", "x"],
        r"runs/data: no model there.*; finish",
    ),
    "empty prompt": (lambda r: ["generate", "runs/sft", ""], r"prompt: is empty; write"),
    "no prompt": (lambda r: ["generate", "runs/sft"], r"generate: found no prompt, or two; give"),
    "prompt longer than the window": (
        lambda r: ["generate", "runs/sft", "好" * 999],
        r"prompt: \d+ tokens, but the window is 128 .*; shorten",
    ),
    "prompt with half a character": (
        lambda r: ["generate", "runs/sft", "a\udcff"],
        r"prompt: character 1 is half of",
    ),
    "window larger than the model's": (
        lambda r: ["generate", "runs/sft", "x", "--max-seq-len", "9999"],
        r"max_seq_len.*9999.*128",
    ),
    "no new tokens": (lambda r: ["generate", "runs/sft", "x", "--max-new-tokens", "0"], r"max_tokens.*; "),
    "negative temperature": (
        lambda r: ["generate", "runs/sft", "x", "--temperature", "-1"],
        r"temperature.*-1",
    ),
    "a schema that is none": (
        lambda r: ["generate", "runs/sft", "x", "--json-schema", r.write("s.json", '{"type": "nonsense"}')],
        r"schema.*; ",
    ),
    "a schema that is missing": (
        lambda r: ["generate", "runs/sft", "x", "--json-schema", "no.json"],
        r"no\.json: cannot be read .*; check",
    ),
    "a prompts file that is missing": (
        lambda r: ["generate", "runs/sft", "--prompts", "no.jsonl"],
        r"no\.jsonl: cannot be read .*; check",
    ),
    "a prompts file that is not JSON": (
        lambda r: one_prompt(r, "oops"),
        r"p\.jsonl:2: not valid JSON; expected",
    ),
    "a prompts file with another key": (
        lambda r: one_prompt(r, '{"text": "a"}'),
        r"p\.jsonl:2: no 'prompt' with a text",
    ),
    "an answers file that is there": (
        lambda r: [*one_prompt(r, ""), "--out", r.write("o.jsonl", b"mine")],
        r"o\.jsonl: exists already; remove it",
    ),
    "chat with a dead URL": (
        lambda r: ["chat", dead_url()],
        r"http://127.*: cannot connect .*is 'microlm serve DIR'",
    ),
    "chat with no URL": (lambda r: ["chat", "http://"], r"'http://': not an address; expected a URL"),
    "chat with no model": (lambda r: ["chat", "none"], r"none: no such directory; give"),
    "serve on a public address": (
        lambda r: ["serve", "runs/sft", "--host", "0.0.0.0"],
        r"--host 0\.0\.0\.0: other machines.*; give --api-key-file",
    ),
    "serve with a short key": (
        lambda r: ["serve", "runs/sft", "--port", "0", "--api-key-file", r.write("k", "abc")],
        r"API key: .*shorter than 8.*; make",
    ),
    "serve with a key of two lines": (
        lambda r: ["serve", "runs/sft", "--port", "0", "--api-key-file", r.write("k", "a\nb")],
        r"k: the API key is not one line",
    ),
    "serve with a missing key": (
        lambda r: ["serve", "runs/sft", "--port", "0", "--api-key-file", "no"],
        r"no: the API key cannot be read .*; write",
    ),
    "serve on no port": (
        lambda r: ["serve", "runs/sft", "--port", "99999"],
        r"--port 99999: is no port; choose",
    ),
    "serve of nothing": (lambda r: ["serve", "none", "--port", "0"], r"none: no such directory; give"),
    "verify where nothing listens": (
        lambda r: ["verify", dead_url()],
        r"http://127.*: cannot connect .*; is",
    ),
    "verify of no address": (
        lambda r: ["verify", "localhost:8000"],
        r"'localhost:8000': not an address; expected",
    ),
}
