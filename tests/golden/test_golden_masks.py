"""What is learnt of each format, drawn by hand: `masks/FORMAT.txt` has a record, and after `---` its tokens.

⟦…⟧ is around what is learnt. The same with any tokenizer, through token sets, and as `data show` prints it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chat_models import write_model
from small_tokenizer import write as write_small

from microlm.cli import main
from microlm.core.records import Conversation
from microlm.text.bpe.pieces import Pieces
from microlm.text.chat import encode_chats, template_text
from microlm.text.encoding import encode_files
from microlm.text.inspection.labelled import LABEL, Encoded, glyphs, marked
from microlm.text.shards import open_sets
from microlm.text.sources.shapes import parse_line, shape_of
from microlm.text.tokenizer import Tokenizer
from microlm.train.batches import IGNORE, PackedRows

DRAWN = sorted((Path(__file__).parent / "masks").glob("*.txt"))
CONTEXT = 2048


def read(path: Path) -> tuple[dict[str, Any], str]:
    """The record, and how its tokens are drawn."""
    record, drawn = path.read_text(encoding="utf-8").split("\n---\n")
    return json.loads(record), drawn


def conversation(path: Path) -> Conversation:
    found = parse_line(json.dumps(read(path)[0]).encode(), path.name)
    assert isinstance(found, Conversation)
    return found


@pytest.fixture(scope="module", params=["bytes", "trained"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Nearly one token a byte, so that characters are many; or merges as they come out of a corpus."""
    folder = tmp_path_factory.mktemp("run") / "t"
    if request.param == "bytes":
        return Tokenizer.load(write_model(folder, template_text(None)))
    write_small(folder, Pieces())
    (folder / "chat_template.jinja").write_text(template_text(None), encoding="utf-8")
    return Tokenizer.load(folder)


def test_every_format_is_drawn() -> None:
    shapes = {shape_of(read(path)[0]) for path in DRAWN}
    assert shapes == {
        "Alpaca instructions", "OpenAI messages", "ShareGPT conversations", "ChatML text",
        "minimind conversations",
    }  # fmt: skip
    drawn = "".join(read(path)[1] for path in DRAWN)
    for word in ("<|im_start|>system", "<|im_start|>tool\n", "⟦<think>", "⟦<tool_call>", "<tools>"):
        assert word in drawn, word


@pytest.mark.parametrize("path", DRAWN, ids=lambda p: p.stem)
def test_what_is_learnt_is_as_drawn(tokenizer: Tokenizer, path: Path) -> None:
    [(ids, mask)] = encode_chats(tokenizer, [conversation(path)])
    found = list(glyphs(tokenizer, Encoded("", "", ids, mask), [(0, len(ids))]))
    assert marked(found) == read(path)[1]
    assert [i for glyph in found for i in glyph.ids] == ids


@pytest.mark.parametrize("path", DRAWN, ids=lambda p: p.stem)
def test_labels_of_a_batch_are_as_drawn(tokenizer: Tokenizer, path: Path, tmp_path: Path) -> None:
    """From the user's file to the tensors: each label is the token that is drawn after what was read."""
    record, drawn = read(path)
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    encode_files([f"jsonl:{tmp_path}/a.jsonl"], tokenizer.path, tmp_path / "shards")
    rows = PackedRows(open_sets(tmp_path / "shards", "conversations-", "train"), {}, CONTEXT, 0)
    batch = next(rows.batches(1))
    first = batch.segments[0] == 0
    ids, labels = batch.input_ids[0, first].tolist(), batch.labels[0, first].tolist()
    whole = [*ids, tokenizer.encode("\n")[0]]
    mask = [0, *(int(label != IGNORE) for label in labels)]
    assert all(label in (IGNORE, after) for label, after in zip(labels, whole[1:], strict=True))
    sample = Encoded("", "", whole, mask)
    assert marked(glyphs(tokenizer, sample, [(0, len(whole))])) == drawn
    assert torch.equal(batch.labels[0, first], torch.from_numpy(np.where(mask[1:], whole[1:], IGNORE)))


def test_data_show_prints_what_is_drawn(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown(*more: str) -> str:
        with pytest.raises(SystemExit, match="0"):
            main(["data", "show", str(tmp_path / "a.jsonl"), "--tokenizer", str(tokenizer.path), *more])
        return capsys.readouterr().out

    names = ("openai.txt", "alpaca.txt", "openai_thinking.txt")
    chosen = [path for path in DRAWN if path.name in names]
    lines = [json.dumps(read(path)[0]) for path in chosen]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    out = shown()
    for path in chosen:
        assert read(path)[1] in out
    told = json.loads(shown("--json"))
    assert [row["text"] for row in told["records"]] == [read(path)[1] for path in chosen]


def test_a_wrong_mask_does_not_look_as_drawn(tokenizer: Tokenizer) -> None:
    """Each single label that is turned moves a bracket."""
    path = next(p for p in DRAWN if p.name == "openai.txt")
    [(ids, mask)] = encode_chats(tokenizer, [conversation(path)])
    assert "".join(LABEL) not in read(path)[1]
    for i in range(1, len(ids)):
        turned = [*mask[:i], 1 - mask[i], *mask[i + 1 :]]
        assert marked(glyphs(tokenizer, Encoded("", "", ids, turned), [(0, len(ids))])) != read(path)[1]
