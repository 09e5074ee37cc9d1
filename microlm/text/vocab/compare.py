"""Tokenizers measured on the same texts. Enters: peers and domains. Leaves: one report, plain values.

Averages over domains give every domain the same weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from microlm.core.metrics import Progress
from microlm.text.vocab import budget, domains, view
from microlm.text.vocab.peers import Cut, Peer

SCHEMA = 1
_BATCH = 256  # texts cut at once
EXAMPLE = (
    "李白（701年—762年），字太白，是唐代的诗人。学而时习之，不亦说乎？ "
    "A tokenizer's vocabulary has 6,400 entries: def f(x): return {'鼂': x**2}  # 😀"
)


def measure(peer: Peer, texts: Sequence[str]) -> dict[str, Any]:
    """Tokens, and what is lost, of some texts; rates are null where there is no text."""
    size, characters = sum(len(t.encode()) for t in texts), sum(map(len, texts))
    tokens = unknown = lost = changed = 0
    for start in range(0, len(texts), _BATCH):
        batch = texts[start : start + _BATCH]
        for text, cut in zip(batch, peer.cut(batch), strict=True):
            tokens += len(cut.ids)
            unknown += sum(cut.unknown)
            lost += view.lost_characters(text, cut)
            changed += peer.decode(cut.ids) != text
    return {
        "texts": len(texts),
        "bytes": size,
        "characters": characters,
        "tokens": tokens,
        "bytes_per_token": size / tokens if tokens else None,
        "tokens_per_character": tokens / characters if characters else None,
        "unknown_tokens": unknown,
        "lost_characters": lost,
        "changed_texts": changed,
    }


def compare(
    peers: Sequence[Peer],
    found: domains.Domains,
    shapes: list[budget.Shape],
    example: str = EXAMPLE,
    sizes: Sequence[str] = (),
) -> dict[str, Any]:
    """The report: every peer on every domain, its means, the models' budgets, one text as each cuts it.

    `sizes` names the peers that differ in nothing but their size, which is then drawn as a curve.
    """
    rows: list[dict[str, Any]] = []
    with Progress("tokenizer compare", len(peers) * len(found), "domains") as bar:
        for peer in peers:
            for name, texts in found.items():
                rows.append({"tokenizer": peer.name, "domain": name, **measure(peer, texts)})
                bar.update(1)
    means = [_mean(peer, [row for row in rows if row["tokenizer"] == peer.name]) for peer in peers]
    return {
        "schema": SCHEMA,
        "domains": domains.counts(found),
        "tokenizers": means,
        "sizes": list(sizes),
        "rows": rows,
        "budget": budget.rows(
            shapes,
            {m["tokenizer"]: m["vocab_size"] for m in means},
            {m["tokenizer"]: m["bytes_per_token"] for m in means},
        ),
        "example": {"text": example, "cuts": {peer.name: cut_of(peer, example) for peer in peers}},
    }


def cut_of(peer: Peer, text: str) -> list[view.Part]:
    """The parts of a text."""
    [cut] = peer.cut([text])
    return view.parts(text, Cut(*cut))


def _mean(peer: Peer, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A tokenizer over all domains."""

    def mean(key: str) -> float | None:
        values = [row[key] for row in rows if row[key] is not None]
        return sum(values) / len(values) if values else None

    return {
        "tokenizer": peer.name,
        "algorithm": peer.algorithm,
        "vocab_size": peer.vocab_size,
        "bytes_per_token": mean("bytes_per_token"),
        "tokens_per_character": mean("tokens_per_character"),
        **{k: sum(row[k] for row in rows) for k in ("texts", "lost_characters", "changed_texts")},
    }


def to_json(report: dict[str, Any]) -> dict[str, Any]:
    """The report as JSON takes it: parts of a cut are objects."""
    cuts = {name: [part._asdict() for part in row] for name, row in report["example"]["cuts"].items()}
    return {**report, "example": {**report["example"], "cuts": cuts}}
