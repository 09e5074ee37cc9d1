"""What the tokenizer that comes with the package was made from: the free part of the shared corpora.

Source (as the corpora name it) → licence, and megabytes of it at most, so that none outweighs the rest.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shared_data import raw_lines

PROSE: dict[str, tuple[str, int]] = {
    "LawRefBook/Laws": ("public domain", 6),
    "NiuTrans/Classical-Modern(classical)": ("public domain", 4),
    "tennessine/corpus": ("public domain", 5),
    "chinese-poetry/chinese-poetry": ("MIT", 4),
    "tallusil/luxun-novel-analysis": ("MIT", 2),
    "KaiserY/trpl-zh-cn": ("MIT", 2),
    "Anduin2017/HowToCook": ("Unlicense", 2),
    "python/python-docs-zh-cn": ("PSF-2.0", 6),
    "Snailclimb/JavaGuide": ("Apache-2.0", 6),
    "PaddlePaddle/docs": ("Apache-2.0", 2),
    "d2l-ai/d2l-zh": ("Apache-2.0", 2),
    "vesoft-inc/nebula-docs-cn": ("Apache-2.0", 2),
    "yy28/sql-docs.zh-cn": ("CC-BY-4.0", 4),
    "yuanzhoucq/cpp-docs.zh-cn": ("CC-BY-4.0", 4),
    "zhw2101024/powerShell-Docs.zh-cn": ("CC-BY-4.0", 2),
    "reactjs/zh-hans.react.dev": ("CC-BY-4.0", 2),
    "vuejs-translations/docs-zh-cn": ("CC-BY-4.0", 2),
    "php/doc-zh": ("CC-BY-3.0", 2),
}
ENGLISH: dict[str, tuple[str, int]] = {
    "MicrosoftDocs/cpp-docs": ("CC-BY-4.0", 3),
    "pydantic/pydantic": ("MIT", 3),
    "python/mypy": ("MIT", 3),
    "axolotl-ai-cloud": ("Apache-2.0", 3),
    "mosaicml/streaming": ("Apache-2.0", 3),
    "modelscope/ms-swift": ("Apache-2.0", 3),
    "InternLM/lmdeploy": ("Apache-2.0", 3),
}
CHAT: dict[str, tuple[str, int]] = {
    "thu-coai/CrossWOZ": ("Apache-2.0", 3),
    "thu-coai/KdConv": ("Apache-2.0", 3),
    "hiyouga/LLaMA-Factory": ("Apache-2.0", 3),
    "gunthercox/chatterbot-corpus": ("BSD-3-Clause", 3),
}


def write(out: Path) -> list[str]:
    """One JSONL file a source in `out`; the words that name them to the stage, in order."""
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[bytes]] = {}
    for table, records in ((PROSE, _prose()), (ENGLISH, _english()), (CHAT, _chats())):
        _take(table, records, found)
    for name, lines in found.items():
        (out / f"{name}.jsonl").write_bytes(b"".join(lines))
    return [f"jsonl:{path}" for path in sorted(out.glob("*.jsonl"))]


def _take(
    table: Mapping[str, tuple[str, int]], records: Iterator[dict[str, Any]], found: dict[str, list[bytes]]
) -> None:
    sizes = dict.fromkeys(table, 0)
    for record in records:
        source = next((s for s in table if record["source"].startswith(s)), None)
        if source is None:
            continue
        licence, most = table[source]
        line = json.dumps({**record, "licence": licence}, ensure_ascii=False).encode() + b"\n"
        if sizes[source] + len(line) <= most * 1_000_000:
            sizes[source] += len(line)
            found.setdefault(file_name(source), []).append(line)


def file_name(source: str) -> str:
    """The name of a source's file, without its ending."""
    return re.sub(r"[^\w.-]+", "_", source).strip("_")


def _prose() -> Iterator[dict[str, Any]]:
    for row in map(json.loads, raw_lines("pretrain.jsonl.zst")):
        yield {"text": row["text"], "source": row["source"]}


def _english() -> Iterator[dict[str, Any]]:
    for row in map(json.loads, raw_lines("kb.jsonl.zst")):
        if row["lang"] == "en":
            yield {"text": f"{row['title']}\n{row['text']}", "source": row["source"]}


def _chats() -> Iterator[dict[str, Any]]:
    for row in map(json.loads, raw_lines("sft_chat.jsonl.zst")):
        if "ShareGPT" not in row["licence"]:
            turns = [{"role": m["role"], "content": m["content"]} for m in row["conversations"]]
            yield {"messages": turns, "source": row["source"]}
    for row in map(json.loads, raw_lines("sft_single.jsonl.zst")):
        asked = "\n".join(filter(None, (row["instruction"], row["input"])))
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]
        yield {"messages": turns, "source": row["source"]}
