"""The data engine: equal bytes whatever the workers, the order, the kills; what is planted is found."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from microlm.core import runtime
from microlm.core.artifact import open_artifact
from microlm.text.corpus import contaminate
from microlm.text.corpus.cut import cut
from microlm.text.near.signature import jaccard, shingles
from microlm.text.prepare import PrepareRecipe, run

HAN = [chr(c) for c in range(0x4E00, 0x5E00)]
Corpus = tuple[Path, list[tuple[str, str]]]
NOTICE = "编者按语之外的一切文字均由读者自行判断其中的真伪"


def sentence(rng: random.Random) -> str:
    return "".join(rng.choices(HAN, k=rng.randint(8, 24))) + rng.choice("。！？")


def text(rng: random.Random, sentences: int = 12) -> str:
    return "".join(sentence(rng) + ("\n" if rng.random() < 0.2 else "") for _ in range(sentences))


def altered(rng: random.Random, original: str, share: float = 0.012) -> str:
    """The text with a few characters replaced: a Jaccard of 5-grams of about .85 to .95."""
    chars = list(original)
    for at in rng.sample(range(len(chars)), max(1, int(share * len(chars)))):
        chars[at] = rng.choice(HAN)
    return "".join(chars)


def corpus(folder: Path, count: int = 400, shards: int = 3) -> list[tuple[str, str]]:
    """Shards of random texts with exact and near duplicates, shared lines and faults; the near pairs."""
    rng = random.Random(5)
    texts = [text(rng) for _ in range(count)]
    exact = [t.replace("。", "．").replace("\n", " ") for t in texts[:40]]
    near = [altered(rng, t) for t in texts[40:80]]
    noticed = [f"{t}\n{NOTICE}" for t in texts[80:160]]
    records = [*texts[:80], *noticed, *texts[160:], *exact, *near]
    lines = [json.dumps({"text": t, "licence": "MIT"}, ensure_ascii=False) for t in records]
    lines += ['{"text": ', '{"text": "\\ud800"}', '{"body": "x"}']
    rng.shuffle(lines)
    folder.mkdir()
    for number in range(shards):
        (folder / f"{number}.jsonl").write_text("\n".join(lines[number::shards]) + "\n", encoding="utf-8")
    return list(zip(texts[40:80], near, strict=True))


def prepare(folder: Path, out: Path, workers: int = 1, order: int = 1, **fields: Any) -> dict[str, Any]:
    """Run the stage over the shards of a folder; the documents of each split and the audit."""
    names = [f"jsonl:{p}" for p in sorted(folder.glob("*.jsonl"))][::order]
    recipe = {"source": names, "fill": "none", "parallel": {"processes": workers}} | fields
    artifact = run(PrepareRecipe.model_validate({"out": str(out), **recipe}))
    splits = {
        split: [
            json.loads(line) for line in (artifact.path / f"documents/{split}.jsonl").open(encoding="utf-8")
        ]
        for split in ("train", "validation", "test")
    }
    return {"digest": artifact.digest, "audit": artifact.json("logs/audit.json"), **splits}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus") / "shards"
    return folder, corpus(folder)


@pytest.fixture(scope="module")
def plain(shards: Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One worker, shards in order."""
    return prepare(shards[0], tmp_path_factory.mktemp("plain") / "data")


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "order"), [(2, 1), (4, -1)])
def test_workers_and_order_do_not_change_a_byte(
    shards: Corpus, plain: dict[str, Any], tmp_path: Path, workers: int, order: int
) -> None:
    assert prepare(shards[0], tmp_path / "data", workers, order)["digest"] == plain["digest"]


def test_planted_duplicates_go_and_nothing_else(shards: Corpus, plain: dict[str, Any]) -> None:
    reasons = {r["reason"]: r["records"] for r in plain["audit"]["steps"]["dedup"]["reasons"]}
    assert reasons["duplicate_documents"] == 40
    assert reasons["near_duplicate_documents"] == 40
    kept = {d["text"] for split in ("train", "validation", "test") for d in plain[split]}
    assert len(kept) == 400
    for pair in shards[1]:
        assert sum(t.strip() in kept for t in pair) == 1


def test_near_duplicates_never_stand_on_both_sides(plain: dict[str, Any]) -> None:
    train = [shingles(d["text"]) for d in plain["train"]]
    held_out = [shingles(d["text"]) for split in ("validation", "test") for d in plain[split]]
    assert len(held_out) >= 4
    assert max(jaccard(a, b) for a in train for b in held_out) < 0.5


def test_lines_that_many_share_go(shards: Corpus, plain: dict[str, Any], tmp_path: Path) -> None:
    assert not any(NOTICE in d["text"] for d in plain["train"])
    assert plain["audit"]["edits"]["repeated_lines"]["documents"] == 80
    kept = prepare(shards[0], tmp_path / "data", dedup={"line_documents": 0})
    assert sum(NOTICE in d["text"] for s in ("train", "validation", "test") for d in kept[s]) == 80


def test_what_is_read_is_written_or_dropped_with_its_reason(plain: dict[str, Any]) -> None:
    steps = plain["audit"]["steps"]
    dropped = sum(step["dropped"] for step in steps.values())
    written = sum(plain["audit"]["written"]["documents"].values())
    assert steps["read"]["read"] == dropped + written == 483
    assert {r["reason"] for r in steps["read"]["reasons"]} >= {"invalid_json", "lone_surrogate"}


def test_a_benchmark_inside_a_document_is_found(tmp_path: Path) -> None:
    rng = random.Random(1)
    question = "".join(rng.choices(HAN, k=40)) + "？"
    inside = text(rng) + question + text(rng)
    folder = tmp_path / "shards"
    folder.mkdir()
    lines = [json.dumps({"text": t}) for t in [inside, *(text(rng) for _ in range(20))]]
    (folder / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "bench.jsonl").write_text(json.dumps({"question": question}) + "\n", encoding="utf-8")
    shares = {"validation_share": 0.0, "test_share": 0.0}
    free = prepare(folder, tmp_path / "free", **shares)
    held = prepare(
        folder, tmp_path / "held", decontaminate={"benchmarks": [str(tmp_path / "bench.jsonl")]}, **shares
    )
    assert len(free["train"]) == len(held["train"]) + 1 == 21
    assert held["audit"]["steps"]["decontaminate"]["reasons"][0]["reason"] == "held_out_text"


def small(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "a.jsonl").write_text(lines, encoding="utf-8")
    return folder


def test_of_sixty_versions_of_a_text_the_best_stays_whole(tmp_path: Path) -> None:
    rng = random.Random(4)
    poem = [sentence(rng) for _ in range(12)]
    rows = [{"text": "\n".join([*poem, f"第{i}版"])} for i in range(60)] + [
        {"text": text(rng)} for _ in range(20)
    ]
    found = prepare(small(tmp_path / "shards", rows), tmp_path / "data", test_share=0.0, validation_share=0.0)
    kept = [d["text"] for d in found["train"]]
    assert len(kept) == 21
    assert sum(t.startswith("\n".join(poem)) for t in kept) == 1


def test_a_benchmark_is_found_in_every_kind_of_record(tmp_path: Path) -> None:
    rng = random.Random(6)
    long, short = "".join(rng.choices(HAN, k=40)), "首都是哪里"

    def talk(words: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": words}, {"role": "assistant", "content": text(rng)}]}

    rows: list[dict[str, Any]] = [{"text": text(rng)} for _ in range(10)]
    rows += [talk(text(rng)), talk(f"请问{long}呢"), talk(short)]
    rows += [
        {"prompt": w, "chosen": text(rng), "rejected": text(rng)} for w in (text(rng), long + "！", short)
    ]
    folder = small(tmp_path / "shards", rows)
    bench = tmp_path / "bench.jsonl"
    bench.write_text("".join(json.dumps({"question": q}) + "\n" for q in (long, short)), encoding="utf-8")
    tests = {"decontaminate": {"benchmarks": [str(bench)]}}
    found = prepare(folder, tmp_path / "data", validation_share=0.0, test_share=0.0, **tests)
    assert found["audit"]["written"]["conversations"] == {"train": 1}
    assert found["audit"]["written"]["preferences"] == {"train": 1}
    other = tmp_path / "other.jsonl"  # another run in the same place, in this process, asks for other tests
    other.write_text(json.dumps({"question": "".join(rng.choices(HAN, k=30))}) + "\n", encoding="utf-8")
    again = {"decontaminate": {"benchmarks": [str(other)]}}
    found = prepare(folder, tmp_path / "data", validation_share=0.0, test_share=0.0, **again)
    assert found["audit"]["written"]["conversations"] == {"train": 3}


def test_pieces_that_are_held_out_are_not_trained_on(tmp_path: Path) -> None:
    rng = random.Random(7)
    shared = [sentence(rng) for _ in range(5)]
    rows = [{"text": sentence(rng) + "\n" + shared[i % 5] + "\n" + sentence(rng)} for i in range(80)]
    found = prepare(small(tmp_path / "shards", rows), tmp_path / "data", cut_chars=30, validation_share=0.2)
    sides = [{d["text"] for d in found[s]} for s in ("train", "validation", "test")]
    assert not sides[0] & (sides[1] | sides[2])
    assert found["audit"]["leakage"]["documents"] == 0


def test_a_small_corpus_has_every_split_and_the_audit_says_so(tmp_path: Path) -> None:
    rng = random.Random(8)
    rows = [{"text": text(rng)} for _ in range(8)]
    found = prepare(small(tmp_path / "shards", rows), tmp_path / "data")
    counts = {s: len(found[s]) for s in ("train", "validation", "test")}
    assert counts == found["audit"]["written"]["documents"]
    assert counts == {"train": 6, "validation": 1, "test": 1}


@pytest.mark.slow
def test_hundreds_of_shards_need_few_open_files(tmp_path: Path) -> None:
    rng = random.Random(9)
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(300):
        (folder / f"{number}.jsonl").write_text(json.dumps({"text": text(rng, 3)}) + "\n", encoding="utf-8")
    words = command(folder, tmp_path / "out", f"jsonl:{folder}")
    limited = "import resource, sys, runpy; resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128)); "
    limited += "sys.argv = sys.argv[1:]; runpy.run_module('microlm', run_name='__main__', alter_sys=True)"
    done = subprocess.run(
        [sys.executable, "-c", limited, *words[2:]],
        env=runtime.child_env({"OMP_NUM_THREADS": "1"}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_half_a_held_out_text_contaminates_and_a_quarter_does_not() -> None:
    rng = random.Random(2)
    texts = ["".join(rng.choices(HAN, k=200)) for _ in range(50)]
    held_out, short = contaminate.gather([*texts, "短"], [], overlap=0.5)
    assert short == 1
    for number, item in enumerate(texts):
        assert held_out.found_in("甲" * 30 + item[:150] + "乙" * 30) == number
        assert held_out.found_in(item[:50] + "丙" * 40) is None
    assert held_out.found_in("".join(rng.choices(HAN, k=5000))) is None


def test_long_documents_are_cut_where_sentences_end() -> None:
    rng = random.Random(3)
    long = "".join(sentence(rng) for _ in range(60))
    pieces = cut(long, 100)
    assert "".join(pieces) == long
    assert all(len(p) <= 100 and p[-1] in "。！？" for p in pieces)
    assert cut("字" * 250, 100) == ["字" * 100, "字" * 100, "字" * 50]
    assert cut("短。", 100) == ["短。"]


def test_pieces_of_a_document_stay_on_its_side(shards: Corpus, tmp_path: Path) -> None:
    found = prepare(shards[0], tmp_path / "data", cut_chars=80, validation_share=0.1, test_share=0.1)
    sides: dict[str, set[str]] = {}
    for split in ("train", "validation", "test"):
        for document in found[split]:
            assert len(document["text"]) <= 80
            sides.setdefault(document["source"].partition("#")[0], set()).add(split)
    assert all(len(splits) == 1 for splits in sides.values())
    assert found["audit"]["cut"]["pieces"] > 1000


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_and_run_again_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    corpus(folder, count=3000, shards=2)
    started = time.monotonic()
    whole = finish(folder, tmp_path / "whole")
    seconds = time.monotonic() - started
    rng, kills, chain = random.Random(0), 0, 0
    while kills < 4:
        out = tmp_path / f"chain-{chain}"
        if kill_after(folder, out, rng.uniform(0.4, 0.95) * seconds):
            kills += 1
        else:
            assert finish(folder, out) == whole
            chain += 1
    assert finish(folder, tmp_path / f"chain-{chain}") == whole


def command(folder: Path, out: Path, *sources: str) -> list[str]:
    stage = {
        "stage": "data",
        "out": str(out),
        "source": list(sources) or [f"jsonl:{p}" for p in sorted(folder.glob("*.jsonl"))],
        "fill": "none",
        "parallel": {"processes": 2},
    }
    recipe = out.with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump(stage), encoding="utf-8")
    return [sys.executable, "-m", "microlm", "run", str(recipe)]


def finish(folder: Path, out: Path) -> str:
    """Run to the end; the artifact's digest."""
    env = runtime.child_env({"OMP_NUM_THREADS": "1"})
    subprocess.run(command(folder, out), env=env, check=True, capture_output=True)
    return open_artifact(str(out)).digest


def kill_after(folder: Path, out: Path, seconds: float) -> bool:
    """Start the stage and kill it with its workers; False when it had ended by itself."""
    process = subprocess.Popen(
        command(folder, out),
        env=runtime.child_env({"OMP_NUM_THREADS": "1"}),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        process.wait(timeout=seconds)
        return False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True
