"""Options reach the engine; a file of prompts loses nothing, has settings by line, names mistakes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from random_model import write_model

from microlm.cli import main
from microlm.cli.answers.engine_options import EngineOptions, size
from microlm.cli.answers.prompts import read_prompts
from microlm.core.errors import UserError
from microlm.core.records import Constraint, Message, Sampling
from microlm.engine import Engine
from microlm.model import lora
from microlm.model.directory import load


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.set_num_threads(1)
    return str(write_model(tmp_path_factory.mktemp("model"), "qwen3"))


@pytest.fixture(scope="module")
def adapter(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter that changes answers."""
    folder, decoder = tmp_path_factory.mktemp("adapters") / "poet", load(Path(model))
    lora.apply(decoder, lora.LoraConfig(4, 64.0), torch.Generator().manual_seed(1))
    for module in decoder.modules():
        if isinstance(module, lora.LoraLinear):
            torch.nn.init.normal_(module.lora_B, generator=torch.Generator().manual_seed(2))
    lora.save_adapter(decoder, folder, "base", "")
    return folder


def call(*words: object) -> int:
    with pytest.raises(SystemExit) as e:
        main([str(w) for w in words])
    return int(e.value.code or 0)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        ("--temperature 1 --min-p 0.2 --seed 4", {"temperature": 1.0, "min_p": 0.2, "seed": 4}),
        ("--repetition-penalty 1.5", {"repetition_penalty": 1.5}),
        ("--presence-penalty 1 --frequency-penalty 0.5", {"presence_penalty": 1.0, "frequency_penalty": 0.5}),
        ("--logit-bias 40=60 --logit-bias 41=59.5", {"logit_bias": ((40, 60.0), (41, 59.5))}),
        ("--ignore-eos --stop zz --stop \\n", {"ignore_eos": True, "stop": ("zz", "\n")}),
        ("--regex [a-c]{4,6}", {"constraint": Constraint("regex", "[a-c]{4,6}")}),
        ("--choice 李白 --choice 杜甫", {"constraint": Constraint("choice", '["李白", "杜甫"]')}),
        ("--json-object --max-new-tokens 90", {"constraint": Constraint("json_object"), "max_tokens": 90}),
    ],
)
def test_options_reach_the_engine(
    model: str, words: str, fields: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    expected = Engine(model).generate(["李白"], replace(Sampling(max_tokens=20), **fields))[0]
    code = call("generate", model, "李白", "--max-new-tokens", 20, "--json", *words.split())
    told = json.loads(capsys.readouterr().out)
    assert (told["text"], told["finish_reason"]) == (expected.text, expected.finish_reason)
    assert code == (1 if expected.error else 0)


def test_files_of_grammars_reach_the_engine(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "g.lark").write_text('start: "x" /[0-9]{3}/', encoding="utf-8")
    (tmp_path / "text").write_text("李白是诗人", encoding="utf-8")
    (tmp_path / "s.json").write_text('{"type":"array","items":{"type":"string"},"minItems":1,"maxItems":1}')
    assert call("generate", model, "a", "--grammar", tmp_path / "g.lark") == 0
    assert re.fullmatch(r"x[0-9]{3}\n", capsys.readouterr().out)
    words = ["--copy-from", tmp_path / "text", "--temperature", 1, "--seed", 1]
    assert call("generate", model, "a", "--json-schema", tmp_path / "s.json", *words) == 0
    assert json.loads(capsys.readouterr().out)[0] in "李白是诗人"
    assert call("generate", model, "a", *words) == 0
    assert capsys.readouterr().out.removesuffix("\n") in "李白是诗人"


def test_several_answers_and_their_log_probabilities(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    sampling = Sampling(max_tokens=6, temperature=1.0, seed=7, n=3, logprobs=2)
    expected = Engine(model).generate(["李白"], sampling)
    words = [
        "generate",
        model,
        "李白",
        "--max-new-tokens",
        6,
        "--temperature",
        1,
        "--seed",
        7,
        "-n",
        3,
        "--logprobs",
        2,
    ]
    assert call(*words, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    answers = [told, *told["more"]]
    assert [a["text"] for a in answers] == [c.text for c in expected] and len(
        {a["text"] for a in answers}
    ) > 1
    assert [a["index"] for a in answers] == [0, 1, 2]
    for answer, completion in zip(answers, expected, strict=True):
        assert completion.logprobs is not None
        assert [k["id"] for k in answer["logprobs"]] == list(completion.token_ids)
        assert [k["logprob"] for k in answer["logprobs"]] == pytest.approx(
            [k.logprob for k in completion.logprobs]
        )
        assert [k["top"] for k in answer["logprobs"]] == [
            [list(p) for p in k.top] for k in completion.logprobs
        ]
    assert call(*words) == 0
    printed = capsys.readouterr().out
    assert [f"[{i}] " in printed for i in (1, 2, 3)] == [True] * 3 and printed.count("\n") >= 3 + 18


def test_an_answer_cut_off_inside_json_fails(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--json-object", "--max-new-tokens", 1]
    assert call("generate", model, "a", *words) == 1
    out, err = capsys.readouterr()
    assert out.startswith("{") and "ended inside the JSON: max_tokens reached" in err
    assert call("generate", model, "a", *words, "--json") == 1
    assert "inside the JSON" in json.loads(capsys.readouterr().out)["error"]
    path = write(tmp_path / "p.jsonl", {"prompt": "a"}, {"prompt": "b", "constraint": None})
    assert call("generate", model, "--prompts", path, *words, "--json") == 1
    out, err = capsys.readouterr()
    assert "1 answers failed; their rows in" in err
    summary = json.loads(out)
    assert (summary["cut"], summary["errors"]) == (1, 0)


def test_lines_have_settings_of_their_own(
    model: str, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = [{"role": "system", "content": "brief"}, {"role": "user", "content": "李白?"}]
    path = write(
        tmp_path / "p.jsonl",
        {"prompt": "李白", "id": 1},
        {"prompt": "李白", "max_tokens": 3, "meta": {"k": [1]}},
        {"prompt": "李白", "temperature": 1, "seed": 9, "top_k": 20, "n": 2},
        {"prompt": "李白", "temperature": 1},
        {"prompt": "李白", "stop": "诗", "ignore_eos": True, "max_tokens": 60},
        {"prompt": "李白", "constraint": {"choice": ["甲", "乙"]}, "logprobs": 0},
        {"prompt": "李白", "constraint": {"json_schema": {"const": {"a": 1}}}},
        {"prompt": "李白", "adapter": "poet"},
        {"messages": chat, "logit_bias": {"40": 70}, "repetition_penalty": 1.2},
    )  # fmt: skip
    words = ["--max-new-tokens", 8, "--seed", 50, "--adapter", f"poet={adapter}", "--json"]
    assert call("generate", model, "--prompts", path, *words) == 0
    summary = json.loads(capsys.readouterr().out)
    rows = rows_of(tmp_path / "p.answers.jsonl")
    assert summary["prompts"] == 9 and len(rows) == 10
    engine, base = Engine(model), Sampling(max_tokens=8)
    engine.load_adapter("poet", adapter)

    def text(sampling: Sampling, prompt: Any = "李白", adapter: str | None = None) -> str:
        return engine.generate([prompt], sampling, adapter=adapter)[0].text

    assert rows[0]["text"] == text(base) and rows[0]["id"] == 1
    assert rows[1]["text"] == text(replace(base, max_tokens=3)) and rows[1]["meta"] == {"k": [1]}
    drawn = replace(base, temperature=1.0, top_k=20)
    assert [r["text"] for r in rows[2:4]] == [text(replace(drawn, seed=9)), text(replace(drawn, seed=10))]
    assert [r["index"] for r in rows[2:4]] == [0, 1]
    assert rows[4]["text"] == text(replace(base, temperature=1.0, seed=53))
    assert rows[5]["text"] == text(Sampling(max_tokens=60, stop=("诗",), ignore_eos=True))
    assert rows[6]["text"] in "甲乙" and len(rows[6]["logprobs"]) == rows[6]["completion_tokens"]
    assert rows[7]["text"] == '{"a":1}'
    assert rows[8]["text"] == text(base, adapter="poet") != rows[0]["text"]
    messages = [Message("system", "brief"), Message("user", "李白?")]
    biased = replace(base, logit_bias=((40, 70.0),), repetition_penalty=1.2)
    assert rows[9]["text"] == text(biased, messages) and rows[9]["messages"] == chat


def test_an_adapter_for_all_answers(model: str, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = Engine(model)
    engine.load_adapter("poet", adapter)
    expected = engine.generate(["李白"], Sampling(max_tokens=8), adapter="poet")[0].text
    assert call("generate", model, "李白", "--max-new-tokens", 8, "--adapter", adapter, "--json") == 0
    assert json.loads(capsys.readouterr().out)["text"] == expected
    assert call("generate", model, "李白", "--adapter", f"x={adapter}") == 2
    assert "NAME=" in capsys.readouterr().err
    assert call("generate", model, "李白", "--adapter", adapter, "--adapter", adapter) == 2
    assert "two adapters" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"prompt":"a","max_token":3}', "unknown key 'max_token'; did you mean 'max_tokens'?"),
        ('{"prompt":"a","max_tokens":"many"}', "max_tokens: "),
        ('{"prompt":"a","top_p":3}', "top_p: 3.0 is not in (0, 1]"),
        ('{"prompt":"a","constraint":{"regex":"a","choice":["b"]}}', "constraint: regex, choice are given"),
        ('{"prompt":"a","constraint":{"choice":[]}}', "constraint.choice: "),
        ('{"prompt":"a","adapter":"none"}', "adapter 'none' is not there"),
        ('{"prompt":"a","messages":[{"role":"user","content":"x"}]}', "both 'prompt' and 'messages'"),
        ('{"messages":[{"role":"bot","content":"x"}]}', "role 'bot' is not one of"),
        ('{"messages":[]}', "'messages' must be a list of at least one"),
        ('{"prompt":"a","logit_bias":{"99999":1}}', "logit_bias: no token has the id 99999"),
        ('{"prompt":"\xff"}', "not UTF-8"),
        ('{"prompt":"a","constraint":{"regex":"(("}}', "regex: cannot be used"),
        ('{"prompt":"a","meta":NaN}', "not valid JSON"),
        ('{"prompt":"a","max_tokens":true}', "max_tokens: "),
        ('{"prompt":"a","temperature":true}', "temperature: "),
    ],
)
def test_a_mistake_in_a_line_is_told_before_anything_is_asked(
    model: str, tmp_path: Path, line: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt":"a"}\n\n' + line.encode("latin-1") + b"\n")
    assert call("generate", model, "--prompts", path) == 2
    err = capsys.readouterr().err
    assert f"p.jsonl:3: {told}" in err.replace("byte 11 is ", "") and err.count("\n") == 1
    assert not (tmp_path / "p.answers.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--regex a --choice b", "only one of them can bound an answer"),
        ("--copy-words", "copy_from is not there"),
        ("--logit-bias 5", "expected ID=VALUE"),
        ("--logit-bias 99999=1", "no token has the id 99999"),
        ("--min-p 2", "min_p: 2.0"),
        ("-n 0", "n: 0"),
        ("--kv-memory much", "--kv-memory: 'much' is no size"),
        ("--quant-policy 5", "--quant-policy: 5 is not 8"),
        ("--quant-policy 8 --kv-dtype int4", "means int8"),
        ("--adapter nowhere", "nowhere"),
        ("--max-seqs 0", "max_seqs"),
    ],
)
def test_a_mistake_in_an_option_is_a_sentence(
    model: str, words: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("generate", model, "a", *words.split()) == 2
    err = capsys.readouterr().err
    assert told in err and err.startswith("error: ") and err.count("\n") == 1


def test_engine_options_are_passed_on_only_where_given() -> None:
    assert EngineOptions().arguments() == {}
    assert EngineOptions().arguments(max_seqs=3) == {"max_seqs": 3}
    given = EngineOptions(
        max_seqs=5, dtype="bfloat16", quantize="int4", quant_policy=8, kv_memory="1.5MiB", speculate=4,
        batch_invariant=True, threads=2, no_prefix_caching=True,
    )  # fmt: skip
    assert given.arguments(max_seqs=3) == {
        "max_seqs": 5, "dtype": "bfloat16", "quantize": "int4", "kv_dtype": "int8", "kv_memory": 1572864,
        "speculate": 4, "batch_invariant": True, "threads": 2, "prefix_caching": False,
    }  # fmt: skip
    assert [size(s) for s in ("7", "2GB", "512MiB", "1_000k", ".5G")] == [
        7,
        2 * 10**9,
        2**29,
        10**6,
        5 * 10**8,
    ]
    with pytest.raises(UserError, match="--speculate: is for an engine here"):
        EngineOptions(speculate=4).refuse_at_url()
    EngineOptions().refuse_at_url()


def test_engine_options_reach_the_engine(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", model, "李白", "--max-new-tokens", 12, "--json"]
    texts = []
    for more in (
        [], ["--kv-memory", "4MiB"], ["--speculate", 3], ["--threads", 1], ["--no-prefix-caching"],
        ["--batch-invariant"], ["--dtype", "bfloat16"], ["--quantize", "int8"], ["--kv-dtype", "int8"],
        ["--quant-policy", 8],
    ):  # fmt: skip
        assert call(*words, *more) == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert texts[1:6] == texts[:1] * 5 and texts[-1] == texts[-2]
    for option, value in (("--quantize", "int5"), ("--kv-dtype", "fp8"), ("--dtype", "float16")):
        assert call(*words, option, value) == 2
        assert "int" in capsys.readouterr().err or value == "float16"


def test_remote_chats_refuse_what_belongs_to_the_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("chat", "http://127.0.0.1:9", "--quantize", "int8") == 2
    assert "--quantize: is for an engine here" in capsys.readouterr().err
    assert call("chat", "http://127.0.0.1:9", "--adapter", "x") == 2
    assert "--adapter" in capsys.readouterr().err


def test_a_file_that_another_process_answers_is_left_alone(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from microlm.core import storage

    path = write(tmp_path / "p.jsonl", {"prompt": "a"})
    with storage.locked(tmp_path / "p.answers.jsonl.lock", "busy"):
        assert call("generate", model, "--prompts", path) == 2
    assert "another process writes it" in capsys.readouterr().err
    assert call("generate", model, "--prompts", path, "--max-new-tokens", 2) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.answers.jsonl", "p.jsonl"]


def test_changed_prompts_are_not_taken_up(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [{"prompt": f"李白 {i}", "max_tokens": 1 + i} for i in range(9)]
    path, out = write(tmp_path / "p.jsonl", *lines), tmp_path / "p.answers.jsonl"
    words = ["generate", model, "--prompts", path, "--max-seqs", 2, "--json"]
    with monkeypatch.context() as patch:
        real, steps = Engine.step, iter(range(9))
        patch.setattr(Engine, "step", lambda e: real(e) if next(steps, None) is not None else interrupt())
        assert call(*words) == 130
    begun = (tmp_path / "p.answers.jsonl.unfinished").read_bytes()
    assert 1 < begun.count(b"\n") < 10
    capsys.readouterr()
    for changed in ([{"prompt": "other"}, *lines[1:]], lines[:1]):
        write(path, *changed)
        assert call(*words) == 2
        assert "other prompts or settings" in capsys.readouterr().err
    write(path, *lines, {"prompt": "one more"})  # what is added at the end is answered too
    assert call(*words) == 0
    assert json.loads(capsys.readouterr().out)["resumed_at"] == begun.count(b"\n") - 1
    assert [r["prompt"] for r in rows_of(out)] == [line["prompt"] for line in lines] + ["one more"]


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
def test_a_process_that_is_stopped_twice_loses_no_finished_answer(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"prompt": f"李白 {i}", "max_tokens": 20 + 7 * (i % 9), "ignore_eos": True} for i in range(60)]
    path, out, part = write(tmp_path / "p.jsonl", *lines), tmp_path / "o", tmp_path / "o.unfinished"
    words = [
        "generate",
        model,
        "--prompts",
        str(path),
        "--max-seqs",
        "2",
        "--temperature",
        "1",
        "--seed",
        "1",
    ]
    for kind, code, wanted in ((signal.SIGINT, 130, 8), (signal.SIGKILL, -9, 25)):
        command = [sys.executable, "-m", "microlm", *words, "--out", str(out)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        while not part.exists() or part.read_bytes().count(b"\n") < wanted:
            assert process.poll() is None
            time.sleep(0.01)
        os.kill(process.pid, kind)
        _, err = process.communicate(timeout=60)
        assert process.returncode == code and not out.exists()
        assert kind == signal.SIGKILL or err.splitlines()[-1] == "interrupted"
    kept = part.read_bytes().count(b"\n") - 1
    assert 24 <= kept < 60
    capsys.readouterr()
    assert call(*words, "--out", out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["resumed_at"] == kept
    assert call(*words, "--out", tmp_path / "whole") == 0
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()


def test_the_lines_in_the_documentation_are_read(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/engine.md").read_text(encoding="utf-8")
    (tmp_path / "p.jsonl").write_text(page.split("```json\n")[1].split("```")[0], encoding="utf-8")
    lines = [line for _, _, line in read_prompts(tmp_path / "p.jsonl")]
    drawn = [line.sampling(Sampling(seed=1), i) for i, line in enumerate(lines)]
    assert [line.id for line in lines] == [1, 2, 3, 4, 5]
    assert [s.seed for s in drawn] == [1, 7, 3, 4, 5] and drawn[1].stop == ("\n\n",)
    kinds = [s.constraint.kind if s.constraint else None for s in drawn]
    assert kinds == [None, None, None, "choice", "json_schema"]
