"""Rows of answers: packed by hand, resumed byte for byte, the same on two ranks, given up on Ctrl-C."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from answering import CHATS, CONTEXT, answer_on_rank, answering_job, chat, make_rows, recipe
from tiny_model import write_tiny_model

from microlm.cli.training.rollouts import open_rollout
from microlm.core import runtime
from microlm.core.artifact import JUDGED
from microlm.core.errors import CheckFailed, UserError
from microlm.core.metrics import read_metrics
from microlm.core.recipe import Parallel
from microlm.core.records import Completion, Conversation, Message, Sampling, ToolCall
from microlm.engine.prompts import encode_prompt
from microlm.model import directory
from microlm.text.tokenizer import Tokenizer
from microlm.train.batches import IGNORE
from microlm.train.batches.answers import Answer, fill, pack
from microlm.train.batches.batch import NO_TRUNK
from microlm.train.batches.prompts import NO_QUESTION, TOO_LONG, Prompt, make_prompts, split
from microlm.train.batches.rollouts import RolloutStream
from microlm.train.loop import train
from microlm.train.ranks import Ranks, launch
from microlm.train.reporter import TIMED

ALONE = Ranks(0, 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), window=CONTEXT)


def asked_for(*ids: int) -> Prompt:
    return Prompt(Conversation((Message("user", "?"),)), ids, "", number=10 * ids[0])


def answer(prompt: Prompt, *ids: int) -> Answer:
    return Answer(prompt, ids, tuple(-0.5 * i for i in ids), (1.0,), False)


def test_answers_go_on_from_a_prompt_that_lies_there_once() -> None:
    one, two, three = asked_for(5, 6), asked_for(9, 10, 11), asked_for(13)
    answers = [answer(one, 7, 8), answer(one, 12), answer(two, 4), answer(two, 3, 2, 1), answer(three, 14)]
    each = {"advantage": np.array([1.0, -2.0, 3.0, -4.0, 5.0])}
    told = np.array([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0], [8.0, 80.0], [16.0, 160.0]])
    batch = pack(answers, each, told, (5, 3))
    x, n = IGNORE, NO_TRUNK
    assert [[i for _, i in row] for row in batch.samples] == [
        [90],
        [50, 50, 130],
        [90],
    ]  # the two of 90 need 6 together
    assert batch.input_ids.tolist() == [[9, 10, 11, 3, 2], [5, 6, 7, 6, 13], [9, 10, 11, 0, 0]]
    assert batch.labels.tolist() == [[x, x, 3, 2, 1], [x, 7, 8, 12, 14], [x, x, 4, x, x]]
    assert batch.segments.tolist() == [[0, 0, 1, 1, 1], [0, 1, 1, 2, 4], [0, 0, 1, -1, -1]]
    assert batch.extras["trunk"].tolist() == [[n, n, 0, 0, 0], [n, 0, 0, 0, 3], [n, n, 0, n, n]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 1, 0], [0, 1, 2, 0, 0]]
    assert batch.extras["advantage"].tolist()[:2] == [[0, 0, -4, -4, -4], [0, 1, 1, -2, 5]]
    assert batch.extras["engine"].tolist()[1] == [0, -3.5, -4, -6, -7]
    assert batch.extras["told"].tolist() == [[8, 80], [19, 190], [4, 40]]


def test_rows_are_filled_longest_first_and_end_in_a_whole_micro_batch() -> None:
    assert fill([3, 9, 4, 6, 1], 10) == [[1, 4], [3, 2], [0]]
    batch = pack([answer(asked_for(5), 6) for _ in range(3)], {}, np.zeros((3, 1)), (1, 4))
    assert batch.labels.shape == (4, 1) and batch.samples[3] == () and batch.label_count == 3


def test_prompts_end_with_the_last_user_turn(model: Path) -> None:
    tokenizer = Tokenizer.load(model)
    call = Message("assistant", "", tool_calls=(ToolCall("add", "{}"),))
    talk = Conversation((Message("user", "2+2"), call, Message("tool", "4"), Message("assistant", "four")))
    assert split(talk) == (Conversation(talk.messages[:1]), "four")
    assert split(chat("a", "b", "c", "d")) == (chat("a", "b", "c"), "d")
    assert split(Conversation((Message("assistant", "b"),))) is None
    chats = [
        *CHATS,
        Conversation((Message("system", "s"),)),
        chat("x" * 90, "y"),
        chat("other", "z", task="t"),
    ]
    found = make_prompts(chats, ["chat"], tokenizer, 60)
    assert [p.gold for p in found.asked] == ["aaa", "bb", "cab", "dd", "edge"]
    assert [p.number for p in found.asked] == [0, 1, 2, 3, 4]
    assert found.dropped == {NO_QUESTION: 1, TOO_LONG: 1}
    for prompt in found.asked:  # the engine asks the very same ids
        assert list(prompt.ids) == encode_prompt(tokenizer, prompt.asked, tokenizer.vocab_size)
    with pytest.raises(
        UserError, match="tasks: the data holds no conversations of 'chatt'; did you mean 'chat'"
    ):
        make_prompts(CHATS, ["chatt"], tokenizer, 60)
    with pytest.raises(UserError, match="5 are longer than the context allows"):
        make_prompts(CHATS, (), tokenizer, 3)


def test_the_order_and_the_draws_come_from_the_place(model: Path) -> None:
    asked = recipe(answers={"prompts": 2})
    decoder = directory.load(model)
    with make_rows(model, decoder, asked, ALONE).batches(0) as stream:
        batches = [next(stream) for _ in range(3)]
        state = stream.state()
    assert state["place"] == 6 and make_rows(model, decoder, asked, ALONE).told(state) == {
        "epochs": {"prompts": 1.2},
        "conversations_not_asked": {},
    }
    again = make_rows(model, decoder, asked, ALONE).batches(0, {**state, "place": 4, "rounds": 2})
    assert torch.equal(next(again).input_ids, batches[2].input_ids)
    assert not torch.equal(batches[0].input_ids, batches[2].input_ids)


def test_a_round_that_is_half_learnt_lies_in_the_state(model: Path) -> None:
    asked = recipe(answers={"updates": 3, "temperature": 0.5})
    decoder = directory.load(model)
    stream = make_rows(model, decoder, asked, ALONE).batches(0)
    first = next(stream)
    state = json.loads(json.dumps(stream.state()))
    with torch.no_grad():
        for p in decoder.parameters():
            p.mul_(1.1)  # a step: who answered is gone
    figures = ("advantage", "weight", "engine")
    resumed = RolloutStream(make_rows(model, decoder, asked, ALONE), state)
    for _ in range(2):
        batch = next(resumed)
        assert torch.equal(batch.input_ids, first.input_ids) and batch.samples == first.samples
        assert set(batch.extras) == {*figures, "told", "trunk", "positions", "old", "raw"}
        assert all(torch.equal(batch.extras[n], e) for n, e in first.extras.items())
    assert resumed.state()["held"] == "" and next(resumed) is not batch
    fewer = recipe(answers={"updates": 1, "temperature": 0.5})
    changed = RolloutStream(make_rows(model, decoder, fewer, ALONE), state)
    next(changed)
    assert changed.state()["held"] == "" and changed.state()["rounds"] == 1
    next(changed)
    assert changed.state()["rounds"] == 2


def content(folder: Path) -> dict[str, Any]:
    """Every byte of checkpoints and weights, and the rows but for times."""
    found = (p for p in sorted(folder.rglob("*")) if p.is_file())
    files = [p for p in found if "logs" not in p.parts and p.name != JUDGED]
    rows = [
        {k: v for k, v in r.items() if k not in ("time", *TIMED)}
        for r in read_metrics(folder / "logs/metrics.jsonl")
    ]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files} | {"rows": rows}


@pytest.mark.skipif(sys.platform != "linux", reason="forks with torch loaded")
@pytest.mark.parametrize(
    ("fields", "deaths"),
    [
        ({"steps": 6, "answers": {"updates": 2}, "loop": {"checkpoint_steps": 3}}, [3, 1]),
        ({"steps": 5, "loop": {"checkpoint_steps": 2, "dtype": "bfloat16"}, "kl_weight": 0.1}, [4, 2]),
    ],
)
def test_killed_while_it_answers_equals_undisturbed(
    tmp_path: Path, model: Path, fields: dict[str, Any], deaths: list[int]
) -> None:
    """The first goes on in the middle of a round, from answers that the checkpoint holds."""
    script = Path(__file__).with_name("rollout_runs.py")
    command = [sys.executable, str(script), str(model), str(tmp_path), json.dumps(fields), json.dumps(deaths)]
    found = subprocess.run(
        command, capture_output=True, text=True, env=runtime.child_env({"OMP_NUM_THREADS": "1"})
    )
    assert json.loads(found.stdout) == [0, -signal.SIGKILL, -signal.SIGKILL, 0], found.stderr
    whole, killed = content(tmp_path / "whole"), content(tmp_path / "killed")
    assert len(whole["rows"]) == fields["steps"] and "model.safetensors" in whole
    assert killed == whole


def test_two_ranks_draw_the_answers_of_one(tmp_path: Path, model: Path) -> None:
    fields = {"steps": 3, "answers": {"prompts": 3}}
    found = []
    for size in (1, 2):
        folder = tmp_path / str(size)
        launch(Parallel(processes=size, threads=1), answer_on_rank, folder, model, fields)
        found.append((read_metrics(folder / "logs/metrics.jsonl"), directory.load(folder)))
    assert multiprocessing.active_children() == []
    (one, alone), (two, both) = found
    told = ("reward", "solved", "answer_tokens", "truncated", "flat_groups", "tokens")
    assert [[r[n] for n in told] for r in one] == [[r[n] for n in told] for r in two]
    for a, b in zip(alone.parameters(), both.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_two_ranks_go_on_in_the_middle_of_a_round(tmp_path: Path, model: Path) -> None:
    fields = {"steps": 4, "answers": {"updates": 4}, "kl_weight": 0.1, "loop": {"checkpoint_steps": 2}}
    two, whole, cut = Parallel(processes=2, threads=1), tmp_path / "whole", tmp_path / "cut"
    launch(two, answer_on_rank, whole, model, fields)
    shutil.copytree(whole / "resume", cut / "resume")
    assert [p.name for p in (cut / "resume").glob("step-*")] == ["step-00000002"]
    launch(two, answer_on_rank, cut, model, fields)
    assert content(cut) == content(whole)


def test_ctrl_c_gives_up_the_answers_and_keeps_the_steps(tmp_path: Path, model: Path) -> None:
    asked = recipe(steps=4, loop={"checkpoint_steps": 99})
    calls = 0

    def interrupted(
        prompts: Sequence[Sequence[int]], samplings: Sequence[Sampling], check: Callable[[], None]
    ) -> list[Completion]:
        nonlocal calls
        calls += 1
        if calls == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return inner(prompts, samplings, check)

    decoder, job = answering_job(tmp_path / "cut", model, asked, ALONE, rollout=interrupted)
    inner = open_rollout(model, decoder, asked)
    with pytest.raises(KeyboardInterrupt):
        train(ALONE, decoder, job)
    assert [p.name for p in (tmp_path / "cut/resume").glob("step-*")] == ["step-00000002"]
    decoder, job = answering_job(tmp_path / "cut", model, asked, ALONE)
    at = train(ALONE, decoder, job)
    other, job = answering_job(tmp_path / "whole", model, asked, ALONE)
    assert train(ALONE, other, job).history == at.history
    assert all(torch.equal(a, b) for a, b in zip(decoder.parameters(), other.parameters(), strict=True))


def test_an_answer_that_failed_is_told(model: Path) -> None:
    asked, decoder = recipe(), directory.load(model)
    with torch.no_grad():
        decoder.model.norm.weight.fill_(torch.nan)
    with pytest.raises(CheckFailed, match="failed: the model's scores are not finite"):
        next(make_rows(model, decoder, asked, ALONE).batches(0))
