"""What `make quickstart` leaves in runs/quickstart is what the README says: looked at from outside, for real.

Run by `make e2e` after the quickstart; every check here talks to the trained model, none to a stand-in.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from microlm.core.manifest import open_artifact
from microlm.core.records import Message, Sampling
from microlm.engine import Engine
from microlm.serve.launch import ServerProcess

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
RUN = ROOT / "runs" / "quickstart"
QUESTION = "李白的职业是什么？"


def microlm(*words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """The command line, as a person calls it."""
    command = [sys.executable, "-m", "microlm", *words]
    return subprocess.run(
        command, cwd=ROOT, input=stdin, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def summary() -> dict[str, dict[str, Any]]:
    """The report's rows by name."""
    return {row["name"]: row for row in open_artifact(str(RUN / "report")).json("summary.json")["rows"]}


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    """The exported model, served."""
    with ServerProcess(RUN / "export") as running:
        yield running


@pytest.mark.parametrize("name", ["question_exact", "extraction_f1", "constrained_valid", "eos", "verify"])
def test_every_goal_of_the_quickstart_is_reached(summary: dict[str, dict[str, Any]], name: str) -> None:
    row = summary[name]
    assert row["gate"] is not None and row["ok"], row


def test_the_model_beats_the_baselines_with_intervals_apart(summary: dict[str, dict[str, Any]]) -> None:
    for name in ("question_exact", "extraction_f1"):
        row = summary[name]
        assert row["low"] > max(row["regex"], row["nearest_template"]), row


def test_running_again_skips_every_stage() -> None:
    done = microlm("run", "recipes/quickstart.yaml", "--json")
    stages = json.loads(done.stdout)["stages"]
    assert len(stages) == 12 and all(s["skipped"] for s in stages)


def test_every_byte_is_as_signed() -> None:
    assert microlm("lineage", "runs/quickstart").returncode == 0


PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
assert "microlm" not in sys.modules
chat = [{"role": "user", "content": sys.argv[2]}]
ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
out = model.generate(**ids, max_new_tokens=40, do_sample=False)
sys.stdout.write(tokenizer.decode(out[0, ids["input_ids"].shape[1]:], skip_special_tokens=True))
"""


def test_plain_transformers_answers_like_our_engine(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PLAIN, str(RUN / "export"), QUESTION]
    theirs = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=True
    ).stdout
    ours = Engine(RUN / "export").generate([(Message("user", QUESTION),)], Sampling(max_tokens=40))[0]
    assert theirs == ours.text


def test_the_openai_client_talks_to_the_served_model(server: ServerProcess) -> None:
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
    model = client.models.list().data[0].id
    messages: Any = [{"role": "user", "content": QUESTION}]
    whole = client.chat.completions.create(model=model, messages=messages, temperature=0)
    chunks = client.chat.completions.create(model=model, messages=messages, temperature=0, stream=True)
    streamed = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert whole.choices[0].message.content == streamed
    assert whole.choices[0].finish_reason == "stop"


def test_verify_passes_and_says_so(server: ServerProcess) -> None:
    done = microlm("verify", server.url, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["failed"] == 0


def test_the_readme_examples_answer() -> None:
    base = microlm("generate", "runs/quickstart", "李白是", "--base", "--max-new-tokens", "20", "--seed", "1")
    assert base.returncode == 0 and base.stdout.strip()
    talk = microlm("chat", "runs/quickstart", stdin=f"你好\n{QUESTION}\n/exit\n")
    assert talk.returncode == 0 and "诗人" in talk.stdout


def test_the_report_opens_offline_in_a_browser(tmp_path: Path) -> None:
    chromium = shutil.which("chromium")
    assert chromium, "install chromium: apt-get install chromium"
    switches = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    )
    picture = tmp_path / "report.png"
    command = [
        chromium,
        *switches.split(),
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--screenshot={picture}",
        "--window-size=1200,3000",
        "--dump-dom",
        (RUN / "report.html").as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "extraction_f1" in done.stdout or "Extraction" in done.stdout
    assert "<svg" in done.stdout and 'src="http' not in done.stdout
    assert picture.stat().st_size > 20_000
