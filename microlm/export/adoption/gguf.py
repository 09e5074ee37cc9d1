"""A GGUF file → a Hugging Face directory: transformers reads the weights, we write the tokenizer.

transformers' own conversion of the tokenizer forgets how a text is cut (SmolLM2's digits, one by one).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer

from microlm.core.errors import UserError
from microlm.export.parity import quiet_transformers
from microlm.model import directory
from microlm.model.config import CLASS, ModelConfig
from microlm.model.transformer import Decoder
from microlm.text.bpe.pieces import Pieces
from microlm.text.tokenizer import FILES

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # kinds of tokens
_NAMED = {
    "bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}  # fmt: skip
_SIZES = (
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
)  # fmt: skip
Fields = dict[str, Any]


def read_fields(file: Path) -> Fields:
    """Everything that the file says about its model, by name; UserError if we cannot use it."""
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError:
        raise UserError(f"{file}: needs the extra 'gguf': pip install 'microlm[gguf]'") from None
    try:
        reader = GGUFReader(file)
    except (OSError, ValueError, IndexError) as e:
        raise UserError(f"{file}: not a whole GGUF file ({str(e)[:90]}); copy or fetch it again") from None
    said = {name: field.contents() for name, field in reader.fields.items()}
    kind = said.get("general.architecture")
    if kind not in CLASS:
        raise UserError(f"{file}: a model of architecture {kind!r}; only {', '.join(CLASS)} can be adopted")
    if said.get("tokenizer.ggml.model") != "gpt2":
        raise UserError(
            f"{file}: its tokenizer is {said.get('tokenizer.ggml.model')!r}; only byte-level BPE is read"
        )
    if said.get("tokenizer.ggml.pre") not in _CUTS:
        raise UserError(
            f"{file}: cuts text by the rule {said.get('tokenizer.ggml.pre')!r}; known: {', '.join(_CUTS)}"
        )
    _require_complete(file, said, kind)
    held = sum(int(tensor.n_elements) for tensor in reader.tensors)
    if (wanted := read_config(file).parameters) > held:
        raise UserError(
            f"{file}: its sizes are those of {wanted:,} weights, and it holds {held:,}; download it again"
        )
    return said


def _require_complete(file: Path, said: Fields, kind: str) -> None:
    """Refuse a file without sizes (transformers would take those of a large model) or tokens."""
    sizes = [f"{kind}.{name}" for name in _SIZES]
    lists = [f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "merges")]
    for names, expected in ((sizes, int), (lists, list)):
        if lost := [name for name in names if not isinstance(said.get(name), expected)]:
            raise UserError(f"{file}: does not say '{lost[0]}'; download it again, or adopt its directory")
    count, kinds = (len(said[name]) for name in lists[:2])
    ids = [number for field in _NAMED.values() if (number := said.get(f"tokenizer.ggml.{field}")) is not None]
    if count != kinds or any(number not in range(count) for number in ids):
        raise UserError(
            f"{file}: has {count} tokens of {kinds} kinds, named ones {ids}; they do not belong together, "
            "download it again"
        )
    known = set(said[lists[0]])
    for merge in said[lists[2]]:
        left, _, right = merge.partition(" ")
        if not known.issuperset((left, right, left + right)):
            raise UserError(
                f"{file}: merges {merge[:40]!r}, which are no tokens of its own; download it again"
            )


def read_config(file: Path) -> ModelConfig:
    """The sizes by which transformers makes room for the weights, and what our decoder computes."""
    from transformers import AutoConfig

    try:
        with quiet_transformers():
            theirs = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as e:  # whatever its parsers raise on fields that are not as they expect
        first = (str(e).strip().splitlines() or [""])[0][:160]
        raise UserError(f"{file}: transformers cannot read it ({type(e).__name__}: {first})") from e
    fields = {k: v for k, v in theirs.to_dict().items() if k != "quantization_config"}
    return ModelConfig.from_hf(fields, str(file))


def write(file: Path, said: Fields, folder: Path) -> None:
    """The directory: configuration, float32 weights (quantized ones as what they stand for), tokenizer."""
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = read_config(file)
    weights = theirs.state_dict()
    with torch.device("meta"):
        decoder = Decoder(config)
    wanted = {name: weights[name] for name, _ in decoder.named_parameters() if name in weights}
    if lost := [name for name, _ in decoder.named_parameters() if name not in wanted]:
        raise UserError(f"{file}: holds no weights for '{lost[0]}'; download it again")
    decoder.load_state_dict(wanted, strict=False, assign=True)
    if config.tie_word_embeddings:
        decoder.lm_head.weight = decoder.model.embed_tokens.weight
    directory.save(decoder, folder)
    _write_tokenizer(said, folder)


def _write_tokenizer(said: Fields, folder: Path) -> None:
    tokens, kinds = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]
    merges = [(left, right) for left, _, right in (m.partition(" ") for m in said["tokenizer.ggml.merges"])]
    numbered = list(enumerate(zip(tokens, kinds, strict=True)))
    kept = {token: i for i, (token, kind) in numbered if kind in (_NORMAL, _CONTROL, _USER_DEFINED)}
    pre = said["tokenizer.ggml.pre"]
    inner = HFTokenizer(models.BPE(kept, merges, ignore_merges=pre == "llama-bpe"))
    inner.pre_tokenizer = _CUTS[pre]
    if pre == "qwen2":
        inner.normalizer = normalizers.NFC()
    inner.decoder = decoders.ByteLevel()
    for _, (token, kind) in numbered:
        if kind in (_CONTROL, _USER_DEFINED):
            inner.add_tokens([AddedToken(token, special=kind == _CONTROL, normalized=False)])
    inner.save(str(folder / FILES[0]))
    ids = {name: said.get(f"tokenizer.ggml.{field}") for name, field in _NAMED.items()}
    named = {name: tokens[number] for name, number in ids.items() if number is not None}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **named, "clean_up_tokenization_spaces": False}
    directory.write_json(folder / FILES[1], settings)
    if template := said.get("tokenizer.chat_template"):
        (folder / FILES[3]).write_text(template, encoding="utf-8")


_CUTS: dict[str, pre_tokenizers.PreTokenizer] = {
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "gpt-2": Pieces("gpt2", "runs").pre_tokenizer(),
    "llama-bpe": Pieces("gpt4", "runs").pre_tokenizer(),
    "qwen2": Pieces("qwen", "runs").pre_tokenizer(),
}
"""llama.cpp's name of a rule → the rule."""
