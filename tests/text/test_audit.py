"""The audit: numbers drawn by hand, rows for a terminal, a page that runs nothing a corpus says."""

from __future__ import annotations

import pytest

from microlm.core.records import Conversation, Document, Message
from microlm.text.audit import Audit, page, script_shares, summary_rows


def audit_of(documents: list[Document]) -> Audit:
    audit = Audit()
    for document in documents:
        audit.tallies["read"].keep()
        audit.survey.observe("documents", "train", document)
    audit.leakage["documents"] = 0
    return audit


def test_numbers_are_those_drawn_by_hand() -> None:
    audit = audit_of(
        [Document("李白ab1", "书:1", "MIT"), Document("诗" * 8, "书:2"), Document("x" * 4, "集#3", "MIT")]
    )
    found = audit.to_json()
    assert found["length_histogram"] == [
        {"below_chars": 8, "documents": 2},
        {"below_chars": 16, "documents": 1},
    ]
    assert found["document_chars"] == 17
    assert found["scripts"] == {"han": 10, "latin": 6, "other": 1}
    assert dict(script_shares(found)) == {"han": 10 / 17, "latin": 6 / 17, "other": 1 / 17}
    assert found["sources"] == {"书": 2, "集": 1}
    assert found["licences"] == {"MIT": 2, "unknown": 1}
    assert found["written"] == {"documents": {"train": 3}}
    assert found["warnings"] == ["1 records state no licence; add a 'licence' key"]


def test_a_record_that_is_lost_uncounted_is_found() -> None:
    audit = audit_of([Document("文")])
    audit.check()
    audit.tallies["read"].keep()
    with pytest.raises(AssertionError, match="accepted \\+ dropped = read"):
        audit.check()


def test_conversations_count_without_lengths() -> None:
    audit = audit_of([])
    audit.tallies["read"].keep()
    audit.survey.observe("conversations", "validation", Conversation((Message("user", "问"),), source="s"))
    audit.leakage["conversations"] = 0
    audit.check()
    assert audit.to_json()["length_histogram"] == []
    assert page(audit.to_json())


def test_leaks_and_renamed_fields_are_warned_of() -> None:
    audit = audit_of([Document("文", licence="MIT")])
    audit.leakage["documents"] = 2
    audit.tallies["read"].drop("missing_field:text (found body)", "f:1: x")
    assert audit.to_json()["warnings"] == [
        "1 records lack a key that others have: missing_field:text (found body); rename it",
        "2 training documents are also held out",
    ]


def test_rows_and_page_show_every_reason_and_run_no_markup() -> None:
    audit = audit_of([Document("文", "<script>alert(1)</script>", "MIT")])
    audit.tallies["read"].drop("missing_field:text (found <b>)", "f:1: <img src=x>")
    found = audit.to_json()
    rows = dict(summary_rows(found))
    assert rows["read"] == "2 read, 1 kept, 1 dropped"
    assert rows["  missing_field:text (found <b>)"] == "1, first f:1: <img src=x>"
    assert rows["written: documents"] == "train 1"
    html = page(found)
    assert "&lt;img src=x&gt;" in html and "<img src=x>" not in html and "<script>alert" not in html
    assert "http://" not in html.replace("http://www.w3.org", "") and "https://" not in html


def test_ten_thousand_sources_stay_a_short_list() -> None:
    audit = audit_of([Document("文", f"s{i}") for i in range(1000)])
    assert len(audit.survey.sources) <= 201 and audit.survey.sources.total() == 1000
