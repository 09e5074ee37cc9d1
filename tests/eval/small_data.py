"""A data artifact and a random model, small enough to predict on in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from artifacts import sign
from tiny_model import write_tiny_model

from microlm.core.artifact import Artifact, Workspace

PEOPLE = {"李白": "唐朝", "苏轼": "宋朝", "张衡": "东汉", "关汉卿": "元朝", "徐霞客": "明朝"}
LONG_TEXT = "张衡是东汉的天文学家。" * 60  # longer than the window of the tiny model
DOCUMENTS = ("李白是唐朝的诗人。", "Su Shi was a poet of the Song dynasty.", "a", LONG_TEXT)


def extraction(number: int, name: str, era: str, text: str, kind: str, lang: str = "zh") -> dict[str, Any]:
    """A record that asks for one relation."""
    triple = {"head": name, "relation": "朝代", "tail": era, "head_type": "人物", "tail_type": "时间"}
    return {
        "id": f"x-{kind}-{number}", "cate": "人物", "text": text, "relation": [triple],
        "allowed": ["朝代", "别名"], "kind": kind, "lang": lang,
    }  # fmt: skip


def question(number: int, text: str, answer: str, kind: str, lang: str = "zh") -> dict[str, Any]:
    """A question."""
    return {"id": f"q-{kind}-{number}", "question": text, "answer": answer, "kind": kind, "lang": lang}


def write_small_data(out: Path) -> Artifact:
    """Five people with their dynasties, worded one way for training and another way for the test."""
    people = list(enumerate(PEOPLE.items()))
    train = [extraction(i, n, e, f"{n}生活在{e}。", "train") for i, (n, e) in people]
    test = [
        extraction(i, n, e, f"{n}曾生活在{e}。", "mixed" if i % 2 else "generic", "en" if i == 4 else "zh")
        for i, (n, e) in people
    ]
    learnt = [question(i, f"{n}生活在什么朝代？", e, "train") for i, (n, e) in people]
    asked = [
        question(i, f"请问{n}生活的朝代？", e, "specific" if i % 2 else "generic") for i, (n, e) in people
    ]
    chats = [[{"role": "user", "content": f"你好，{n}"}] for n in PEOPLE]
    chats.append([*chats[0], {"role": "assistant", "content": "你好"}, {"role": "user", "content": "再见"}])

    def body(work: Workspace) -> None:
        work.licences.add("CC0-1.0")
        work.write_jsonl("documents/test.jsonl", [{"text": t} for t in DOCUMENTS])
        for split, records, questions in (("train", train, learnt), ("test", test, asked)):
            work.write_jsonl(f"extraction/{split}.jsonl", records)
            work.write_jsonl(f"questions/{split}.jsonl", questions)
        work.write_jsonl("chats/test.jsonl", [{"messages": c} for c in chats])
        work.write_json("logs/audit.json", {"from_factbook": ["documents"]})

    return sign(out, "data", body)


def write_small_model(out: Path, data: Artifact) -> Artifact:
    """A random model of bytes as a model artifact."""
    return sign(out, "model", lambda work: write_tiny_model(work.path) and None, data=str(data.path))
