"""The joined stream = the whole text, for every token alone and any bytes; stops do not see token borders."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import microlm
from microlm.engine.output import TextStream
from microlm.text.tokenizer import Tokenizer

READY = Path(microlm.__file__).parent / "ready" / "zh-6400"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(READY)


def streamed(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...] = ()) -> str:
    """The joined pieces, up to the stop string."""
    stream, text = TextStream(tokenizer, stop), ""
    for i in ids:
        text += stream.push(i)
        if stream.stopped:
            break
    return text + stream.finish()


def ids_of_bytes(tokenizer: Tokenizer) -> dict[int, int]:
    """Byte → the id of the token that is this byte alone."""
    return {word[0]: i for i, word in enumerate(tokenizer.token_bytes) if len(word) == 1}


def test_every_token_alone_streams_to_its_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 6400
    for i in range(6400):
        expected = tokenizer.decode([i])
        assert streamed(tokenizer, [i]) == expected
        assert streamed(tokenizer, [i], ("never there",)) == expected


def test_random_pairs_of_tokens_and_of_bytes_stream_to_their_text(tokenizer: Tokenizer) -> None:
    rng, single = random.Random(1), ids_of_bytes(tokenizer)
    assert len(single) == 256
    pairs = [[rng.randrange(6400), rng.randrange(6400)] for _ in range(20_000)]
    pairs += [[single[a], single[b]] for a in range(0, 256, 3) for b in range(256)]
    pairs += [[single[rng.randrange(256)] for _ in range(6)] for _ in range(20_000)]
    for ids in pairs:
        assert streamed(tokenizer, ids) == tokenizer.decode(ids)


def test_valid_text_in_bytes_streams_whole_characters(tokenizer: Tokenizer) -> None:
    single, text = ids_of_bytes(tokenizer), "李白 😀👩‍👩‍👧 ελληνικά 한국어 𠀀 e\u0301"
    stream = TextStream(tokenizer)
    pieces = [stream.push(single[b]) for b in text.encode()]
    assert "".join(pieces) == text and stream.finish() == ""
    assert all(len(piece) <= 1 for piece in pieces) and "�" not in "".join(pieces)


def cut(text: str, stops: tuple[str, ...]) -> str:
    """By definition: the first moment, character by character, at which the text ends with a stop string."""
    for end in range(1, len(text) + 1):
        found = [s for s in stops if text[:end].endswith(s)]
        if found:
            return text[: end - max(map(len, found))]
    return text


def test_stop_strings_are_found_wherever_tokens_end(tokenizer: Tokenizer) -> None:
    rng = random.Random(2)
    for _ in range(3000):
        text = "".join(rng.choice("ab李白\n😀") for _ in range(rng.randrange(1, 12)))
        stops = tuple(
            "".join(rng.choice("ab李白\n😀") for _ in range(rng.randrange(1, 5)))
            for _ in range(rng.randrange(1, 4))
        )
        expected, single = cut(text, stops), ids_of_bytes(tokenizer)
        raw = [single[b] for b in text.encode()]
        assert streamed(tokenizer, raw, stops) == expected
        assert streamed(tokenizer, tokenizer.encode(text), stops) == expected


def test_nothing_of_a_stop_string_is_told_before_it_is_decided(tokenizer: Tokenizer) -> None:
    stream, single = TextStream(tokenizer, ("abcd",)), ids_of_bytes(tokenizer)
    pieces = [stream.push(single[b]) for b in b"xabcabcd"]
    assert pieces == ["x", "", "", "", "abc", "", "", ""] and stream.stopped
    assert stream.finish() == ""
