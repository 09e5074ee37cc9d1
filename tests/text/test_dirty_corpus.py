"""Cleaning against real text with labelled dirt: what is injected is found, what is clean stays."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from itertools import islice

import pytest
from shared_data import raw_lines

from microlm.core.records import Document
from microlm.text.clean import CleanRecipe, Effects, clean, rules
from microlm.text.sources import factbook
from microlm.text.sources.factbook import FactbookSizes

MIN_RECALL, MAX_FALSE_DROPS = 0.95, 0.01
MASKS = (
    "mask_id_numbers",
    "mask_bank_cards",
    "mask_phones",
    "mask_emails",
    "mask_ip_addresses",
    "mask_accounts",
)
RULES = {  # injected kind → the rules that edit or drop it; the readers and the duplicates see to the others
    "very_short": ("too_short",),
    "empty_text": ("too_short",),
    "boilerplate": ("boilerplate_lines",),
    "control_and_invisible_chars": ("control_characters",),
    "pii_synthetic": MASKS,
    "mojibake_replacement_char": ("broken_encoding",),
    "mojibake_latin1": ("mojibake",),
    "mojibake_utf8_as_gbk": ("mojibake", "broken_encoding"),
    "repetition_spam": ("repetition",),
    "ad_spam": ("ad_spam",),
    "spaced_out_characters": ("spaced_out",),
    "html_xml_tags": ("html",),
    "html_entities": ("html",),
    "fullwidth_ascii": ("fullwidth_ascii",),
    "very_long_line": ("long_lines",),
}
NATURAL = {
    "traditional_chinese": ("simplified",),
    "link_footer": ("link_lines",),
    "yaml_front_matter": ("front_matter",),
    "xml_entities": ("html",),
    "non_chinese": ("language_en",),
}


def labelled(origin: str) -> Iterator[tuple[list[str], str]]:
    """(kinds, text) of the lines of an origin that a reader takes."""
    lines = list(raw_lines("pretrain_dirty.jsonl.zst"))
    for label in map(json.loads, raw_lines("pretrain_dirty_labels.jsonl.zst")):
        if label["origin"] == origin:
            try:
                text = json.loads(lines[label["line"]])["text"]
            except (ValueError, KeyError):
                continue
            if isinstance(text, str):
                yield label["kinds"], text


def recall(origin: str, table: dict[str, tuple[str, ...]]) -> dict[str, float]:
    """For each kind, the share of its lines that a rule named for it edited or dropped."""
    steps = rules(CleanRecipe(mask_pii=True, simplify=True, languages=["zh"]))
    found: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for kinds, text in labelled(origin):
        if not (named := set(kinds) & set(table)):
            continue
        effects = Effects()
        _, reason = clean(Document(text), steps, effects)
        did = {*effects.changed, reason}
        total.update(named)
        found.update(kind for kind in named if did.intersection(table[kind]))
    return {kind: found[kind] / total[kind] for kind in table}


def dropped(texts: Iterator[str], recipe: CleanRecipe) -> float:
    """The share of texts that cleaning drops."""
    steps = rules(recipe)
    reasons = [clean(Document(text), steps, Effects())[1] for text in texts]
    return sum(reason is not None for reason in reasons) / len(reasons)


@pytest.mark.shared
def test_injected_dirt_is_found() -> None:
    shares = recall("injected", RULES)
    assert {kind: share for kind, share in shares.items() if share < MIN_RECALL} == {}


@pytest.mark.shared
def test_natural_dirt_is_found() -> None:
    shares = recall("natural", NATURAL)
    assert {kind: share for kind, share in shares.items() if share < MIN_RECALL} == {}


@pytest.mark.shared
@pytest.mark.parametrize(
    "recipe", [CleanRecipe(), CleanRecipe(mask_pii=True, simplify=True, languages=["zh"])]
)
def test_clean_lines_are_kept(recipe: CleanRecipe) -> None:
    texts = [text for kinds, text in labelled("natural") if "clean" in kinds]
    assert len(texts) > 600 and dropped(iter(texts), recipe) <= MAX_FALSE_DROPS


@pytest.mark.shared
def test_prose_is_kept() -> None:
    lines = islice(raw_lines("pretrain.jsonl.zst"), 5000)
    assert dropped((json.loads(line)["text"] for line in lines), CleanRecipe()) <= MAX_FALSE_DROPS


def test_the_factbook_loses_only_what_it_soiled() -> None:
    sizes = FactbookSizes(documents=3000, questions=0, extraction=0, reading=0, chat=0)
    documents = factbook.generate(0, None, sizes).documents
    steps = rules(CleanRecipe())
    reasons = Counter(clean(document, steps, Effects())[1] for document in documents)
    assert set(reasons) == {None, "too_short", "broken_encoding", "repetition"}
    assert reasons[None] > 0.97 * len(documents)
