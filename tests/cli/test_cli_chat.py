"""`generate` and `chat`: what is printed equals what the engine answers; interrupted = undisturbed."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from random_model import WINDOW, write_model

from microlm.cli import main
from microlm.cli.answers.chat import Session
from microlm.cli.answers.talk import LocalTalker, RemoteTalker
from microlm.core.errors import UserError
from microlm.core.records import Message, Sampling
from microlm.engine import Engine
from microlm.engine.resolve import resolve_model_dir


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.set_num_threads(1)
    return str(write_model(tmp_path_factory.mktemp("model"), "qwen3"))


@pytest.fixture
def run(model: str, tmp_path: Path) -> Path:
    """A run with two finished stages and an unfinished one."""
    for stage in ("pretrain", "sft", "merge"):
        write_model(tmp_path / "run" / stage, "qwen3", seed=len(stage))
        if stage != "merge":
            (tmp_path / "run" / stage / "manifest.json").write_text("{}")
    return tmp_path / "run"


def call(*words: str) -> int:
    with pytest.raises(SystemExit) as e:
        main(list(words))
    return int(e.value.code or 0)


def greedy(model: str | Path, prompt: object, new: int) -> str:
    return Engine(model, max_seqs=1).generate([prompt], Sampling(max_tokens=new))[0].text  # type: ignore[list-item]


def test_generate_prints_the_engines_text(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    from microlm.cli.answers.texts import printable

    assert call("generate", model, "李白", "--max-new-tokens", "20") == 0
    assert capsys.readouterr().out == printable(greedy(model, "李白", 20)) + "\n"
    assert call("generate", model, "李白", "--chat", "--max-new-tokens", "20", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["text"] == greedy(model, [Message("user", "李白")], 20)
    assert (told["schema"], told["prompt"]) == (1, "李白")


def test_generate_fits_a_schema(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "s.json").write_text('{"enum":["是","no"]}', encoding="utf-8")
    assert call("generate", model, "a", "--json-schema", str(tmp_path / "s.json"), "--temperature", "1") == 0
    assert json.loads(capsys.readouterr().out) in ("是", "no")


def test_seed_repeats(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "generate",
        model,
        "a",
        "--max-new-tokens",
        "30",
        "--temperature",
        "1",
        "--top-p",
        "0.95",
        "--seed",
    ]
    outs = []
    for seed in ("1", "1", "2"):
        assert call(*words, seed) == 0
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1] != outs[2]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "PROMPT or --prompts"),
        (["a", "--prompts", "x.jsonl"], "PROMPT or --prompts"),
        ([""], "empty"),
        (["a", "--max-seq-len", "9999"], "window of 128"),
        (["李" * 300], "window is 128"),
        (["a", "--temperature", "-1"], "temperature"),
        (["--prompts", "none.jsonl"], "none.jsonl: cannot be read"),
        (["a", "--json-schema", "none.json"], "none.json: cannot be read"),
    ],
)
def test_mistakes_are_sentences(
    model: str, words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("generate", model, *words) == 2
    err = capsys.readouterr().err
    assert told in err and err.startswith("error: ") and err.count("\n") == 1


def test_a_run_stands_for_its_best_finished_stage(run: Path, model: str, tmp_path: Path) -> None:
    assert resolve_model_dir(str(run)) == run / "sft"
    assert resolve_model_dir(run, base=True) == run / "pretrain"
    assert resolve_model_dir(run / "sft", base=True) == run / "pretrain"
    assert resolve_model_dir(model) == Path(model)
    (run / "merge" / "manifest.json").write_text("{}")
    assert resolve_model_dir(run) == run / "merge"
    for place, words in ((tmp_path / "none", "no such directory"), (tmp_path, "no model there")):
        with pytest.raises(UserError, match=words):
            resolve_model_dir(place)
    with pytest.raises(UserError, match="--base"):
        resolve_model_dir(model, base=True)


@pytest.mark.parametrize("stage", ["grpo", "dpo", "distil"])
def test_what_post_training_leaves_goes_before_what_it_began_with(tmp_path: Path, stage: str) -> None:
    for name in ("pretrain", "sft", stage):
        (tmp_path / name).mkdir()
        for file in ("config.json", "manifest.json"):
            (tmp_path / name / file).write_text("{}")
    assert resolve_model_dir(tmp_path) == tmp_path / stage
    (tmp_path / stage / "config.json").unlink()  # an adapter is no model
    assert resolve_model_dir(tmp_path) == tmp_path / "sft"


def write_prompts(folder: Path) -> Path:
    rows = [{"prompt": f"李白 {i}" * (1 + i % 3), "id": i} for i in range(30)] + [{"prompt": "长" * 200}]
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return path


def test_an_interrupted_file_of_answers_equals_an_undisturbed_one(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = write_prompts(tmp_path), tmp_path / "prompts.answers.jsonl"
    words = [
        "generate",
        model,
        "--prompts",
        str(path),
        "--max-new-tokens",
        "9",
        "--temperature",
        "1",
        "--seed",
        "5",
    ]
    assert call(*words, "--json") == 1  # the last prompt does not fit
    assert json.loads(capsys.readouterr().out)["prompts"] == 31
    whole = out.read_bytes()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [r.get("id") for r in rows] == [*range(30), None]
    assert rows[-1]["finish_reason"] == "error" and "window" in rows[-1]["error"]
    assert call(*words) == 2 and "exists already" in capsys.readouterr().err
    out.unlink()

    steps, real = [0], Engine.step

    def step(engine: Engine) -> object:
        steps[0] += 1
        if steps[0] > 12:
            raise KeyboardInterrupt
        return real(engine)

    monkeypatch.setattr("microlm.cli.answers.generate.BATCH", 3)
    monkeypatch.setattr(Engine, "step", step)
    assert call(*words) == 130
    part = tmp_path / "prompts.answers.jsonl.unfinished"
    part.write_bytes(part.read_bytes() + b'{"prompt": "half a li')
    monkeypatch.setattr(Engine, "step", real)
    assert call(*words, "--top-k", "3") == 2 and "other prompts or settings" in capsys.readouterr().err
    assert call(*words, "--json") == 1  # the last prompt does not fit
    assert 0 < json.loads(capsys.readouterr().out)["resumed_at"] < 31
    assert out.read_bytes() == whole and not part.exists()


def test_answers_of_another_model_in_the_same_place_are_not_continued(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, moved = tmp_path / "model", tmp_path / "moved"
    words = ["--prompts", str(write_prompts(tmp_path)), "--max-new-tokens", "2", "--json"]
    write_model(place, "qwen3", seed=1)
    with monkeypatch.context() as patch:
        patch.setattr("microlm.cli.answers.generate.BATCH", 3)
        steps, real = iter(range(8)), Engine.step
        patch.setattr(
            Engine, "step", lambda engine: real(engine) if next(steps, None) is not None else stop()
        )
        assert call("generate", str(place), *words) == 130
    place.rename(moved)
    write_model(place, "qwen3", seed=2)
    capsys.readouterr()
    assert call("generate", str(place), *words) == 2
    assert "other prompts or settings" in capsys.readouterr().err
    assert call("generate", str(moved), *words) == 1
    assert json.loads(capsys.readouterr().out)["resumed_at"] > 0


def stop() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("line", "told"), [("{", "not valid JSON"), ("3", "no 'prompt'"), ('{"prompt":3}', "no 'prompt'")]
)
def test_a_broken_prompt_line_is_named(
    model: str, tmp_path: Path, line: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt":"a"}\n\n' + line + "\n")
    assert call("generate", model, "--prompts", str(tmp_path / "p.jsonl")) == 2
    assert f"p.jsonl:3: {told}" in capsys.readouterr().err


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lines on a stdin that is no terminal."""
    return lambda *lines: monkeypatch.setattr(
        "sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines))
    )


def test_chat_in_a_pipe_equals_the_engine(
    model: str, tmp_path: Path, typed: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "talk.jsonl"
    typed(
        "李白?", "/system brief", "again", f"/save {saved}", "/reset", "/save", "/nonsense", "李白?", "/help"
    )
    assert call("chat", model, "--max-new-tokens", "8", "--json") == 0
    out, err = capsys.readouterr()
    texts = [json.loads(line)["text"] for line in out.splitlines()]
    turns = [Message("user", "李白?"), Message("assistant", texts[0]), Message("user", "again")]
    brief = Message("system", "brief")
    assert texts[0] == greedy(model, turns[:1], 8)
    assert texts[1] == greedy(model, [brief, *turns], 8)
    assert texts[2] == greedy(model, [brief, turns[0]], 8)
    roles = [m["role"] for m in json.loads(saved.read_text(encoding="utf-8"))["messages"]]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert (
        "error: /nonsense: no such command" in err and "error: /save: give the name" in err and "/exit" in err
    )


def test_raw_chat_continues_each_line_with_the_base_model(
    run: Path, typed: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    typed("李白", "", "李白", "/exit", "never read")
    assert call("chat", str(run), "--raw", "--max-new-tokens", "8", "--json") == 0
    texts = [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]
    assert texts == [greedy(run / "pretrain", "李白", 8)] * 2


def test_a_full_window_drops_the_oldest_turns(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    talker = LocalTalker(Engine(model, max_seqs=1), Sampling(max_tokens=8, ignore_eos=True))
    session = Session(talker, raw=False)
    for i in range(9):
        session._take(f"question number {i}")
        assert session.turns[-2].content == f"question number {i}" and session.turns[0].role == "user"
    assert "oldest 2 messages were dropped" in capsys.readouterr().err
    before = list(session.turns)
    with pytest.raises(UserError, match=f"window of {WINDOW}; shorten"):
        session._take("长" * 200)
    assert session.turns == [] or session.turns == before[-len(session.turns) :]
    assert talker.engine.free_slots == 1


def test_ctrl_c_stops_a_reply_and_keeps_the_conversation(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = Engine(model, max_seqs=1)
    session = Session(LocalTalker(engine, Sampling(max_tokens=50, ignore_eos=True)), raw=False)
    real, steps = Engine.step, [0]

    def step(e: Engine) -> object:
        steps[0] += 1
        if steps[0] == 7:
            raise KeyboardInterrupt
        return real(e)

    monkeypatch.setattr(Engine, "step", step)
    session._take("hello")
    assert "[stopped]" in capsys.readouterr().err
    assert [m.role for m in session.turns] == ["user", "assistant"]
    assert engine.free_slots == 1 and not engine.busy
    session._take("hello")
    assert len(session.turns) == 4


def test_an_endpoint_that_is_full_makes_the_chat_forget(capsys: pytest.CaptureFixture[str]) -> None:
    from microlm.core.client import ChatDelta, EndpointError

    class FakeClient:
        url = "http://x"
        asked: ClassVar[list[int]] = []

        def chat_stream(self, messages: list[Message], *_: object) -> object:
            self.asked.append(len(messages))
            if len(messages) > 3:
                raise EndpointError("too long", 400, {"error": {"code": "context_length_exceeded"}})
            yield ChatDelta("ok", "stop", None, 0.0)

        def close(self) -> None:
            pass

    session = Session(RemoteTalker(FakeClient(), Sampling(), "m"), raw=False)  # type: ignore[arg-type]
    for line in ("1", "2", "3"):
        session._take(line)
    assert FakeClient.asked == [1, 3, 5, 3]
    assert [m.content for m in session.turns] == ["2", "ok", "3", "ok"]


def test_a_missing_model_or_server_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(tmp_path / "x", ignore_errors=True)
    assert call("chat", str(tmp_path / "x")) == 2
    assert "no such directory" in capsys.readouterr().err
    assert call("chat", "http://127.0.0.1:9") == 2
    assert "cannot connect" in capsys.readouterr().err
