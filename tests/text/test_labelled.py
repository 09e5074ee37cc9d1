"""Samples as `data show` prints them: whole characters, true borders, what a policy would cut."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from artifacts import write_data, write_tokenizer
from chat_models import conversations, write_model
from hypothesis import given, settings
from hypothesis import strategies as st

from microlm.cli import main
from microlm.core.artifact import Artifact
from microlm.core.records import Conversation
from microlm.text import shards
from microlm.text.chat import encode_chats, template_text
from microlm.text.inspection.labelled import CUT, LABEL, PIECE, Encoded, glyphs, marked
from microlm.text.shards import TokenizeRecipe
from microlm.text.tokenizer import Tokenizer

Call = Callable[..., str]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_model(tmp_path_factory.mktemp("run") / "t", template_text(None)))


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def run(*words: str, code: int = 0) -> str:
        with pytest.raises(SystemExit) as e:
            main(["data", "show", *words])
        assert int(e.value.code or 0) == code
        out, err = capsys.readouterr()
        return err if code else out

    return run


@settings(max_examples=100)
@given(chat=conversations(), cuts=st.lists(st.integers(0, 300), max_size=4))
def test_glyphs_hold_every_token_once_and_nothing_twice(
    tokenizer: Tokenizer, chat: Conversation, cuts: list[int]
) -> None:
    [(ids, mask)] = encode_chats(tokenizer, [chat])
    at = sorted(min(cut, len(ids)) for cut in cuts)
    spans = [(a, b) for a, b in zip(at[::2], at[1::2], strict=False) if a < b]
    found = list(glyphs(tokenizer, Encoded("", "", ids, mask), spans))
    assert [i for glyph in found for i in glyph.ids] == ids
    place = 0
    for glyph in found:
        here = range(place, place + len(glyph.ids))
        place = here.stop
        assert glyph.text and len(glyph.ids) <= 4
        assert [glyph.kept] * len(here) == [any(a <= i < b for a, b in spans) for i in here]
        learnt = [bool(mask[i]) and any(a < i < b for a, b in spans) for i in here]
        assert [glyph.learnt] * len(here) == learnt
    assert sum(g.control for g in found) == sum(i in tokenizer.control.values() for i in ids)


def test_tokens_that_are_parts_of_a_character(tokenizer: Tokenizer) -> None:
    """A character of three tokens is one glyph; one that is cut is shown as its bytes."""
    ids = tokenizer.encode("汉a😀")
    assert len(ids) == 3 + 1 + 4

    def shown(*spans: tuple[int, int]) -> list[str]:
        sample = Encoded("", "", ids, [1] * len(ids))
        return [glyph.text for glyph in glyphs(tokenizer, sample, spans)]

    assert shown((0, 8)) == ["\\xe6", "\\xb1", "\\x89", "a", "😀"]  # its first token is not learnt
    assert shown() == ["汉", "a", "😀"]
    assert shown((0, 6), (5, 8))[-4:] == ["\\xf0", "\\x9f", "\\x98", "\\x80"]
    broken = Encoded("", "", [*ids[:2], *tokenizer.encode("b"), ids[1], *ids[4:6]], [0] * 6)
    assert [g.text for g in glyphs(tokenizer, broken, [])] == ["\\xe6\\xb1b", "\\xb1", "\\xf0\\x9f"]


def test_marks(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("abcdefgh")
    sample = Encoded("", "", ids, [0, 0, 1, 1, 1, 0, 0, 1])
    for spans, expected in (
        ([(0, 8)], "ab⟦cde⟧fg⟦h⟧"),
        ([(3, 8)], "⟪abc⟫d⟦e⟧fg⟦h⟧"),
        ([(0, 4)], "ab⟦cd⟧⟪efgh⟫"),
        ([(0, 4), (3, 7)], "ab⟦c✂de⟧fg⟪h⟫"),
        ([], "⟪abcdefgh⟫"),
    ):
        assert marked(glyphs(tokenizer, sample, spans)) == expected


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Artifact, Artifact]:
    """Data of chats, a tokenizer, token sets."""
    folder = tmp_path_factory.mktemp("made")
    data = write_data(folder / "data", repeat=2)
    words = write_tokenizer(folder / "tokenizer", data)
    recipe = TokenizeRecipe(out=str(folder / "shards"), data=data.url, tokenizer=words.url)
    return data, words, shards.run(recipe)


def test_token_sets_and_records_show_the_same(made: tuple[Artifact, Artifact, Artifact], call: Call) -> None:
    data, tokenizer, sets = made
    many = ("--n", "99", "--json", "--context", "30", "--too-long", "split")
    rows: list[Any] = [
        json.loads(call(*words, *many))["records"]
        for words in (
            (data.url, "--tokenizer", tokenizer.url),
            (sets.url,),
            (data.url, "--tokenizer", tokenizer.url, "--task", "chat"),
            (sets.url, "--task", "chat"),
        )
    ]
    texts = [sorted(row["text"] for row in some) for some in rows]
    assert texts[0] == texts[1] == texts[2] == texts[3] and len(texts[0]) == 6
    assert any(PIECE in text for text in texts[0]) and all("<|im_end|>⟧" in text for text in texts[0])
    assert {row["task"] for row in rows[0]} == {"chat"}
    documents = json.loads(call(sets.url, "--task", "documents", "--json"))["records"]
    assert documents[0]["labels"] == documents[0]["tokens"] and documents[0]["text"].endswith("<|im_end|>⟧")


@pytest.mark.parametrize(
    ("policy", "told"), [("drop", "nothing"), ("cut_left", "–"), ("cut_right", "0–"), ("split", ", ")]
)
def test_a_policy_shows_what_it_cuts(
    made: tuple[Artifact, Artifact, Artifact], call: Call, policy: str, told: str
) -> None:
    out = call(made[2].url, "--context", "30", "--too-long", policy, "--n", "99")
    heads = [line for line in out.splitlines() if "in rows: " in line]
    assert heads and all(told in line.partition("in rows: ")[2] for line in heads)
    assert (CUT[0] in out) == (policy != "split") and (PIECE in out) == (policy == "split")
    assert LABEL[0] in out and "\x1b" not in out


def test_colours_where_there_are_any(
    made: tuple[Artifact, Artifact, Artifact], call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    out = call(made[2].url, "--context", "30", "--too-long", "cut_left", "--n", "2")
    assert "\x1b[32m" in out and "\x1b[9;31m" in out and LABEL[0] not in out and CUT[0] not in out
    assert "\x1b[1;32m<|im_end|>" in out or "\x1b[1;92m<|im_end|>" in out  # the EOS, learnt


def test_what_cannot_be_shown_is_a_sentence(made: tuple[Artifact, Artifact, Artifact], call: Call) -> None:
    data, tokenizer, sets = made
    for words, sentence in (
        ((data.url, "--context", "9"), "--context counts tokens; say whose with --tokenizer DIR"),
        ((data.url, "--task", "chatt"), "holds no task 'chatt'; did you mean 'chat'?"),
        ((sets.url, "--task", "chatt"), "no token set 'chatt' for train; did you mean 'chat'?"),
        ((sets.url, "--kind", "documents"), "holds token sets"),
        ((sets.url, "--split", "test"), "holds no samples for test"),
        ((sets.url, "--too-long", "cut"), "--too-long cut: is unknown; did you mean 'cut_left'?"),
        ((data.url, "--kind", "extraction", "--tokenizer", tokenizer.url), "is not trained on"),
        ((data.url, "--tokenizer", "nowhere"), "no tokenizer.json there"),
    ):
        assert sentence in call(*words, code=2)
