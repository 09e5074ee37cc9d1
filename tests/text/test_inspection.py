"""The audit from the files: what is planted is counted, whatever the blocks; nothing is believed."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from microlm.core.errors import UserError
from microlm.text.inspection import audit_dir, gates, parts
from microlm.text.inspection.licences import NONCOMMERCIAL, SHARE_ALIKE, UNCLEAR, concerning, concerns
from microlm.text.inspection.page import page, rows
from microlm.text.near.signature import jaccard, shingles
from microlm.text.prepare import PrepareRecipe, run
from microlm.text.sources import jsonl

HAN = [chr(c) for c in range(0x4E00, 0x5E00)]


def text(rng: random.Random, size: int = 200) -> str:
    return "".join(rng.choices(HAN, k=size))


def altered(rng: random.Random, original: str, changes: int) -> str:
    chars = list(original)
    for at in rng.sample(range(len(chars)), changes):
        chars[at] = "变"
    return "".join(chars)


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def audit(*words: object, processes: int = 1, **options: Any) -> dict[str, Any]:
    found = parts.find([str(word) for word in words])
    fields = {"context": 256, "tokenizer": None, "near": True} | options
    return audit_dir.audit(found, processes=processes, **fields)


def documents(folder: Path) -> Path:
    """300 training texts, 40 validation, 20 test; 6 exact leaks, 5 near leaks, 3 repeats in training."""
    rng = random.Random(0)
    train = [text(rng) for _ in range(300)]
    validation, test = ([text(rng) for _ in range(n)] for n in (29, 20))
    validation += ["，".join(train[i][k : k + 20] for k in range(0, 200, 20)) for i in range(5)]  # 29 … 33
    validation += [altered(rng, train[i], 3) for i in range(100, 105)]  # 34 … 38
    test[7] = validation[3]
    train += [train[200], train[200], train[201] + "。"]
    for name, texts in (("train", train), ("validation", validation), ("test", test)):
        write(folder / f"documents/{name}.jsonl", [{"text": t, "licence": "MIT"} for t in texts])
    return folder


def test_what_is_planted_is_counted_and_named(tmp_path: Path) -> None:
    found = audit(documents(tmp_path))
    assert found["numbers"] == {
        "records": 303 + 39 + 20, "unreadable": 0, "duplicates": 3, "leakage": 6, "near_leakage": 5,
        "eos_cut": None, "mask_errors": None, "drift": 0, "unknown_licence": 0, "noncommercial_licence": 0,
        "sharealike_licence": 0,
    }  # fmt: skip
    name = "documents/{}.jsonl:{}".format
    assert set(found["examples"]["leakage"]) == {
        *(f"{name('validation', 30 + i)} = {name('train', 1 + i)}" for i in range(5)),
        f"{name('test', 8)} = {name('validation', 4)}",
    }
    near = [line.split(" ~ ") for line in found["examples"]["near_leakage"]]
    assert [(a, b.split(" ")[1]) for a, b in near] == [
        (name("validation", 35 + i), name("train", 101 + i)) for i in range(5)
    ]
    assert found["by_kind"] == {
        "duplicates": {"documents": 3}, "leakage": {"documents": 6}, "near_leakage": {"documents": 5}
    }  # fmt: skip


def test_blocks_and_processes_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = documents(tmp_path)
    whole = audit(folder)
    monkeypatch.setattr(jsonl, "BLOCK_BYTES", 20_000)
    one, two = (audit(folder, processes=n) for n in (1, 2))
    assert one == two
    assert len(list(parts.find([str(folder)]).parts)) == 3
    assert {k: v for k, v in one.items() if k != "examples"} == {
        k: v for k, v in whole.items() if k != "examples"
    }
    assert {k: sorted(v) for k, v in one["examples"].items()} == {
        k: sorted(v) for k, v in whole["examples"].items()
    }


def test_near_leaks_are_those_of_all_pairs(tmp_path: Path) -> None:
    rng = random.Random(1)
    train = [text(rng, 150) for _ in range(80)]
    validation = [altered(rng, rng.choice(train), rng.randrange(0, 12)) for _ in range(150)]
    sets = {t: shingles(t) for t in (*train, *validation)}
    best = {v: max(jaccard(sets[v], sets[t]) for t in train) for v in validation}
    clear = [v for v in best if best[v] < 0.78 or best[v] >= 0.82]  # MinHash may lose a pair at the border
    found = audit(
        f"train={write(tmp_path / 'a.jsonl', [{'text': t} for t in train])}",
        f"validation={write(tmp_path / 'b.jsonl', [{'text': v} for v in clear])}",
    )["numbers"]
    assert found["leakage"] == sum(best[v] == 1 for v in clear) > 0
    assert found["near_leakage"] == sum(0.8 <= best[v] < 1 for v in clear) > 20


def test_a_held_out_record_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though training holds four like ones of it, in different blocks."""
    monkeypatch.setattr(jsonl, "BLOCK_BYTES", 3_000)
    rng = random.Random(4)
    held_out = [text(rng) for _ in range(5)]
    train = []
    for _ in range(4):
        train += [altered(rng, t, 1) for t in held_out] + [text(rng) for _ in range(150)]  # a piece of 64 KB
    found = audit(
        f"train={write(tmp_path / 'a.jsonl', [{'text': t} for t in train])}",
        f"validation={write(tmp_path / 'b.jsonl', [{'text': t} for t in held_out])}",
    )
    assert found["by_kind"]["near_leakage"] == {"documents": 5} == {
        "documents": found["numbers"]["near_leakage"]
    }  # fmt: skip


def test_records_of_other_kinds_are_no_leak(tmp_path: Path) -> None:
    said = text(random.Random(2))
    chat = {"messages": [{"role": "user", "content": said}, {"role": "assistant", "content": "好"}]}
    found = audit(
        f"train={write(tmp_path / 'a.jsonl', [chat, {'text': 'x' + said}])}",
        f"test={write(tmp_path / 'b.jsonl', [{'text': said + 'y', 'relation': []}])}",
    )
    assert (found["numbers"]["records"], found["numbers"]["near_leakage"]) == (3, 0)


def test_the_engine_is_not_believed(tmp_path: Path) -> None:
    """A line that is copied into the held-out file after the engine signed it is found."""
    rng = random.Random(3)
    source = write(tmp_path / "raw.jsonl", [{"text": text(rng), "licence": "MIT"} for _ in range(300)])
    made = run(PrepareRecipe(out=str(tmp_path / "data"), source=f"jsonl:{source}", fill="none"))
    clean = audit(made.path)
    assert clean["numbers"]["leakage"] == clean["numbers"]["near_leakage"] == 0
    assert clean["prepared"] == made.json("logs/audit.json")
    train, held_out = (made.path / "documents" / f"{s}.jsonl" for s in ("train", "validation"))
    line = train.read_text(encoding="utf-8").splitlines()[10]
    with held_out.open("a", encoding="utf-8") as f:
        f.write(line + "\n")
    after = audit(made.path)
    assert after["prepared"]["leakage"]["documents"] == 0 and after["numbers"]["leakage"] == 1
    assert "documents/train.jsonl:11 " in after["examples"]["leakage"][0]


def test_a_renamed_key_and_a_renamed_topic_are_named(tmp_path: Path) -> None:
    def record(n: int, cate: str, key: str = "licence") -> dict[str, Any]:
        return {"text": f"第{n}句话说的是一件事", "relation": [], "cate": cate, key: "MIT"}

    train = [record(n, ("人物", "作品")[n % 2]) for n in range(40)] + [record(40, "罕见")]
    test = [record(n, ("人物类", "作品")[n % 2], "license") for n in range(50, 80)]
    found = audit(
        f"train={write(tmp_path / 'a.jsonl', train)}", f"test={write(tmp_path / 'b.jsonl', test)}", near=False
    )
    told = {(d["what"], d["name"], d["absent"], d["similar"]) for d in found["drift"]}
    assert told == {("key", "licence", "test", "license"), ("topic", "人物", "test", "人物类")}
    assert found["numbers"]["drift"] == 2 and found["numbers"]["near_leakage"] is None


def test_what_cannot_be_read_is_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "一句话"}, {"content": "改了名"}])
    with path.open("ab") as f:
        f.write(b"{broken\n\xff\n")
    found = audit(path)
    assert (found["numbers"]["records"], found["numbers"]["unreadable"]) == (1, 3)
    assert found["parts"][0]["unreadable"] == {
        "invalid_json": 1, "invalid_utf8": 1, "missing_field:text (found content)": 1
    }  # fmt: skip
    assert found["examples"]["unreadable"][0].startswith("a.jsonl:2: ")
    with pytest.raises(UserError, match="no line of it can be read"):
        audit(write(tmp_path / "b.jsonl", [{"content": "x"}]))


def test_licences_are_counted_by_what_they_ask(tmp_path: Path) -> None:
    names = ["MIT", "CC-BY-NC-SA-4.0", "CC-BY-SA-3.0", "", "UNCLEAR: no licence file"]
    path = write(tmp_path / "a.jsonl", [{"text": f"第{n}句", "licence": w} for n, w in enumerate(names)])
    found = audit(path)
    assert [found["numbers"][f"{n}_licence"] for n in ("unknown", "noncommercial", "sharealike")] == [2, 1, 2]
    assert found["parts"][0]["licences"]["unknown"] == 1


@pytest.mark.parametrize(
    ("licence", "asks"),
    [
        ("MIT", ()), ("Apache-2.0", ()), ("CC-BY-4.0", ()), ("Unlicense", ()), ("BSD-3-Clause", ()),
        ("public domain", ()), ("own: ours", ()), ("NCSA", ()), ("CC0-1.0", ()),
        ("cc-by-nc-4.0", (NONCOMMERCIAL,)), ("CC BY-NC-SA 4.0", (NONCOMMERCIAL, SHARE_ALIKE)),
        ("non-commercial use", (NONCOMMERCIAL,)), ("research only", (NONCOMMERCIAL,)),
        ("CC-BY-SA", (SHARE_ALIKE,)), ("GPL-3.0", (SHARE_ALIKE,)), ("AGPL-3.0-only", (SHARE_ALIKE,)),
        ("unknown", (UNCLEAR,)), ("", (UNCLEAR,)),
        ("other", (UNCLEAR,)), ("MIT (repo), upstream unclear", (UNCLEAR,)), ("no licence file", (UNCLEAR,)),
    ],
)  # fmt: skip
def test_what_a_licence_asks(licence: str, asks: tuple[str, ...]) -> None:
    assert concerns(licence) == asks


def test_a_concern_names_licence_and_count() -> None:
    found = concerning(["MIT", "CC-BY-NC-4.0", "unknown"], {"CC-BY-NC-4.0": 1200})
    assert [str(c) for c in found] == [
        "1,200 records under CC-BY-NC-4.0 (non-commercial)",
        "an unknown number of records under unknown (unclear)",
    ]


def test_gates() -> None:
    [one, two] = gates.parse(["leakage>0, eos_cut>=0.01"], list(audit_dir.NUMBERS))
    assert (one.fails(0), one.fails(1), two.fails(0.01), two.fails(0.001)) == (False, True, True, False)
    with pytest.raises(UserError, match=r"lekage>0: no number is called so; did you mean 'leakage'\?"):
        gates.parse(["lekage>0"], list(audit_dir.NUMBERS))
    for word in ("leakage", "leakage=0", "leakage>x", ">0"):
        with pytest.raises(UserError, match="expected NAME>NUMBER"):
            gates.parse([word], list(audit_dir.NUMBERS))
    with pytest.raises(UserError, match="not measured without --tokenizer"):
        gates.require_measured([two], audit_dir.measured(None, True))


def test_what_is_named_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'trian' is no split; did you mean 'train'"):
        parts.find([f"trian={write(tmp_path / 'a.jsonl', [{'text': '一'}])}"])
    with pytest.raises(UserError, match="no such file"):
        parts.find(["train=nowhere.jsonl"])
    with pytest.raises(UserError, match="holds no documents/train"):
        parts.find([str(tmp_path)])
    path = write(tmp_path / "data/chats/test.jsonl", [{"messages": []}])
    write(path.parents[1] / "questions/test.jsonl", [{"id": "1", "question": "谁？", "answer": "我"}])
    found = audit(path.parents[1])
    assert found["left_out"] == ["chats/test.jsonl"] and found["parts"][0]["part"] == "questions/test"
    assert found["licences"] == []


def test_page_and_rows_say_every_number_and_run_nothing(tmp_path: Path) -> None:
    bad = {"text": "一句话" * 9, "source": "<script>alert(1)</script>", "licence": "<img src=x>"}
    found = audit(write(tmp_path / "a.jsonl", [bad, bad]))
    html = page(found, "here")
    assert "<script>" not in html and "<img" not in html and "&lt;img src=x&gt;" in html
    assert "https://" not in html and "http://" not in html.replace("http://www.w3.org", "")
    told = dict(rows(found))
    assert told["duplicates"] == "1 (documents 1)" and told["eos_cut"] == "not measured"
    assert set(audit_dir.NUMBERS) <= told.keys() and found["numbers"].keys() == audit_dir.NUMBERS.keys()


def test_more_shards_than_open_files(tmp_path: Path) -> None:
    """300 files of one record each, of which two say the same, where 128 may be open."""
    for n in range(300):
        said = f"第 {n % 299} 篇：{text(random.Random(n % 299), 40)}"
        write(tmp_path / f"shards/{n:03}.jsonl", [{"text": said}])
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (128, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
from pathlib import Path
from microlm.text.inspection import audit_dir, parts
found = parts.find(["train={tmp_path / "shards"}"])
print(audit_dir.audit(found, 256, None, True, 1)["numbers"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    assert "'records': 300, 'unreadable': 0, 'duplicates': 1," in done.stdout
