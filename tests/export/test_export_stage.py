"""What is exported = what was evaluated = what plain transformers computes; equal runs, equal bytes."""

from __future__ import annotations

import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from artifacts import sign, write_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from microlm.core.artifact import Artifact
from microlm.core.errors import CheckFailed, UserError
from microlm.core.records import Message
from microlm.export import hf, parity
from microlm.model import directory
from microlm.text.chat import encode_chat
from microlm.text.tokenizer import FILES, Tokenizer

SCORES = {
    "schema": 1,
    "headlines": [
        {
            "name": "question_exact", "kind": "all", "value": 0.8125, "low": 0.7, "high": 0.9, "n": 80,
            "baselines": {"regex": 0.5, "nearest_template": None},
        },
        {
            "name": "bits_per_byte", "kind": "all", "value": 1.23456, "low": 1.2, "high": 1.3, "n": 12,
            "baselines": {"regex": None, "nearest_template": None},
        },
    ],
}  # fmt: skip


def write_scores(folder: Path, model: Artifact) -> Artifact:
    """Scores of a model, through its predictions."""
    asked = sign(folder / "predict", "predictions", lambda work: None, model=str(model.path))
    return sign(
        folder / "score", "scores", lambda w: w.write_json("scores.json", SCORES), predictions=str(asked.path)
    )


def run_export(out: Path, model: Artifact, **fields: Any) -> Artifact:
    return hf.run(hf.ExportRecipe(out=str(out), model=str(model.path), **fields))


@pytest.fixture(scope="module")
def exported(model: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("run")
    return run_export(folder / "export", model, scores=str(write_scores(folder, model).path))


def test_the_logits_of_one_prompt_are_held_at_a_time(exported: Artifact) -> None:
    vocabulary, seen, most = directory.read_config(exported.path).vocab_size, [], 0

    def watch(_module: torch.nn.Module, _args: Any, output: Any) -> None:
        nonlocal most
        if isinstance(output, torch.Tensor) and output.shape[-1] == vocabulary:
            seen.append(weakref.ref(output))
            most = max(most, len({t.data_ptr() for r in seen if (t := r()) is not None}))

    hook = torch.nn.modules.module.register_module_forward_hook(watch)
    try:
        parity.compare(exported.path, [], [])
    finally:
        hook.remove()
    assert len(seen) > 2 * len(parity.TEXTS)
    assert most == 2  # ours and theirs


def test_plain_transformers_computes_the_same(exported: Artifact, model: Artifact) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported.path)
    theirs = AutoModelForCausalLM.from_pretrained(exported.path)
    chat = [Message("user", "李白是谁？")]
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "李白是谁？"}], add_generation_prompt=True, return_dict=False
    )
    assert ids == encode_chat(Tokenizer.load(exported.path), chat, generation_prompt=True)[0]
    with torch.no_grad():
        difference = (
            (theirs(torch.tensor([ids])).logits - directory.load(model.path)(torch.tensor([ids]))).abs().max()
        )
    assert difference <= 1e-4
    answer = theirs.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False)
    assert answer.shape[1] <= len(ids) + 5


def test_the_parity_report_says_what_was_compared(exported: Artifact) -> None:
    report = exported.json("logs/parity.json")
    assert report["ok"] and report["logits_max_abs_difference"] <= report["tolerance"] == 1e-4
    assert report["prompts"] == len(parity.TEXTS) + 5 + 3 + 1
    assert report["longest_prompt"] == 128 == exported.json("config.json")["max_position_embeddings"]
    assert (report["stored_dtype"], report["compared_dtype"]) == ("float32", "float32")
    assert report["texts"] == len(parity.TEXTS) + 5 and report["texts_unequal"] == 0
    assert report["conversations"] == len(parity.CONVERSATIONS) + 3 and report["conversations_unequal"] == 0
    assert exported.manifest["metrics"] == report


def test_the_folder_holds_what_engines_read(exported: Artifact) -> None:
    expected = {
        *FILES,
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "README.md",
        "manifest.json",
    }
    assert {p.name for p in exported.path.iterdir() if p.is_file()} == expected


def test_equal_exports_are_equal_bytes(exported: Artifact, model: Artifact, tmp_path: Path) -> None:
    again = run_export(tmp_path / "elsewhere", model, scores=str(write_scores(tmp_path, model).path))
    assert again.digest == exported.digest


def test_bfloat16_is_the_rounded_model(model: Artifact, tmp_path: Path) -> None:
    made = run_export(tmp_path / "export", model, dtype="bfloat16")
    assert made.json("config.json")["dtype"] == "bfloat16"
    exact = load_file(model.file("model.safetensors"))
    for name, weight in load_file(made.file("model.safetensors")).items():
        assert torch.equal(weight, exact[name].bfloat16())


def test_the_card_claims_no_more_than_was_compared(
    exported: Artifact, model: Artifact, tmp_path: Path
) -> None:
    scores = str(write_scores(tmp_path, model).path)
    made = run_export(tmp_path / "export", model, dtype="bfloat16", scores=scores)
    rounded, exact = (a.file("README.md").read_text(encoding="utf-8") for a in (made, exported))
    assert "Weights and computation were float32 on both sides" in exact
    assert "of exactly these weights" in exact
    assert "stored in bfloat16 and were widened to float32" in rounded
    assert "Computing in bfloat16 was not compared" in rounded
    assert "of the weights before they were rounded to bfloat16" in rounded
    assert "exactly these weights" not in rounded and "were float32 on both sides" not in rounded
    report = made.json("logs/parity.json")
    assert (report["stored_dtype"], report["compared_dtype"]) == ("bfloat16", "float32")


def late_fault(real: Any) -> Any:
    """A loader whose model is wrong at the last position of the window only."""

    def load(path: Path, *rest: Any) -> Any:
        decoder = real(path, *rest)
        decoder.cos[-1] = 0.0
        return decoder

    return load


def test_a_fault_at_the_end_of_the_window_fails_the_check(
    exported: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory, "load", late_fault(directory.load))
    report = parity.compare(exported.path, [], [])
    assert not report["ok"] and report["logits_max_abs_difference"] > 1e-4


def test_a_fault_that_only_held_out_words_show_fails_the_check(
    exported: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, real = Tokenizer.load(exported.path), directory.load
    text = "@@@"
    odd = tokenizer.encode(text)[-1]
    assert odd not in {i for line in tokenizer.encode_batch(list(parity.TEXTS)) for i in line}

    def load(path: Path, *rest: Any) -> Any:
        decoder = real(path, *rest)
        with torch.no_grad():
            decoder.model.embed_tokens.weight[odd] += 0.1
        return decoder

    monkeypatch.setattr(directory, "load", load)
    assert not parity.compare(exported.path, [text], [])["ok"]


def test_the_model_that_was_evaluated_is_the_one_exported(
    model: Artifact, tokenizer: Artifact, data: Artifact, tmp_path: Path
) -> None:
    other = write_model(tmp_path / "other", tokenizer, data, seed=1)
    scores = write_scores(tmp_path, other)
    with pytest.raises(
        UserError, match=f"scores are of model {other.digest[:12]}, and .* is {model.digest[:12]}"
    ):
        run_export(tmp_path / "export", model, scores=str(scores.path))
    assert not (tmp_path / "export").exists()
    shutil.rmtree(tmp_path / "predict")
    with pytest.raises(UserError, match="predictions are gone"):
        run_export(tmp_path / "export", other, scores=str(scores.path))


def test_a_copy_of_the_evaluated_model_may_be_exported(model: Artifact, tmp_path: Path) -> None:
    copy = shutil.copytree(model.path, tmp_path / "sft")
    scores = write_scores(tmp_path, model)
    made = hf.run(hf.ExportRecipe(out=str(tmp_path / "export"), model=str(copy), scores=str(scores.path)))
    assert made.manifest["inputs"]["model"]["digest"] == model.digest


def test_the_card_says_data_licences_and_scores(exported: Artifact, model: Artifact, data: Artifact) -> None:
    card = exported.file("README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: transformers\n") and "license: cc0-1.0" in card
    assert "**It was trained on synthetic data**" in card
    assert "synthetic, generated by the factbook: documents, conversations" in card
    assert "Licences of the data: CC0-1.0." in card
    assert "| question_exact | all | 0.8125 | 0.7 – 0.9 | 80 | regex 0.5 |" in card
    assert "| bits_per_byte | all | 1.235 | 1.2 – 1.3 | 12 | – |" in card
    assert f"`{model.digest[:12]}`" in card and f"`{data.digest[:12]}`" in card
    assert str(exported.path.parent) not in card


def test_a_user_s_folders_stay_out_of_the_card(tokenizer: Artifact, tmp_path: Path) -> None:
    def body(work: Any) -> None:
        work.licences |= {"MIT", "own: ours"}
        work.write_json("logs/audit.json", {"from_factbook": []})

    data = sign(tmp_path / "data", "data", body, source="jsonl:/home/alice/secret/my.jsonl")
    made = run_export(tmp_path / "export", write_model(tmp_path / "sft", tokenizer, data))
    card = made.file("README.md").read_text(encoding="utf-8")
    assert "`jsonl:my.jsonl`" in card and "alice" not in card and "synthetic" not in card
    assert "license: other" in card and "without scores" in card
    assert made.json("logs/parity.json")["texts"] == len(parity.TEXTS)


def test_a_template_of_other_words_is_followed(exported: Artifact, tmp_path: Path) -> None:
    folder = shutil.copytree(exported.path, tmp_path / "m")
    template = folder / "chat_template.jinja"
    template.write_text("{{ 'Words. ' }}" + template.read_text(encoding="utf-8"), encoding="utf-8")
    report = parity.compare(folder, [], [])
    assert report["ok"] and report["conversations"] == len(parity.CONVERSATIONS)


def test_a_template_that_tells_the_date_is_compared_on_our_day_and_said(
    exported: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Our clock stands still, so that equal conversations are equal tokens; that of others does not."""
    assert not parity.compare(exported.path, [], [])["template_tells_the_date"]
    folder = shutil.copytree(exported.path, tmp_path / "m")
    template = folder / "chat_template.jinja"
    told = "{{ strftime_now('%Y-%m-%d') }}" + template.read_text(encoding="utf-8")
    template.write_text(told, encoding="utf-8")
    report = parity.compare(folder, [], [])
    assert report["ok"] and report["template_tells_the_date"]
    parity.tell(report, "m")
    assert "m: the chat template tells the date, here always 2024-07-26" in capsys.readouterr().err


def test_another_tokenization_fails_the_check(exported: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Tokenizer.encode_batch
    monkeypatch.setattr(
        Tokenizer, "encode_batch", lambda self, texts: [ids[::-1] for ids in real(self, texts)]
    )
    report = parity.compare(exported.path, ["李白"], [])
    assert not report["ok"] and report["texts_unequal"] > 1
    assert report["first_unequal_text"] == parity.TEXTS[0]


def test_other_weights_fail_the_check(
    exported: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(exported.path, tmp_path / "m")
    real = directory.load

    def shifted(path: Path, *rest: Any) -> Any:
        decoder = real(path, *rest)
        with torch.no_grad():
            decoder.lm_head.weight.add_(0.01)
        return decoder

    monkeypatch.setattr(directory, "load", shifted)
    report = parity.compare(folder, [], [])
    assert not report["ok"] and report["logits_max_abs_difference"] > 1e-4


def test_nan_weights_fail_the_check(exported: Artifact, tmp_path: Path) -> None:
    folder = shutil.copytree(exported.path, tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    odd = Tokenizer.load(folder).encode("é")[0]  # in one prompt only
    weights["model.embed_tokens.weight"][odd] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    report = parity.compare(folder, [], [])
    assert report["logits_max_abs_difference"] is None and not report["ok"]
    with pytest.raises(CheckFailed, match="logits are not finite"):
        parity.require(report, "m")


def test_nothing_is_said_on_the_terminal(exported: Artifact, capfd: pytest.CaptureFixture[str]) -> None:
    parity.compare(exported.path, [], [])
    assert capfd.readouterr() == ("", "")
