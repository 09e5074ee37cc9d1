"""Without numba the compiled loops run as plain Python: the same corpus, byte for byte."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

from microlm.core import runtime

HAN = [chr(c) for c in range(0x4E00, 0x5200)]
NOTICE = "本页的一切文字均由读者自行判断其中的真伪"
STAGE = """
import json, sys
if sys.argv[1] == "plain":
    sys.modules["numba"] = None
from microlm.text.compiled import IS_COMPILED
from microlm.text.prepare import PrepareRecipe, run
artifact = run(PrepareRecipe.model_validate(json.loads(sys.argv[2])))
audit = artifact.json("logs/audit.json")
counts = {r["reason"]: r["records"] for step in audit["steps"].values() for r in step["reasons"]}
print(json.dumps([IS_COMPILED, artifact.digest, audit["scripts"], counts, sorted(audit["edits"])]))
"""


def corpus(folder: Path) -> tuple[str, str]:
    """A shard with duplicates, shared lines, other scripts and dirt; a file of benchmark texts."""
    rng = random.Random(3)
    texts = ["。".join("".join(rng.choices(HAN, k=rng.randint(6, 20))) for _ in range(8)) for _ in range(60)]
    near = [t[:40] + "改" + t[41:] for t in texts[10:16]]
    noticed = [f"{t}\n{NOTICE}\n{t[::-1]}" for t in texts[20:40]]
    others = [
        "The river rose in spring, and the old ferryman tied his boat more tightly to the landing. 😀 " * 2
    ]
    dirt = [
        "重复的话。" * 60,
        f"e\u0301 \ufb01 {texts[50][::-1]} 𠀀𪚥",
        "# " * 40,
        f"{texts[51][::-1]}\u3000　ＡＢＣ",
    ]
    test = texts[55]
    lines = [*texts[:20], *noticed, *texts[40:55], *texts[:5], *near, *others, *dirt, f"前言。{test}。后语。"]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in lines), encoding="utf-8")
    (folder / "b.jsonl").write_text(json.dumps({"question": test}) + "\n", encoding="utf-8")
    return f"jsonl:{folder / 'a.jsonl'}", str(folder / "b.jsonl")


def test_the_stage_gives_the_same_digest_without_numba(tmp_path: Path) -> None:
    source, benchmark = corpus(tmp_path)
    recipe = {
        "source": source,
        "fill": "none",
        "dedup": {"line_documents": 8},
        "decontaminate": {"benchmarks": [benchmark]},
        "validation_share": 0.1,
        "parallel": {"processes": 1},
    }
    found = {}
    for how in ("compiled", "plain"):
        words = json.dumps({**recipe, "out": str(tmp_path / how)})
        command = [sys.executable, "-c", STAGE, how, words]
        done = subprocess.run(command, capture_output=True, text=True, env=runtime.child_env({}), check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "overflow" not in done.stderr
        found[how] = json.loads(done.stdout)
    assert (found["compiled"][0], found["plain"][0]) == (True, False)
    assert found["compiled"][1:] == found["plain"][1:]
    counts, edits = found["plain"][3:]
    assert counts.keys() >= {"duplicate_documents", "near_duplicate_documents", "held_out_text", "repetition"}
    assert {"repeated_lines", "unicode_nfc", "fullwidth_ascii", "whitespace"} <= set(edits)
