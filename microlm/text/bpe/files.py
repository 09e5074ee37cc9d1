"""A tokenizer as a Hugging Face directory. Enters: tokens and merges. Leaves: what AutoTokenizer opens."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as HFTokenizer

from microlm.core.artifact import Workspace
from microlm.text.bpe.learn.choose import Choice
from microlm.text.bpe.learn.spelling import BYTES
from microlm.text.bpe.pieces import Pieces
from microlm.text.bpe.vocabulary import BYTE_OF
from microlm.text.tokenizer import END, FILES, MARKS, PAD, START

_STAND_IN = {byte: stand_in for stand_in, byte in BYTE_OF.items()}


def control_tokens(control: tuple[str, ...]) -> list[AddedToken]:
    """As `tokenizers` is told of them: those that are shown when ids become text are not special."""
    return [AddedToken(token, special=token not in MARKS, normalized=False) for token in control]


def assemble(choice: Choice, pieces: Pieces, control: tuple[str, ...]) -> HFTokenizer:
    """Control tokens, the 256 bytes, then the tokens, each with the next id."""
    names = [*control, *(_STAND_IN[byte] for byte in BYTES), *map(_written, choice.tokens)]
    merges = [(_written(left), _written(right)) for left, right in choice.merges]
    inner = HFTokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=merges))
    inner.pre_tokenizer = pieces.pre_tokenizer()
    inner.decoder = decoders.ByteLevel()
    inner.add_tokens(control_tokens(control))
    return inner


def write(inner: HFTokenizer, control: tuple[str, ...], template: str, work: Workspace) -> None:
    """The files that `AutoTokenizer` of plain transformers reads."""
    inner.save(str(work.path / FILES[0]))
    names = {"eos_token": END, "pad_token": PAD}
    work.write_json(
        FILES[1],
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "added_tokens_decoder": {str(inner.token_to_id(t)): _described(t) for t in control},
            "additional_special_tokens": [START],
            "bos_token": None,
            **names,
            "unk_token": None,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "chat_template": template,
        },
    )
    work.write_json(FILES[2], {"additional_special_tokens": [START], **names})
    work.write_text(FILES[3], template)


def _written(token: bytes) -> str:
    return "".join(_STAND_IN[byte] for byte in token)


def _described(token: str) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": token, **flags, "special": token not in MARKS}
