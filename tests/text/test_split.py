"""Splits: by content alone, in the shares asked for, never the same text on two sides."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from microlm.core.errors import UserError
from microlm.core.records import Document
from microlm.text.dedup import digest
from microlm.text.split import (
    SPLITS,
    check_shares,
    line_of,
    place,
    records_of,
    rewrite,
    split_of,
)


def shelve(root: Path, texts: list[str]) -> None:
    for kind, splits in SPLITS.items():
        for split in splits:
            path = place(root, kind, split)
            path.parent.mkdir(parents=True, exist_ok=True)
            mine = [t for t in texts if kind == "documents" and split_of(digest(t), 0.1, 0.2) == split]
            path.write_text("".join(line_of(Document(t)) for t in mine), encoding="utf-8", newline="\n")


def texts_of(root: Path, split: str) -> list[str]:
    return [r.text for r in records_of(root, "documents", split)]  # type: ignore[arg-type]


def test_shares_are_kept_and_equal_texts_stay_together() -> None:
    counts = Counter(split_of(digest(f"文{i}"), 0.1, 0.2) for i in range(20_000))
    assert abs(counts["validation"] / 20_000 - 0.1) < 0.01
    assert abs(counts["test"] / 20_000 - 0.2) < 0.01
    assert split_of(digest("李白，是诗人"), 0.3, 0.3) == split_of(digest("李白是诗人。"), 0.3, 0.3)


def test_a_text_keeps_its_split_whatever_stands_beside_it(tmp_path: Path) -> None:
    some = [f"文{i}" for i in range(300)]
    shelve(tmp_path / "a", some)
    shelve(tmp_path / "b", [f"更多{i}" for i in range(300)] + some[::-1])
    for split in ("train", "validation", "test"):
        assert set(texts_of(tmp_path / "a", split)) == set(texts_of(tmp_path / "b", split)) & set(some)


def test_rewrite_keeps_the_bytes_of_what_does_not_change(tmp_path: Path) -> None:
    shelve(tmp_path, [f"文{i}\u2028行" for i in range(50)])
    path = place(tmp_path, "documents", "train")
    before = path.read_bytes()
    rewrite(tmp_path, "documents", "train", lambda record: record)
    assert path.read_bytes() == before
    rewrite(tmp_path, "documents", "train", lambda record: None)
    assert path.read_bytes() == b""


def test_shares_that_leave_nothing_to_train_on_are_refused() -> None:
    with pytest.raises(UserError, match="leave nothing to train on"):
        check_shares(0.5, 0.5)
