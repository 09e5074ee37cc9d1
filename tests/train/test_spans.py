"""What is cut of conversations that no row can hold = what a person would cut, counted before training."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from training import CONTEXT, make_job, random_set, tiny_loop, token_set

from microlm.core.errors import UserError
from microlm.text.shards import TokenSet
from microlm.train.batches import IGNORE, PackedRows, TooLong, held_out_rows, spans
from microlm.train.batches.lengths import CAP, Histogram
from microlm.train.batches.spans import POLICIES, spans_of
from microlm.train.reporter import tell_lengths

ROOM = 17
Stretch = tuple[int, int, int]  # sample, start and end within it


def talk(*masks: str) -> TokenSet:
    """Samples whose token i is 3 + i, with a mask each: `.` is given, `x` is learnt."""
    ids = [[3 + i for i in range(len(m))] for m in masks]
    return token_set("talk", ids, [[int(c == "x") for c in m] for m in masks])


def pieces_by_hand(mask: str, policy: TooLong) -> list[tuple[int, int]]:
    """The stretches of one sample, one after the other."""
    size = len(mask)
    if size <= ROOM:
        return [(0, size)]
    if policy == "drop":
        return []
    if policy == "cut_left":
        return [(size - ROOM, size)]
    if policy == "cut_right":
        return [(0, ROOM)]
    found, start = [], 0
    while start < size - 1:
        found.append((start, min(start + ROOM, size)))
        start += ROOM - 1
    return found


def stretches(tokens: TokenSet, policy: TooLong) -> list[Stretch]:
    """What `spans_of` gives, place by place."""
    found, _ = spans_of(tokens, ROOM - 1, 1, policy)
    samples, starts, ends = found.take(np.arange(len(found)))
    begins = np.concatenate(([0], tokens.ends[:-1]))[samples]
    return list(zip(samples.tolist(), (starts - begins).tolist(), (ends - begins).tolist(), strict=True))


@example(masks=["." * 10 + "x" * (ROOM - 9)], policy="cut_right", chunk=1 << 22)
@settings(max_examples=150)
@given(
    masks=st.lists(st.text(".x", min_size=1, max_size=60), min_size=1, max_size=12),
    policy=st.sampled_from(POLICIES),
    chunk=st.sampled_from([1, 40, 1 << 22]),
)
def test_spans_and_counts_are_those_of_one_by_one(masks: list[str], policy: TooLong, chunk: int) -> None:
    expected: list[Stretch] = []
    counts: Counter[str] = Counter()
    for number, mask in enumerate(masks):
        learnt, kept = set(), []
        for start, end in pieces_by_hand(mask, policy):
            if here := {i for i in range(start + 1, end) if mask[i] == "x"}:
                kept.append((number, start, end))
                learnt |= here
        wanted = {i for i in range(1, len(mask)) if mask[i] == "x"}
        held = {i for _, start, end in kept for i in range(start + (start > 0 and policy == "split"), end)}
        counts["longer"] += len(mask) > ROOM
        counts["labels"] += len(wanted)
        counts["labels_lost"] += len(wanted - learnt)
        counts["tokens_lost"] += len(mask) - len(held)
        counts["without_labels"] += not wanted
        counts["dropped"] += bool(wanted) and not kept
        if kept and kept != [(number, 0, len(mask))]:
            counts["cut"] += 1
            counts["pieces"] += len(kept)
        counts["eos_cut"] += bool(kept) and max(wanted) not in learnt
        expected += kept
    tokens = talk(*masks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spans, "CHUNK", chunk)
        assert stretches(tokens, policy) == expected
        _, told = spans_of(tokens, ROOM - 1, 1, policy)
    assert {name: getattr(told, name) for name in counts} == counts
    assert told.samples == len(masks) and told.tokens == sum(map(len, masks))
    sizes = sorted(map(len, masks))
    for share in (50, 90, 99):
        assert getattr(told, f"p{share}") == sizes[-(-share * len(sizes) // 100) - 1]
    assert (told.longest, told.whole_context) == (sizes[-1], sizes[-1] - 1)


LONG = "......xxx........xxxxxxxxxx..."  # two answers in thirty tokens: rows hold seventeen


@pytest.mark.parametrize(
    ("policy", "expected", "words"),
    [
        ("drop", [], "1 longer than a row: 1 dropped; lost 30 tokens, 13 of 16 labels"),
        ("cut_left", [(0, 13, 30)], "1 longer than a row: 1 cut; lost 13 tokens, 3 of 16 labels"),
        (
            "cut_right",
            [(0, 0, 17)],
            "1 longer than a row: 1 cut; 1 lost the EOS of their last answer; "
            "lost 13 tokens, 10 of 16 labels",
        ),
        ("split", [(0, 0, 17), (0, 16, 30)], "1 longer than a row: 1 split into 2 pieces"),
    ],
)
def test_a_long_conversation_drawn_by_hand(policy: TooLong, expected: list[Stretch], words: str) -> None:
    tokens = talk(LONG, "..xxx")
    assert stretches(tokens, policy) == [*expected, (1, 0, 5)]
    _, told = spans_of(tokens, ROOM - 1, 1, policy)
    assert told.sentence().endswith(words)


def learnt(rows: PackedRows, count: int) -> Counter[tuple[int, int]]:
    """Every pair of a token read and a token learnt from it, in the first rows."""
    found: Counter[tuple[int, int]] = Counter()
    for batch in islice(rows.batches(1), count):
        some = batch.labels != IGNORE
        found.update(zip(batch.input_ids[some].tolist(), batch.labels[some].tolist(), strict=True))
    return found


def test_split_teaches_every_label_once_an_epoch() -> None:
    """Numbered tokens, a third of them labels, samples of up to five rows."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(2, 5 * CONTEXT, 40)
    starts = np.cumsum([3, *sizes[:-1]])
    masks = [rng.integers(0, 3, n) == 0 for n in sizes]
    numbered = [range(s, s + n) for s, n in zip(starts, sizes, strict=True)]
    rows = PackedRows({"talk": token_set("talk", numbered, masks)}, {}, CONTEXT, 0, too_long="split")
    every = {s + i for s, m in zip(starts, masks, strict=True) for i in np.flatnonzero(m) if i}
    found = learnt(rows, 3 * int(sizes.sum()) // CONTEXT)
    assert {label for _, label in found} == every and all(label == read + 1 for read, label in found)
    assert max(found.values()) - min(found.values()) <= 2  # those that wait for a row with room


def test_samples_keep_their_number_when_they_are_cut() -> None:
    """A step without a finite loss names its samples: the numbers are those of the set."""
    tokens = talk("..x" * 30, "..xx", "." * 9, "..x" * 40)
    for policy, expected in (("drop", {1}), ("cut_left", {0, 1, 3}), ("split", {0, 1, 3})):
        rows = PackedRows({"talk": tokens}, {}, CONTEXT, 0, too_long=policy)
        named = {s for batch in islice(rows.batches(1), 40) for row in batch.samples for _, s in row}
        assert named == expected


def test_a_stream_goes_on_where_it_was_in_the_midst_of_pieces() -> None:
    rng = np.random.default_rng(1)
    sets = {
        "talk": talk(*("." * int(n) + "x" * int(n) for n in rng.integers(2, 90, 60))),
        "documents": random_set("documents", 0),
    }
    rows = PackedRows(sets, {"talk": 0.7, "documents": 0.3}, CONTEXT, 0, too_long="split")
    stream = rows.batches(2)
    for _ in range(7):
        next(stream)
    state = json.loads(json.dumps(stream.state()))
    for one, other in zip(islice(stream, 9), rows.batches(2, state), strict=False):
        assert torch.equal(one.labels, other.labels) and one.samples == other.samples


def test_joined_rows_hold_one_token_less_of_a_sample() -> None:
    whole, _ = spans_of(talk("." * 8 + "x" * (ROOM - 8)), ROOM - 1, 1, "cut_left")
    cut, told = spans_of(talk("." * 8 + "x" * (ROOM - 8)), ROOM - 1, 0, "cut_left")
    assert whole.starts is None and cut.starts is not None and cut.starts.tolist() == [1]
    assert (told.longer, told.whole_context) == (1, ROOM)


def test_documents_go_on_whatever_the_policy() -> None:
    documents = token_set("documents", [[1] * 500, [1] * 3, [1]])
    for policy in POLICIES:
        found, told = spans_of(documents, CONTEXT, 1, policy)
        assert found.starts is None and len(found) == 3
        assert (told.longer, told.without_labels, told.labels, told.tokens_lost) == (1, 1, 501, 0)
    assert "1 longer than a row go on in the next" in told.sentence()


def test_what_holds_no_answer_is_a_sentence() -> None:
    with pytest.raises(UserError, match=r"none of 2 samples holds anything to learn"):
        PackedRows({"talk": talk("...", "x..")}, {}, CONTEXT, 0)
    with pytest.raises(UserError, match=r"none of 1 samples fits .* 32 tokens; raise loop.context, choose"):
        PackedRows({"talk": talk("." * 40 + "xx" + "." * 40)}, {}, CONTEXT, 0, too_long="cut_left")


def test_lengths_beyond_the_histogram_are_the_longest() -> None:
    found = Histogram()
    found.add(np.array([1, 2, 3, CAP + 5, CAP + 9]))
    assert [found.percentile(share) for share in (20, 50, 60, 99)] == [1, 3, 3, CAP + 9]
    assert Histogram().percentile(50) == 0


def test_the_counts_are_told_before_the_first_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = PackedRows({"talk": talk(LONG + "x" * CONTEXT, "..xx")}, {}, CONTEXT, 0, too_long="cut_right")
    job = make_job(tmp_path, tiny_loop(), train=rows, validation=None)
    tell_lengths(job)
    told: dict[str, Any] = json.loads((tmp_path / "logs/lengths.json").read_bytes())
    assert (told["context"], told["too_long"]) == (CONTEXT, "cut_right")
    assert told["training"]["talk"]["eos_cut"] == 1 and "validation" not in told
    err = capsys.readouterr().err.splitlines()
    assert err[0].startswith(
        "tiny: training: talk: 2 samples, 66 tokens (p50 4, p90 62, p99 62, longest 62); 1 "
    )
    assert err[1] == (
        "tiny: training: too_long is cut_right; loop.context=61 (now 32) would keep every sample whole"
    )


def test_held_out_sets_that_do_not_fit_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = PackedRows({"talk": talk("..xx")}, {}, CONTEXT, 0)
    sets = {"talk": talk("..xx"), "long": talk("." + "x" * 2 * CONTEXT)}
    for names, keep_best, told in (
        (("talk", "long"), False, r"tiny: validation: long is left out: 1 samples, .*1 dropped"),
        (("long",), False, r"tiny: warning: no held-out sample can be used, so there is no validation; hold"),
        (("long",), True, r"there is no validation, and keep_best keeps nothing; .* raise loop.context"),
    ):
        held_out = held_out_rows({name: sets[name] for name in names}, {}, CONTEXT)
        loop = tiny_loop(keep_best=keep_best, validation_rows=4)
        tell_lengths(make_job(tmp_path, loop, train=rows, validation=held_out))
        assert re.search(told, capsys.readouterr().err)
