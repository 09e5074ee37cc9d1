"""A vocabulary as a GGUF file for llama.cpp, and llama.cpp's ids of some texts to compare with.

Run as a program it is the child that `llama_ids` starts: llama.cpp may end its process when a file is bad.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from microlm.core.errors import UserError
from microlm.text.bpe.pieces import Pieces
from microlm.text.bpe.vocabulary import Vocabulary

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Kinds of tokens in GGUF; what is user-defined is shown when ids become text."""
PRE: dict[tuple[Pieces, bool], str] = {
    (Pieces("gpt2", "single"), False): "smollm",
    (Pieces("gpt2", "runs"), False): "gpt-2",
    (Pieces("gpt4", "runs"), False): "dbrx",
    (Pieces("gpt4", "runs"), True): "llama-bpe",
    (Pieces("qwen", "runs"), False): "qwen2",
}
"""Policy, and whether a piece that is a token is taken whole → the `tokenizer.ggml.pre` that is the same."""
_WIDTH = 32
_TIMEOUT_S = 600.0


class Vocab(NamedTuple):
    """What a GGUF file says of a vocabulary."""

    known: Vocabulary
    pre: str
    eos: int | None
    pad: int | None
    template: str | None


def write(file: Path, vocab: Vocab, *, tensors: bool) -> None:
    """Write the file; with `tensors` a tiny model of zeros that llama.cpp can start with this vocabulary."""
    try:
        import gguf
    except ModuleNotFoundError:
        raise UserError(f"{file}: needs the extra 'gguf': pip install 'microlm[gguf]'") from None
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_name("vocabulary")
    writer.add_vocab_size(vocab.known.size)
    writer.add_context_length(512)
    writer.add_embedding_length(_WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(_WIDTH)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    _add_vocabulary(writer, vocab)
    if tensors:
        _add_tensors(writer, vocab.known.size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    if tensors:
        writer.write_tensors_to_file()
    writer.close()


def _add_vocabulary(writer: Any, vocab: Vocab) -> None:
    known = vocab.known
    names = [f"[unused{i}]" for i in range(known.size)]
    types = [UNUSED] * known.size
    for token, number in known.ids.items():
        names[number], types[number] = token, NORMAL
    for added in known.added:
        names[added.id], types[added.id] = added.content, CONTROL if added.special else USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocab.pre)
    writer.add_token_list(names)
    writer.add_token_types(types)
    writer.add_token_merges([f"{left} {right}" for left, right in known.merges])
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    if vocab.eos is not None:
        writer.add_eos_token_id(vocab.eos)
    if vocab.pad is not None:
        writer.add_pad_token_id(vocab.pad)
    if vocab.template is not None:
        writer.add_chat_template(vocab.template)


def _add_tensors(writer: Any, vocab_size: int) -> None:
    import numpy as np

    square = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes: Mapping[str, tuple[int, ...]] = {
        "token_embd.weight": (vocab_size, _WIDTH),
        "output_norm.weight": (_WIDTH,),
        **{f"blk.0.{name}.weight": (_WIDTH,) for name in ("attn_norm", "ffn_norm")},
        **{f"blk.0.{name}.weight": (_WIDTH, _WIDTH) for name in square},
    }
    for name, shape in shapes.items():
        writer.add_tensor(name, np.zeros(shape, dtype=np.float32))


def llama_ids(vocab: Vocab, texts: Sequence[str]) -> list[list[int]]:
    """The ids that llama.cpp gives the texts, control tokens in them recognised."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder / "model.gguf", vocab, tensors=True)
        (folder / "texts.json").write_text(json.dumps(list(texts)), encoding="utf-8")
        command = [sys.executable, "-m", __name__, str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, timeout=_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            raise UserError(f"llama.cpp did not answer in {_TIMEOUT_S:.0f} s; give fewer lines") from None
        found = folder / "ids.json"
        if done.returncode == 0 and found.is_file():
            ids: list[list[int]] = json.loads(found.read_bytes())
            return ids
    said = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["it ended without a word"]
    if "xllamacpp" in said[-1] and "No module" in said[-1]:
        raise UserError("llama.cpp cannot check the file: pip install 'microlm[gguf]', or give --no-check")
    raise UserError(f"llama.cpp does not take the file ({said[-1][:200]}); this is a fault to report")


def main(folder: Path) -> None:
    """The child: start llama.cpp on `model.gguf`, put the ids of `texts.json` into `ids.json`."""
    import httpx
    import xllamacpp

    asked = xllamacpp.CommonParams()
    asked.model.path = str(folder / "model.gguf")
    asked.n_ctx, asked.n_parallel, asked.n_gpu_layers = 64, 1, 0
    asked.warmup = False
    asked.verbosity = 0
    server = xllamacpp.Server(asked)
    texts = json.loads((folder / "texts.json").read_bytes())
    with httpx.Client(base_url=server.listening_address, trust_env=False, timeout=60.0) as client:
        ids = [_ask(client, text) for text in texts]
    (folder / "ids.json").write_text(json.dumps(ids), encoding="utf-8")


def _ask(client: Any, text: str) -> list[int]:
    body = {"content": text, "add_special": False, "parse_special": True}
    answer = client.post("/tokenize", json=body)
    answer.raise_for_status()
    ids: list[int] = answer.json()["tokens"]
    return ids


if __name__ == "__main__":
    main(Path(sys.argv[1]))
