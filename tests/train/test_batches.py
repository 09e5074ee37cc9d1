"""Packing: what a row holds, what is a label, and that nothing is lost, doubled or seen by strangers."""

from __future__ import annotations

import json
from collections import Counter
from itertools import combinations, islice, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from shared_data import raw_lines
from torch.nn import functional as F
from training import CONTEXT, random_set, tiny_decoder, tiny_loop, token_set

from microlm.core.errors import UserError
from microlm.model.transformer import Decoder
from microlm.text.shards import TokenSet
from microlm.train import objectives
from microlm.train.batches import IGNORE, Batch, PackedRows, document_mask, held_out_rows
from microlm.train.batches.packing import best_sum
from microlm.train.step import make_forward

X = IGNORE


def both() -> dict[str, TokenSet]:
    return {"documents": random_set("documents", 0), "question": random_set("question", 1, 80, True)}


def packed(rows: int = 30, seed: int = 3, document_mask: bool = True, **weights: float) -> list[Batch]:
    return list(islice(PackedRows(both(), weights, CONTEXT, seed, document_mask).batches(1), rows))


def rows_of(sets: dict[str, TokenSet], context: int, count: int, **fields: Any) -> Batch:
    return next(PackedRows(sets, {}, context, 0, **fields).batches(count))


def test_a_row_of_conversations_drawn_by_hand() -> None:
    talk = token_set("talk", [[11, 12, 13, 14, 15, 16]], [[0, 0, 0, 1, 1, 0]])
    batch = rows_of({"talk": talk}, 16, 1)
    assert batch.input_ids[0].tolist() == [11, 12, 13, 14, 15] * 3 + [0]
    assert batch.labels[0].tolist() == [X, X, 14, 15, X] * 3 + [X]
    assert batch.segments[0].tolist() == [0] * 5 + [1] * 5 + [2] * 5 + [-1]
    assert batch.positions[0].tolist() == [*range(5)] * 3 + [0]
    assert batch.samples == ((("talk", 0),) * 3,)
    assert batch.label_count == 6


def test_a_document_goes_on_in_the_next_row() -> None:
    batch = rows_of({"documents": token_set("documents", [range(3, 15)])}, 16, 2)
    assert batch.input_ids.tolist() == [
        [*range(3, 14), *range(3, 8)],
        [*range(8, 14), *range(3, 13)],
    ]
    assert batch.labels.tolist() == [
        [*range(4, 15), *range(4, 9)],
        [*range(9, 15), *range(4, 14)],
    ]
    assert batch.segments.tolist() == [[0] * 11 + [1] * 5, [0] * 6 + [1] * 10]


def test_joined_rows_keep_the_end_of_a_sample_and_learn_nothing_across_it() -> None:
    documents = {"documents": token_set("documents", [range(3, 9)])}
    batch = rows_of(documents, 16, 1, document_mask=False)
    assert batch.input_ids[0].tolist() == [*range(3, 9), *range(3, 9), *range(3, 7)]
    assert batch.labels[0].tolist() == [*range(4, 9), X, *range(4, 9), X, *range(4, 8)]
    assert batch.segments[0].tolist() == [0] * 16
    assert batch.positions[0].tolist() == [*range(16)]


def test_the_mask_drawn_by_hand() -> None:
    mask = document_mask(torch.tensor([[0, 0, 1, 1, -1]]), torch.float32)
    visible = (mask[0, 0] == 0).int().tolist()
    assert visible == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]
    assert (mask[0, 0][mask[0, 0] != 0] == -torch.inf).all()
    assert mask.shape == (1, 1, 5, 5)


def noisy_decoder() -> Decoder:
    decoder = tiny_decoder()
    with torch.no_grad():
        for name, weight in decoder.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(5))
    return decoder


def loss_alone(decoder: Decoder, ids: torch.Tensor, labels: torch.Tensor) -> float:
    if not bool((labels != IGNORE).any()):
        return 0.0
    return float(F.cross_entropy(decoder(ids[None])[0], labels, ignore_index=IGNORE, reduction="sum"))


@torch.no_grad()
def test_packed_equals_unpacked_loss_with_positions_reset_or_not() -> None:
    decoder = noisy_decoder()
    forward = make_forward(decoder, tiny_loop())
    reset, running, alone, count = 0.0, 0.0, 0.0, 0
    for batch in packed(8):
        mask = document_mask(batch.segments, torch.float32)
        plain = torch.arange(CONTEXT).expand(1, -1)
        reset += float(objectives.next_token(forward(batch.input_ids, batch.positions, mask), decoder, batch))
        running += float(objectives.next_token(forward(batch.input_ids, plain, mask), decoder, batch))
        count += batch.label_count
        for segment in range(int(batch.segments.max()) + 1):
            here = batch.segments[0] == segment
            alone += loss_alone(decoder, batch.input_ids[0, here], batch.labels[0, here])
    assert count > 100
    assert abs(reset - alone) / count < 1e-5
    assert abs(running - alone) / count < 1e-5


@torch.no_grad()
def test_joined_rows_equal_one_long_text() -> None:
    decoder = noisy_decoder()
    forward = make_forward(decoder, tiny_loop())
    joined, plain, masked, count = 0.0, 0.0, 0.0, 0
    for batch in packed(8, document_mask=False):
        mask = document_mask(batch.segments, torch.float32)
        joined += float(
            objectives.next_token(forward(batch.input_ids, batch.positions, mask), decoder, batch)
        )
        whole = int((batch.segments[0] >= 0).sum())
        plain += loss_alone(decoder, batch.input_ids[0, :whole], batch.labels[0, :whole])
        ends = [*((batch.labels[0] == IGNORE).nonzero().flatten() + 1).tolist(), whole]
        for start, end in zip([0, *ends], ends, strict=False):
            masked += loss_alone(decoder, batch.input_ids[0, start:end], batch.labels[0, start:end])
        count += batch.label_count
    assert abs(joined - plain) / count < 1e-5
    assert abs(joined - masked) / count > 1e-3  # who sees his neighbours predicts something else


def test_labels_never_cross_a_border() -> None:
    for masked in (True, False):
        for batch in packed(60, document_mask=masked):
            ids, labels, segments = batch.input_ids[0], batch.labels[0], batch.segments[0]
            for j in (labels != IGNORE).nonzero().flatten().tolist():
                assert segments[j] >= 0
                if j + 1 < CONTEXT and segments[j + 1] == segments[j]:
                    assert labels[j] == ids[j + 1]


LENGTHS = [2, 3, CONTEXT, CONTEXT + 1, CONTEXT + 2, 2 * CONTEXT + 1, 500, 17]


def test_every_step_of_every_document_is_learnt_once_an_epoch() -> None:
    starts = np.cumsum([0, *LENGTHS])
    samples = [range(a + 1, b + 1) for a, b in pairwise(starts)]
    positions = sum(LENGTHS) - len(LENGTHS)
    batch = rows_of({"documents": token_set("documents", samples)}, CONTEXT, 3 * positions // CONTEXT + 1)
    assert batch.label_count == batch.input_ids.numel()  # no padding, and nothing that carries no loss
    steps = zip(batch.input_ids.flatten().tolist(), batch.labels.flatten().tolist(), strict=True)
    for _ in range(3):
        epoch = Counter(islice(steps, positions))
        assert epoch == Counter((t, t + 1) for s in samples for t in s[:-1])


def test_vocabularies_beyond_16_bits() -> None:
    ids = np.array([70_000, 80_000, 90_000, 100_000], dtype="<u4")
    batch = rows_of({"documents": TokenSet("documents", ids, None, np.array([4]))}, 16, 1)
    assert batch.input_ids[0, :4].tolist() == [70_000, 80_000, 90_000, 70_000]
    assert batch.labels[0, :3].tolist() == [80_000, 90_000, 100_000]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_set_of_few_samples(count: int) -> None:
    samples = [[10 * (i + 1), 10 * (i + 1) + 1] for i in range(count)]
    batch = rows_of({"documents": token_set("documents", samples)}, 16, 6)
    assert set(batch.input_ids.flatten().tolist()) == {s[0] for s in samples}
    seen = Counter(name for row in batch.samples for name in row)
    assert max(seen.values()) - min(seen.values(), default=0) <= 1


def test_samples_say_where_each_token_comes_from() -> None:
    sets = both()
    for batch in packed(40):
        for segment, (name, number) in enumerate(batch.samples[0]):
            tokens = sets[name]
            begin = int(tokens.ends[number - 1]) if number else 0
            whole = tokens.tokens[begin : int(tokens.ends[number])].tolist()
            piece = batch.input_ids[0, batch.segments[0] == segment].tolist()
            assert any(whole[i : i + len(piece)] == piece for i in range(len(whole)))
        assert int(batch.segments.max()) + 1 == len(batch.samples[0])


@pytest.mark.shared
def test_real_documents_come_back_byte_for_byte() -> None:
    texts = [json.loads(line)["text"].encode() for line in islice(raw_lines("pretrain.jsonl.zst"), 300)]
    samples = [[b + 1 for b in text] + [0] for text in texts]
    total = sum(len(s) - 1 for s in samples)
    batch = rows_of({"documents": token_set("documents", samples)}, 512, -(-total // 512))
    found: dict[int, bytes] = {}
    for r, row in enumerate(batch.samples):
        for segment, (_, number) in enumerate(row):
            piece = bytes(i - 1 for i in batch.input_ids[r, batch.segments[r] == segment].tolist())
            if found.get(number, b"") != texts[number]:  # whole already: the next epoch has begun
                found[number] = found.get(number, b"") + piece
    assert [found[i] for i in range(len(texts))] == texts


def test_rows_hold_each_conversation_as_often_as_any_other() -> None:
    samples = [[i + 1] * (3 + i % 7) for i in range(40)]
    talk = token_set("talk", samples, [[1] * len(s) for s in samples])
    batch = rows_of({"talk": talk}, CONTEXT, 200)
    seen = Counter(name for row in batch.samples for name in row)
    assert len(seen) == 40
    assert max(seen.values()) - min(seen.values()) <= 3  # up to 64 wait for a row that they fit into


def test_best_sum_equals_trying_everything() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        sizes, room = rng.integers(1, 12, rng.integers(0, 8)).tolist(), int(rng.integers(0, 30))
        chosen = best_sum(sizes, room)
        sums = {sum(c) for n in range(len(sizes) + 1) for c in combinations(sizes, n)}
        assert sum(sizes[i] for i in chosen) == max(s for s in sums if s <= room)
        assert chosen == sorted(set(chosen), reverse=True)
    assert best_sum([5, 5, 5], 10) == [1, 0]


def test_conversations_leave_next_to_no_padding() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(30, 140, 2000)
    talk = token_set("talk", [[1] * n for n in lengths], [[1] * n for n in lengths])
    stream = PackedRows({"talk": talk}, {}, 256, 0).batches(16)
    for _ in range(40):
        batch = next(stream)
    state = stream.state()
    assert state["rows"] == 640
    assert 0 <= state["padding"] / (640 * 256) < 0.01
    assert int((batch.segments < 0).sum()) < 0.02 * batch.segments.numel()


def test_too_long_conversations_are_left_out_and_counted() -> None:
    sizes = [5, CONTEXT + 1, CONTEXT + 2, 300]
    talk = token_set("talk", [[i + 1] * n for i, n in enumerate(sizes)], [[1] * n for n in sizes])
    rows = PackedRows({"talk": talk}, {}, CONTEXT, 0)
    assert rows.lengths["talk"].dropped == 2
    seen = torch.cat([b.input_ids for b in islice(rows.batches(1), 20)]).unique().tolist()
    assert set(seen) - {0} == {1, 2}
    joined = PackedRows({"talk": talk}, {}, CONTEXT, 0, document_mask=False)
    assert joined.lengths["talk"].dropped == 3


@pytest.mark.parametrize(
    "weights", [{"documents": 0.7, "question": 0.3}, {"documents": 1, "question": 9}, {}]
)
def test_the_mixture_is_a_share_of_positions(weights: dict[str, float]) -> None:
    sets = {
        "documents": token_set("documents", [[1] * n for n in range(5, 30)]),
        "question": token_set("question", [[2] * n for n in (4, 6, 20)], [[1] * n for n in (4, 6, 20)]),
    }
    ids = torch.cat([b.input_ids for b in islice(PackedRows(sets, weights, CONTEXT, 0).batches(8), 60)])
    share = float((ids == 1).sum() / (ids > 0).sum())
    total = sum(weights.values())
    assert abs(share - (weights["documents"] / total if weights else 0.5)) < 0.02


def test_a_share_of_nothing_leaves_a_set_out() -> None:
    sets = {"a": random_set("a", 0), "b": random_set("b", 1)}
    assert PackedRows(sets, {"a": 1.0, "b": 0.0}, CONTEXT, 0).names == ["a"]


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
    words = r"none of 1 samples fits into a row of 32 tokens; raise loop.context"
    with pytest.raises(UserError, match=words):
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
    assert rows.names == ["question"] and rows.left_out["talk"].dropped == 1 == len(rows.left_out)
    assert np.isclose(sum(rows.shares), 1)
