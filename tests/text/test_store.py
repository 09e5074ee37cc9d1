"""A block exists when all of it does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from microlm.text.corpus.store import KEPT, BlockWriter, Reader, Store, finished, join_digest

TEXTS = ["春天的河水涨了。", "The river rose.", "😀 e\u0301"]


def written(folder: Path) -> None:
    writer = BlockWriter(folder, 0)
    for number, text in enumerate(TEXTS):
        writer.put((0, 0), bytes([number]) * 16, text.encode(), b'["f:%d",""]' % number, len(text))
    writer.finish({"report": 7})


def test_what_was_put_is_read_in_the_order_of_its_digests(tmp_path: Path) -> None:
    written(tmp_path)
    store = Store(tmp_path, 1)
    entries = store.entries(0)
    assert [join_digest(e["hi"], e["lo"]) for e in entries] == [bytes([n]) * 16 for n in range(3)]
    with Reader(tmp_path) as reader:
        found = reader.all(np.zeros(3, dtype=np.int64), entries[::-1])
    assert [(body.decode(), meta) for body, meta in found] == [
        (text, b'["f:%d",""]' % n) for n, text in reversed(list(enumerate(TEXTS)))
    ]


def test_kept_records_come_once_whatever_the_number_of_ranges(tmp_path: Path) -> None:
    written(tmp_path)
    store = Store(tmp_path, 1)
    store.set_state(0, np.array([KEPT, KEPT + 1, KEPT], dtype=np.uint8))
    for pieces in (1, 2, 7):
        rows = [store.kept(piece, pieces)[1] for piece in range(pieces)]
        assert np.concatenate(rows).tolist() == [0, 2]
    text, rows, starts, sizes = store.documents(0)
    found = [text[a : a + n].tobytes().decode() for a, n in zip(starts, sizes, strict=True)]
    assert rows.tolist() == [0, 2] and found == [TEXTS[0], TEXTS[2]]


@pytest.mark.parametrize("lost", ["payload", "index.npy", "json"])
def test_a_block_of_which_something_was_lost_is_not_finished(tmp_path: Path, lost: str) -> None:
    written(tmp_path)
    assert finished(tmp_path, 0)["report"] == 7
    assert finished(tmp_path, 1) is None
    path = tmp_path / f"00000.{lost}"
    path.write_bytes(path.read_bytes()[:-5])
    assert finished(tmp_path, 0) is None
    path.unlink()
    assert finished(tmp_path, 0) is None
