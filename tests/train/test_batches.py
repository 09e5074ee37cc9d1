"""Packing: what a row holds, what is a label, and that nothing is lost, doubled or out of order."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from training import CONTEXT, random_set, tiny_decoder, tiny_loop, token_set

from microlm.core.errors import UserError
from microlm.train import objectives
from microlm.train.batches import IGNORE, Batch, PackedRows, document_mask, held_out_rows
from microlm.train.step import make_forward


def packed(rows: int = 30, seed: int = 3, **weights: float) -> list[Batch]:
    sets = {"documents": random_set("documents", 0), "question": random_set("question", 1, 80, True)}
    stream = PackedRows(sets, weights, CONTEXT, seed).batches(1)
    return list(islice(stream, rows))


def test_a_row_drawn_by_hand() -> None:
    talk = token_set("talk", [[11, 12, 13, 14, 15, 16]], [[0, 0, 0, 1, 1, 0]])
    batch = next(PackedRows({"talk": talk}, {}, 16, 0).batches(1))
    x = IGNORE
    assert batch.input_ids[0].tolist() == [11, 12, 13, 14, 15, 16, 11, 12, 13, 14, 15, 16, 0, 0, 0, 0]
    assert batch.labels[0].tolist() == [x, x, 14, 15, x, x, x, x, 14, 15, x, x, x, x, x, x]
    assert batch.segments[0].tolist() == [0] * 6 + [1] * 6 + [-1] * 4
    assert batch.label_count == 4


def test_every_token_of_a_document_but_its_first_is_a_label() -> None:
    batch = next(PackedRows({"documents": token_set("documents", [range(3, 15)])}, {}, 16, 0).batches(1))
    assert batch.input_ids[0].tolist() == [*range(3, 15), 0, 0, 0, 0]
    assert batch.labels[0].tolist() == [*range(4, 15), IGNORE, IGNORE, IGNORE, IGNORE, IGNORE]


def test_a_sample_may_fill_the_row_and_its_last_label() -> None:
    batch = next(
        PackedRows({"documents": token_set("documents", [list(range(3, 20))])}, {}, 16, 0).batches(1)
    )
    assert batch.input_ids[0].tolist() == list(range(3, 19))
    assert batch.labels[0].tolist() == list(range(4, 20))


def test_the_mask_drawn_by_hand() -> None:
    mask = document_mask(torch.tensor([[0, 0, 1, 1, -1]]), torch.float32)
    visible = (mask[0, 0] == 0).int().tolist()
    assert visible == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]
    assert (mask[0, 0][mask[0, 0] != 0] == -torch.inf).all()
    assert mask.shape == (1, 1, 5, 5)


def test_packed_equals_unpacked_loss() -> None:
    decoder = tiny_decoder()
    with torch.no_grad():
        for name, weight in decoder.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(5))
    forward = make_forward(decoder, tiny_loop())
    total, alone, count = 0.0, 0.0, 0
    with torch.no_grad():
        for batch in packed(8):
            mask = document_mask(batch.segments, torch.float32)
            total += float(objectives.next_token(forward(batch.input_ids, mask), decoder, batch))
            count += batch.label_count
            for segment in range(int(batch.segments.max()) + 1):
                here = batch.segments[0] == segment
                logits = decoder(batch.input_ids[:, here])[0]
                labels = batch.labels[0, here]
                loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
                alone += float(loss) if (labels != IGNORE).any() else 0.0
    assert abs(total - alone) / count < 1e-5
    assert count > 100


def test_labels_never_cross_a_border() -> None:
    for batch in packed(60):
        ids, labels, segments = batch.input_ids[0], batch.labels[0], batch.segments[0]
        for j in (labels != IGNORE).nonzero().flatten().tolist():
            assert segments[j] >= 0
            if j + 1 < CONTEXT:
                assert segments[j + 1] == segments[j]
                assert labels[j] == ids[j + 1]


def test_every_sample_once_an_epoch_in_a_new_order() -> None:
    rows = PackedRows({"documents": random_set("documents", 0, 50)}, {}, CONTEXT, 7)
    order = rows._order(0)
    first, second = list(islice(order, 50)), list(islice(order, 50))
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second


def test_rows_hold_each_sample_as_often_as_any_other() -> None:
    samples = [[i + 1] * (3 + i % 7) for i in range(40)]
    stream = PackedRows({"documents": token_set("documents", samples)}, {}, CONTEXT, 0).batches(1)
    seen: Counter[int] = Counter()
    for batch in islice(stream, 100):
        for segment in range(int(batch.segments.max()) + 1):
            seen[int(batch.input_ids[batch.segments == segment][0])] += 1
    assert len(seen) == 40
    assert max(seen.values()) - min(seen.values()) <= 3  # up to 64 samples wait for a row that they fit into


def test_the_order_depends_on_seed_and_position_only() -> None:
    sets = {"documents": random_set("documents", 0)}
    whole = list(islice(PackedRows(sets, {}, CONTEXT, 3).batches(4), 6))
    later = next(PackedRows(sets, {}, CONTEXT, 3).batches(4, start=5))
    assert torch.equal(whole[5].input_ids, later.input_ids)
    assert torch.equal(whole[5].labels, later.labels)
    single = list(islice(PackedRows(sets, {}, CONTEXT, 3).batches(1), 24))
    assert torch.equal(torch.cat([b.input_ids for b in single[20:]]), later.input_ids)
    other = next(PackedRows(sets, {}, CONTEXT, 4).batches(4, start=5))
    assert not torch.equal(later.input_ids, other.input_ids)


def test_too_long_conversations_are_left_out_and_counted() -> None:
    sizes = [5, CONTEXT + 1, CONTEXT + 2, 300]
    talk = token_set("talk", [[i + 1] * n for i, n in enumerate(sizes)], [[1] * n for n in sizes])
    rows = PackedRows({"talk": talk}, {}, CONTEXT, 0)
    assert rows.dropped == {"talk": 2}
    seen = torch.cat([b.input_ids for b in islice(rows.batches(1), 20)]).unique().tolist()
    assert seen == [0, 1, 2]


def test_a_long_document_is_cut_without_losing_a_label() -> None:
    for size in (2, CONTEXT, CONTEXT + 1, CONTEXT + 2, 2 * CONTEXT + 1, 500):
        rows = PackedRows({"documents": token_set("documents", [range(1, size + 1)])}, {}, CONTEXT, 0)
        labels: Counter[int] = Counter()
        for piece in rows._cut(rows.sets[0], 0):
            assert len(piece.tokens) <= CONTEXT + 1
            labels.update(piece.tokens[1:].tolist())
        assert labels == Counter(range(2, size + 1))


@pytest.mark.parametrize(
    "weights", [{"documents": 0.7, "question": 0.3}, {"documents": 1, "question": 9}, {}]
)
def test_the_mixture_is_a_share_of_tokens(weights: dict[str, float]) -> None:
    sets = {
        "documents": token_set("documents", [[1] * n for n in range(5, 30)]),
        "question": token_set("question", [[2] * n for n in (4, 6, 20)], [[1] * n for n in (4, 6, 20)]),
    }
    ids = torch.cat([b.input_ids for b in islice(PackedRows(sets, weights, CONTEXT, 0).batches(8), 60)])
    share = float((ids == 1).sum() / (ids > 0).sum())
    total = sum(weights.values())
    assert abs(share - (weights["documents"] / total if weights else 0.5)) < 0.02


def test_a_share_of_nothing_leaves_a_set_out() -> None:
    assert PackedRows(
        {"a": random_set("a", 0), "b": random_set("b", 1)}, {"a": 1.0, "b": 0.0}, CONTEXT, 0
    ).names == ["a"]


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"question": 1.0}, "mixture: no token set 'question'"),
        ({"documents": -1.0}, "mixture: the share of 'documents' is -1.0"),
        ({"documents": 0.0}, "mixture: every share is 0"),
    ],
)
def test_a_wrong_mixture_is_a_sentence(weights: dict[str, float], words: str) -> None:
    with pytest.raises(UserError, match=words):
        PackedRows({"documents": random_set("documents", 0)}, weights, CONTEXT, 0)


def test_nothing_that_fits_is_a_sentence() -> None:
    long = token_set("conversations-talk-train", [[1] * 100], [[1] * 100])
    with pytest.raises(
        UserError, match=r"none of 1 samples fits into a row of 32 tokens; raise loop.context"
    ):
        PackedRows({"talk": long}, {}, CONTEXT, 0)
    with pytest.raises(UserError, match=r"hold no token set"):
        PackedRows({}, {}, CONTEXT, 0)


def test_validation_uses_what_there_is() -> None:
    empty = token_set("documents", [[1]])
    long = token_set("talk", [[1] * 100], [[1] * 100])
    good = random_set("question", 0, conversations=True)
    assert held_out_rows({}, {}, CONTEXT) is None
    assert held_out_rows({"documents": empty, "talk": long}, {}, CONTEXT) is None
    assert held_out_rows({"talk": long, "question": good}, {"talk": 1.0}, CONTEXT) is None
    rows = held_out_rows({"talk": long, "question": good}, {"talk": 0.5, "question": 0.5, "x": 1.0}, CONTEXT)
    assert rows is not None
    assert rows.names == ["question"]
    assert np.isclose(sum(rows.shares), 1)
