"""Rows of pairs: both sides whole in one row, apart from each other, cut alike, each pair once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pairs import random_pairs, sides_of
from training import CONTEXT, token_set

from microlm.core.errors import UserError
from microlm.train.batches import IGNORE
from microlm.train.batches.pairs import REFERENCE, held_out_pairs, pair_rows, pair_sums, pairs_of

TOKENS = random_pairs("chat", 0)


def test_a_row_holds_whole_pairs_side_by_side() -> None:
    rows, sides = pair_rows({"chat": TOKENS}, {}, CONTEXT, seed=0), sides_of(TOKENS)
    rows.references["chat"] += torch.arange(len(sides)).view(-1, 2)
    with rows.batches(8) as stream:
        batch = next(stream)
    seen = 0
    for r, samples in enumerate(batch.samples):
        for number, (name, pair) in enumerate(samples):
            assert name == "chat"
            for side in (0, 1):
                ids, mask = sides[2 * pair + side]
                here = batch.segments[r] == 2 * number + side
                kept = len(ids) - side  # the pair's last token is only a label
                assert batch.input_ids[r][here].tolist() == ids[:kept]
                assert batch.positions[r][here].tolist() == list(range(kept))
                learnt = [t if m else IGNORE for t, m in zip(ids[1:], mask[1:], strict=True)]
                assert batch.labels[r][here].tolist() == [*learnt, IGNORE][:kept]
                assert float(batch.extras[REFERENCE][r, number, side]) == 2 * pair + side
                seen += 1
        assert not batch.extras[REFERENCE][r, len(samples) :].any()
        assert (batch.segments[r] < 2 * len(samples)).all()
    assert seen == 2 * sum(map(len, batch.samples)) > 16


def test_in_order_every_pair_comes_once() -> None:
    sets = {"b": TOKENS, "a": random_pairs("a", 1, 25)}
    rows = pair_rows(sets, {}, CONTEXT, seed=0)
    pieces = [piece for row in rows.in_order() for piece in row]
    assert [(rows.names[p.group], p.sample) for p in pieces] == [
        (name, pair) for name in ("a", "b") for pair in rows.pairs[name].fitting(CONTEXT)
    ]
    assert all(sum(p.size for p in row) <= CONTEXT for row in rows.in_order())
    assert rows.assemble(list(rows.in_order())).label_count == sum(
        sum(mask) for name in ("a", "b") for _, mask in sides_of(sets[name])
    )


def test_rows_go_on_from_a_place() -> None:
    rows = pair_rows({"chat": TOKENS}, {}, CONTEXT, seed=3)
    with rows.batches(4, workers=1) as stream:
        next(stream)
        place, after = stream.state(), [next(stream) for _ in range(30)]
    with rows.batches(4, place) as stream:
        for expected in after:
            found = next(stream)
            assert found.samples == expected.samples
            assert torch.equal(found.segments, expected.segments)
    assert {s for batch in after for row in batch.samples for s in row} == {("chat", i) for i in range(40)}


def sized(prompt: int, *answers: int) -> list[tuple[list[int], list[int]]]:
    """Both sides of a pair with so many tokens."""
    return [([*range(10, 10 + prompt), *range(40, 40 + n), 2], [0] * prompt + [1] * (n + 1)) for n in answers]


LONG = [*sized(4, 3, 3), *sized(12, 5, 2), *sized(14, 3, 4), *sized(3, 14, 14)]


@pytest.mark.parametrize(("policy", "fitting", "cut", "lost"), [("drop", 1, 0, 0), ("cut_left", 3, 2, 12)])
def test_both_prompts_are_cut_alike_and_answers_never(policy: str, fitting: int, cut: int, lost: int) -> None:
    """Into 28 positions: pairs of 32 and 36 lose 2 and 4 a side; the last one's prompts are too short."""
    tokens = token_set("chat", [ids for ids, _ in LONG], [mask for _, mask in LONG])
    pairs = pairs_of(tokens, 28, policy)  # type: ignore[arg-type]
    told = pairs.lengths
    assert len(pairs.fitting(28)) == told.used == fitting
    assert (told.samples, told.longer, told.dropped, told.cut) == (4, 3, 4 - fitting, cut)
    assert told.tokens_lost == lost + sum(
        len(side[0]) for i in range(4) if i not in pairs.fitting(28) for side in LONG[2 * i : 2 * i + 2]
    )
    ends = np.asarray(pairs.tokens.ends)
    both = np.stack((pairs.middles, ends), 1).ravel()
    assert pairs.tokens.loss is not None
    ids, masks = (np.split(np.asarray(c), both)[:-1] for c in (pairs.tokens.tokens, pairs.tokens.loss))
    for number, (before, mask) in enumerate(LONG):
        assert ids[number].tolist() == before[len(before) - len(ids[number]) :]
        assert masks[number].sum() == sum(mask)
    gone = [len(before) - len(after) for (before, _), after in zip(LONG, ids, strict=True)]
    assert gone[::2] == gone[1::2]
    rows = pair_rows({"chat": tokens}, {}, 28, 0, policy)  # type: ignore[arg-type]
    assert rows.lengths == {"chat": told} and rows.too_long == policy
    with rows.batches(4) as stream:
        used = {pair for _ in range(6) for row in next(stream).samples for _, pair in row}
    assert used == set(pairs.fitting(28).tolist())


def test_pairs_that_no_row_can_hold_are_a_sentence_or_no_validation() -> None:
    ids, masks = zip(*sized(3, 14, 14), strict=True)
    tokens = token_set("preferences-chat-train", ids, masks)
    with pytest.raises(UserError, match=r"preferences-chat-train: none of 1 samples fits into a row of 28"):
        pair_rows({"chat": tokens}, {}, 28, 0, "cut_left")
    assert held_out_pairs({"chat": tokens}, {}, 28) is None
    assert held_out_pairs({"chat": tokens, "more": TOKENS}, {"chat": 1.0}, 28) is None
    found = held_out_pairs({"chat": tokens, "more": TOKENS}, {}, 28)
    assert found is not None and found.names == ["more"]
    assert found.left_out["chat"].dropped == 1 == len(found.left_out)


def test_sums_are_those_of_the_segments() -> None:
    values = torch.randn(3, 20, dtype=torch.float64, requires_grad=True)
    segments = torch.tensor([[0] * 5 + [1] * 4 + [2] * 6 + [3] * 2 + [-1] * 3] * 3)
    found = pair_sums(values, segments, 3)
    sums = found.detach()
    for row in range(3):
        for number in range(6):
            expected = values.detach()[row][segments[row] == number].sum()
            assert float(sums[row].flatten()[number]) == pytest.approx(float(expected), abs=1e-12)
    (gradient,) = torch.autograd.grad(found.sum(), values)
    assert torch.equal(gradient, (segments >= 0).to(gradient))
