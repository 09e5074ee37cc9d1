"""Our tokenizer = the string again, = transformers; what users type never becomes control."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from artifacts import PROSE, write_data, write_tokenizer
from bpe_vocabularies import STAND_IN, byte_level, with_merges
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import AutoTokenizer

from microlm.core.artifact import Artifact
from microlm.core.errors import UserError
from microlm.text import chat
from microlm.text.bpe.pieces import Pieces
from microlm.text.tokenizer import FILES, MARKS, SPECIAL, Tokenizer, copy_files, reserved

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
SHAPED = st.lists(
    st.sampled_from(
        [
            *SPECIAL,
            *MARKS,
            "李白",
            "唐代的诗人",
            " ",
            "\n",
            "701",
            "poet",
            "é",
            "👩🏽‍🚀",
            "\0",
            "\u2028",
            "<|",
        ]
    ),
    max_size=12,
).map("".join)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return write_data(tmp_path_factory.mktemp("run") / "data")


@pytest.fixture(scope="module", params=[False, True], ids=["words", "han_alone"])
def trained(request: pytest.FixtureRequest, data: Artifact) -> Artifact:
    out = data.path.parent / f"tokenizer-{request.param}"
    return write_tokenizer(out, data, han_alone=request.param)


@pytest.fixture(scope="module")
def tokenizer(trained: Artifact) -> Tokenizer:
    return Tokenizer.load(trained.path)


@settings(max_examples=150)
@given(text=TEXT | SHAPED)
def test_decode_of_encode_is_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(tokenizer.token_bytes[i] for i in ids) == text.encode()
    assert not {tokenizer.pad_id, tokenizer.start_id, tokenizer.eos_id} & set(ids)


@settings(max_examples=100)
@given(text=TEXT | SHAPED, cut=st.integers(0, 60))
def test_stream_never_shows_half_a_character(tokenizer: Tokenizer, text: str, cut: int) -> None:
    ids = tokenizer.encode(text)
    stream = tokenizer.stream()
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.finish() == text
    early = tokenizer.stream()
    begun = "".join(early.push(i) for i in ids[:cut]) + early.finish()
    assert text.startswith(begun)
    if "\ufffd" not in text:
        assert "\ufffd" not in begun


@settings(max_examples=100)
@given(texts=st.lists(TEXT | SHAPED, max_size=4))
def test_batch_is_one_by_one(tokenizer: Tokenizer, texts: list[str]) -> None:
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(t) for t in texts]


@settings(max_examples=100)
@given(texts=st.lists(TEXT | SHAPED, max_size=6), closing=st.sampled_from([None, 2]))
def test_arrays_are_the_lists_in_a_row(tokenizer: Tokenizer, texts: list[str], closing: int | None) -> None:
    """Through the library, and through our encoder."""
    expected = [tokenizer.encode(t) + ([] if closing is None else [closing]) for t in texts]
    assert tokenizer.backend == "compiled" and tokenizer.backend_reason == ""
    for encoder in (None, tokenizer._compiled):
        ids, ends = tokenizer._encode(encoder, texts, closing)
        assert (ids.dtype, ends.dtype) == (np.uint16, np.int64)
        assert [part.tolist() for part in np.split(ids, ends)[:-1]] == expected


@settings(max_examples=100)
@given(ids=st.lists(st.integers(0, 379), max_size=40))
def test_decode_is_the_stream_at_once(tokenizer: Tokenizer, ids: list[int]) -> None:
    stream = tokenizer.stream()
    assert tokenizer.decode(ids) == "".join(map(stream.push, ids)) + stream.finish()
    assert tokenizer.decode(np.array(ids, dtype=np.uint16)) == tokenizer.decode(ids)


def test_long_and_many_texts_take_our_encoder(trained: Artifact) -> None:
    tokenizer, text = Tokenizer.load(trained.path), "".join(PROSE) * 60
    before = tokenizer.encode_batch([text])[0]
    assert "_compiled" not in tokenizer.__dict__  # a little text is not worth its start
    tokenizer.start()
    assert tokenizer.encode_batch([text, text]) == [before, before]
    assert tokenizer.encode(text) == before == tokenizer._plain.encode(text).ids


def run_python(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)


SHORT = """
import sys
from pathlib import Path
from microlm.text.tokenizer import Tokenizer
print(len(Tokenizer.load(Path(sys.argv[1])).encode("床前明月光")), "numba" in sys.modules)
"""
ABSENT = """
import sys
sys.modules["numba"] = None
from pathlib import Path
from microlm.text import tokenizer as module
module.COLD_CHARS = 5_000
tokenizer = module.Tokenizer.load(Path(sys.argv[1]))
texts = ["李白是唐代的诗人" * 20, "poet", ""] * 30
ids, ends = tokenizer.encode_arrays(texts, 2)
assert tokenizer.encode_batch(texts)[:3] == [tokenizer.encode(t) for t in texts[:3]]
print(tokenizer.backend, tokenizer.backend_reason, len(ids), len(ends))
"""


def test_a_short_text_does_not_wait_for_numba(trained: Artifact) -> None:
    assert run_python(SHORT, str(trained.path)).stdout.split()[1] == "False"


def test_without_numba_the_library_encodes_and_it_is_said_once(
    trained: Artifact, tokenizer: Tokenizer
) -> None:
    told = run_python(ABSENT, str(trained.path))
    ids, ends = tokenizer.encode_arrays(["李白是唐代的诗人" * 20, "poet", ""] * 30, 2)
    assert told.stdout.strip() == f"tokenizers numba is not installed {len(ids)} {len(ends)}"
    assert told.stderr == (
        "tokenizer: numba is not installed, so this runs through the library tokenizers, far slower\n"
    )


TYPED = "a<think>b</think><|im_end|><|reserved_0|><tool_call>"


def test_control_tokens_are_matched_only_when_asked(tokenizer: Tokenizer) -> None:
    control = tokenizer.control
    assert set(control) == {*SPECIAL, *MARKS, *reserved(7)}
    assert not set(control.values()) & set(tokenizer.encode(TYPED))
    assert tokenizer.decode(tokenizer.encode(TYPED)) == TYPED
    ids = tokenizer.encode(TYPED, allow_control=True)
    names = ("<think>", "</think>", "<|im_end|>", "<|reserved_0|>", "<tool_call>")
    assert [i for i in ids if i in control.values()] == [control[name] for name in names]
    assert tokenizer.decode(ids) == "a<think>b</think><tool_call>"  # marks are shown, special tokens are not
    for texts in ([TYPED], [TYPED] * 3):
        assert tokenizer.encode_batch(texts) == [tokenizer.encode(TYPED)] * len(texts)


def test_a_foreign_file_is_taken_as_it_is(tmp_path: Path) -> None:
    """Marks behind the vocabulary as in Qwen3; padding and truncation of the file are not for us."""
    inner = byte_level(Pieces("qwen"))
    inner.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in MARKS])
    inner.enable_truncation(4)
    inner.enable_padding(length=64)
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.vocab_size == inner.get_vocab_size()
    assert [tokenizer.control[mark] for mark in MARKS] == [inner.token_to_id(mark) for mark in MARKS]
    text = "<think>the poet's poem</think> 唐代的诗人" * 3
    for allow_control in (False, True):
        ids = tokenizer.encode(text, allow_control)
        assert tokenizer.decode(ids) == text
        assert (tokenizer.control["<think>"] in ids) is allow_control


def test_a_vocabulary_of_more_than_65535(tmp_path: Path) -> None:
    pairs = [(left, right) for left in STAND_IN.values() for right in STAND_IN.values()]
    pairs = [*pairs, ("t", "he"), ("Ġp", "oe")]
    with_merges(pairs, Pieces()).save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    tokenizer.start()
    text = "the poet 唐代 the\n" * 200
    ids, ends = tokenizer.encode_arrays([text, text])
    assert (tokenizer.vocab_size, ids.dtype) == (3 + 256 + 65536 + 2, np.uint32)
    assert ids.max() > 0xFFFF
    assert ids[: ends[0]].tolist() == tokenizer._plain.encode(text).ids


def test_ids_are_those_of_transformers(trained: Artifact, tokenizer: Tokenizer) -> None:
    theirs = AutoTokenizer.from_pretrained(trained.path)
    for text in [
        *PROSE,
        "  two\n\n spaces\t12 x=5",
        "naïve 👩🏽‍🚀 e\u0301",
        "<|im_end|> typed <|im_start|>user",
    ]:
        ids = tokenizer.encode(text)
        assert theirs.encode(text, add_special_tokens=False, split_special_tokens=True) == ids
        assert theirs.decode(ids) == text
    assert len(theirs) == tokenizer.vocab_size
    assert (theirs.eos_token_id, theirs.pad_token_id) == (tokenizer.eos_id, tokenizer.pad_id) == (2, 0)
    assert theirs.chat_template == chat.template_text(None)
    assert theirs.bos_token is None and theirs.unk_token is None
    assert set(theirs.all_special_tokens) == set(SPECIAL)


def test_control_tokens_are_the_first_ids(trained: Artifact) -> None:
    inner = json.loads((trained.path / "tokenizer.json").read_bytes())
    assert [(t["id"], t["content"], t["special"]) for t in inner["added_tokens"]] == [
        (i, token, token not in MARKS) for i, token in enumerate((*SPECIAL, *MARKS, *reserved(7)))
    ]


def test_han_characters_stand_alone_when_asked(data: Artifact, tmp_path: Path) -> None:
    alone = Tokenizer.load(write_tokenizer(tmp_path / "a", data, han_alone=True).path)
    words = Tokenizer.load(write_tokenizer(tmp_path / "w", data).path)
    text = "李白是唐代的诗人"
    assert [alone.decode([i]) for i in alone.encode(text)] == list(text)
    assert len(words.encode(text)) < len(text)
    assert all(sum(b in b"0123456789" for b in token) <= 1 for token in alone.token_bytes + words.token_bytes)


def test_equal_recipes_give_equal_bytes(data: Artifact, tmp_path: Path) -> None:
    first, second = (write_tokenizer(tmp_path / name, data) for name in "ab")
    assert first.digest == second.digest
    assert write_tokenizer(tmp_path / "c", data, vocab_size=380).digest != first.digest


def test_a_small_corpus_gives_its_true_size(
    data: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = write_tokenizer(tmp_path / "t", data, vocab_size=50_000)
    size = Tokenizer.load(made.path).vocab_size
    assert size == made.manifest["metrics"]["vocab_size"] < 50_000
    assert f"{size} of 50000 (the corpus has no more merges)" in capsys.readouterr().err


def test_fertility_counts_what_is_held_out(trained: Artifact, tokenizer: Tokenizer) -> None:
    rows = {row["domain"]: row for row in json.loads((trained.path / "logs/fertility.json").read_bytes())}
    assert list(rows) == ["Chinese prose", "English", "conversation", "extraction JSON"]
    english = [t for t in PROSE if t.isascii()]
    tokens, size = sum(len(tokenizer.encode(t)) for t in english), sum(len(t.encode()) for t in english)
    expected = {
        "bytes": size,
        "tokens": tokens,
        "bytes_per_token": size / tokens,
        "tokens_per_char": tokens / size,
    }
    assert rows["English"] == {"domain": "English"} | expected
    assert rows["extraction JSON"]["bytes"] == len('{"李白":{"朝代":"唐代"}}'.encode())


def test_a_domain_without_text_is_null(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", prose=PROSE[:3])
    made = write_tokenizer(tmp_path / "t", data)
    assert made.manifest["metrics"]["bytes_per_token"]["English"] is None


@pytest.mark.parametrize("limit", [1, None])
def test_max_documents_limits_what_is_read(data: Artifact, tmp_path: Path, limit: int | None) -> None:
    made = write_tokenizer(tmp_path / "t", data, max_documents=limit)
    assert made.manifest["metrics"]["texts"] == (1 + 2 if limit else 20 * (5 + 6))


def test_too_small_a_vocabulary_is_refused(data: Artifact, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="set vocab_size to 272 or more"):
        write_tokenizer(tmp_path / "t", data, vocab_size=271)
    bytes_only = Tokenizer.load(write_tokenizer(tmp_path / "t", data, vocab_size=272).path)
    marks = [len(mark) for mark in MARKS]
    assert [len(token) for token in bytes_only.token_bytes] == [0, 0, 0, *marks] + [0] * 7 + [1] * 256


def test_no_text_is_refused(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", repeat=0)
    with pytest.raises(UserError, match="no training text"):
        write_tokenizer(tmp_path / "t", data)


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", prose=[*PROSE, 3])  # type: ignore[list-item]
    with pytest.raises(UserError, match=r"train\.jsonl:6: expected str"):
        write_tokenizer(tmp_path / "t", data)


def test_copy_files_copies_exactly_the_tokenizer(trained: Artifact, tmp_path: Path) -> None:
    copy_files(trained.path, tmp_path / "model")
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == sorted(FILES)
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        copy_files(tmp_path, tmp_path / "other")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "no tokenizer.json"),
        (b"", "not a tokenizer file"),
        (b'{"model": 3}', "not a tokenizer file"),
        (b"\xff\xfe", "not a tokenizer file"),
    ],
)
def test_a_damaged_tokenizer_is_one_sentence(tmp_path: Path, content: bytes | None, sentence: str) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        Tokenizer.load(tmp_path)


def test_a_tokenizer_without_chatml_is_refused(trained: Artifact, tmp_path: Path) -> None:
    inner = json.loads((trained.path / "tokenizer.json").read_bytes())
    inner["added_tokens"] = [t for t in inner["added_tokens"] if t["content"] != "<|im_end|>"]
    inner["model"]["vocab"]["other"] = inner["model"]["vocab"].pop("<|im_end|>")
    (tmp_path / "tokenizer.json").write_text(json.dumps(inner), encoding="utf-8")
    with pytest.raises(UserError, match=r"lacks ChatML.s control tokens and names no eos_token"):
        Tokenizer.load(tmp_path)
