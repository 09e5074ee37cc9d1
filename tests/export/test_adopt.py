"""What is adopted is what transformers computes, byte for byte as it was; what is not ours is a sentence."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from foreign import CARD, edit, write_foreign
from hub_mirror import COMMIT, mirror
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from microlm.core.artifact import Artifact, hash_file, open_artifact
from microlm.core.errors import CheckFailed, UserError
from microlm.core.records import Conversation, Message, Sampling
from microlm.engine import Engine
from microlm.export import adopt, parity
from microlm.export.adoption import licence, support
from microlm.model import directory
from microlm.text.chat import chat_ids, encode_chat
from microlm.text.tokenizer import Tokenizer

ROPE = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
ASK, SAY = Message("user", "Who?"), Message("assistant", "Li Bai.")
KINDS: dict[str, dict[str, Any]] = {
    "qwen2, tied": {"kind": "qwen2", "tie_word_embeddings": True},
    "qwen3, bfloat16": {"kind": "qwen3", "template": "qwen3", "dtype": torch.bfloat16},
    "llama 3, sharded, scaled": {
        "kind": "llama", "template": "llama-3.1", "shards": True, "rope_parameters": ROPE,
        "eos_token_id": [260, 4], "tie_word_embeddings": False,
    },
    "llama, float16": {"kind": "llama", "template": "smollm2", "dtype": torch.float16},
}  # fmt: skip


def run_adopt(out: Path, source: Path | str, **fields: Any) -> Artifact:
    return adopt.run(adopt.AdoptRecipe(out=str(out), source=str(source), parity_chats=16, **fields))


@pytest.mark.parametrize("name", KINDS)
def test_a_foreign_model_joins_as_it_is(tmp_path: Path, name: str) -> None:
    source = write_foreign(tmp_path / "source", **KINDS[name])
    made = run_adopt(tmp_path / "model", source)
    for file in source.iterdir():
        assert hash_file(made.path / file.name) == hash_file(file), file.name
    told, report = made.manifest["metrics"]["adopted"], made.json("logs/parity.json")
    assert made.kind == "model" and made.manifest["licences"] == [told["licence"]] == ["Apache-2.0"]
    assert (told["changed"], told["left_out"], told["template"]) == ([], [], "its own")
    assert report == made.manifest["metrics"]["parity"] and report["ok"]
    assert report["logits_max_abs_difference"] <= parity.TOLERANCE and report["longest_prompt"] == 256
    assert report["conversations"] >= 16 and report["texts"] > 100


def test_equal_bytes_are_the_same_model_wherever_they_lie(tmp_path: Path) -> None:
    first = run_adopt(tmp_path / "a", write_foreign(tmp_path / "source"))
    shutil.move(tmp_path / "source", tmp_path / "elsewhere")
    second = run_adopt(tmp_path / "b", tmp_path / "elsewhere")
    assert (first.key, first.digest) == (second.key, second.digest)
    again = run_adopt(tmp_path / "a", tmp_path / "elsewhere")
    assert again.manifest == first.manifest
    (tmp_path / "elsewhere" / "README.md").write_text(CARD + "another", encoding="utf-8")
    assert run_adopt(tmp_path / "c", tmp_path / "elsewhere").key != first.key


def test_a_hub_cache_of_links_is_followed(tmp_path: Path) -> None:
    source = write_foreign(tmp_path / "blobs")
    links = tmp_path / "snapshots" / "c0ffee"
    links.mkdir(parents=True)
    for file in source.iterdir():
        (links / file.name).symlink_to(file)
    made = run_adopt(tmp_path / "model", links)
    assert not any(path.is_symlink() for path in made.path.rglob("*"))
    (source / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: is a link that leads nowhere"):
        run_adopt(tmp_path / "other", links)


def test_terms_that_are_a_link_to_elsewhere_are_not_taken(tmp_path: Path) -> None:
    source = write_foreign(tmp_path / "source")
    (tmp_path / "secret").write_text("of nobody's concern", encoding="utf-8")
    (source / "LICENSE.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=r"LICENSE\.txt: is a link that leaves the model's directory"):
        run_adopt(tmp_path / "model", source)


def test_an_old_directory_with_stored_frequencies(tmp_path: Path) -> None:
    source = write_foreign(tmp_path / "source", "llama", "smollm2")
    weights = load_file(source / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    assert run_adopt(tmp_path / "model", source).manifest["metrics"]["parity"]["ok"]


def test_a_base_model_gets_chatml_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_foreign(tmp_path / "source", "qwen2", None, eos_token_id=0)
    made = run_adopt(tmp_path / "model", source)
    told = made.manifest["metrics"]["adopted"]
    assert told["template"] == adopt.CHATML and len(told["changed"]) == 2
    assert "a base model: it brings no chat template and got ChatML" in capsys.readouterr().err
    theirs, ours = AutoTokenizer.from_pretrained(made.path), Tokenizer.load(made.path)
    ids = theirs.apply_chat_template([{"role": "user", "content": "Who?"}], add_generation_prompt=True,
                                     return_dict=False)  # fmt: skip
    assert ids == chat_ids(ours, Conversation((ASK,)), generation_prompt=True)
    ends = transformers.GenerationConfig.from_pretrained(made.path).eos_token_id
    assert ends == [ours.eos_id, 0] and directory.read_config(made.path).hf_eos == [0, ours.eos_id]
    require_ends(Engine(made.path, max_seqs=1), {0, ours.eos_id})


def require_ends(engine: Engine, ends: set[int]) -> None:
    """Each of these ids stops an answer, another does not."""
    for number in {*ends, max(ends) + 1}:
        sampling = Sampling(max_tokens=2, logit_bias=((number, 100.0),))
        [answer] = engine.generate([[ASK]], sampling)
        assert answer.finish_reason == ("stop" if number in ends else "length")


def test_a_base_model_that_cannot_write_chatml_reads_texts_only(tmp_path: Path) -> None:
    source = write_foreign(tmp_path / "source", "llama", "llama-3.1")
    (source / "chat_template.jinja").unlink()
    made = run_adopt(tmp_path / "model", source)
    report = made.manifest["metrics"]["parity"]
    assert made.manifest["metrics"]["adopted"]["template"] == "none"
    assert report["conversations"] == 0 and report["texts"] > 100
    with pytest.raises(UserError, match="has no chat template, and its tokenizer lacks the tokens of ours"):
        encode_chat(Tokenizer.load(made.path), [ASK, SAY])


def test_answers_of_another_family_end_at_each_of_its_ends(tmp_path: Path) -> None:
    """Llama 3: its EOS is no token of ChatML, and its config lists several."""
    source = write_foreign(tmp_path / "source", "llama", "llama-3.1", eos_token_id=[4, 5])
    edit(source, "generation_config.json", eos_token_id=[4, 5, 7])
    tokenizer = Tokenizer.load(source)
    assert tokenizer.eos_id == tokenizer.control["<|eot_id|>"] and tokenizer.start_id is None
    ids, mask = encode_chat(tokenizer, [ASK, SAY])
    labels = [i for i, learn in zip(ids, mask, strict=True) if learn]
    assert labels[-1] == tokenizer.eos_id and tokenizer.decode(labels) == "Li Bai."
    engine = Engine(run_adopt(tmp_path / "model", source).path, max_seqs=1)
    require_ends(engine, {4, 5, 7, tokenizer.eos_id, tokenizer.pad_id})
    directory.save(directory.load(source), tmp_path / "tuned")
    assert directory.read_config(tmp_path / "tuned").hf_eos == [4, 5, 7]
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "tuned").eos_token_id == [4, 5, 7]


LICENCES = {
    "---\nlicense: mit\n---\n": "MIT",
    "---\nlicense: [apache-2.0, mit]\n---\n": "Apache-2.0, MIT",
    "---\nlicense: other\nlicense_name: qwen-research\n---\n": "qwen-research",
    "---\n: [\n---\n": "llama3.2",
    "no front matter": "llama3.2",
    "---\na: &a [x, x]\nb: &b [*a, *a]\nlicense: {k: *b}\n---\n": "llama3.2",
    "---\na: &a [x, x]\nlicense: [*a, mit]\n---\n": "llama3.2",
    f"---\nlicense: other\nlicense_name: {'x' * 101}\n---\n": "llama3.2",
    f"---\nlicense: [{'mit, ' * 9}]\n---\n": "llama3.2",
}


@pytest.mark.parametrize("card", LICENCES)
def test_the_licence_is_read(tmp_path: Path, card: str) -> None:
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    (tmp_path / "LICENSE.txt").write_text("LLAMA 3.2 COMMUNITY LICENSE AGREEMENT\n", encoding="utf-8")
    assert licence.licence_of(tmp_path) == LICENCES[card]


def test_an_unstated_licence_is_unknown_unless_the_recipe_says_it(tmp_path: Path) -> None:
    source = write_foreign(tmp_path / "source")
    (source / "README.md").unlink()
    assert run_adopt(tmp_path / "a", source).manifest["licences"] == ["unknown"]
    assert run_adopt(tmp_path / "b", source, licence="mit").manifest["licences"] == ["mit"]


def tiny(name: str, **fields: Any) -> Callable[[Path], Path]:
    """Another architecture, written by transformers."""

    def write(folder: Path) -> Path:
        write_foreign(folder)
        config = getattr(transformers, f"{name}Config")(**fields)
        (folder / "model.safetensors").unlink()
        getattr(transformers, NAMES.get(name, f"{name}ForCausalLM"))(config).save_pretrained(folder)
        return folder

    return write


NAMES = {"Bert": "BertForMaskedLM", "T5": "T5ForConditionalGeneration", "GPT2": "GPT2LMHeadModel"}
SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip


def changed(name: str, **fields: Any) -> Callable[[Path], Path]:
    return lambda folder: edit(write_foreign(folder), name, **fields)


def without(*names: str, shards: bool = False) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        write_foreign(folder, shards=shards)
        for name in names:
            (folder / name).unlink()
        return folder

    return write


def pickled(folder: Path) -> Path:
    write_foreign(folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    return folder


def packed(folder: Path) -> Path:
    write_foreign(folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.qweight"] = torch.ones(2, 2, dtype=torch.int32)
    save_file(weights, folder / "model.safetensors")
    return folder


def sentencepiece(folder: Path) -> Path:
    data = json.loads((write_foreign(folder) / "tokenizer.json").read_bytes())
    data["model"]["vocab"]["▁Rome"] = data["model"]["vocab"].pop(" Rome", 440)
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    return folder


def bad_index(folder: Path) -> Path:
    write_foreign(folder, shards=True)
    (folder / directory.INDEX).write_text('{"weight_map": ', encoding="utf-8")
    return folder


def lost_shard(folder: Path) -> Path:
    next(iter(sorted(write_foreign(folder, shards=True).glob("model-0000*")))).unlink()
    return folder


def adapter(folder: Path) -> Path:
    folder.mkdir()
    return edit(folder, "adapter_config.json", base_model_name_or_path="Qwen/Qwen2.5-0.5B")


def cut(folder: Path) -> Path:
    file = write_foreign(folder) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    return folder


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "bert": (tiny("Bert", **SMALL), r"config\.json: bert is an encoder, which reads text and writes none; "),
    "t5": (
        tiny("T5", vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2),
        r"config\.json: t5 is an encoder with a decoder; decoders of the stock architectures",
    ),
    "gpt2": (
        tiny("GPT2", vocab_size=64, n_embd=16, n_layer=1, n_head=2),
        "'gpt2' is not supported: MicroLM's decoder lacks learned positions, LayerNorm and GELU",
    ),
    "mistral": (tiny("Mistral", **SMALL), "'mistral' is not supported: .* lacks sliding-window attention"),
    "gemma": (tiny("Gemma", head_dim=8, **SMALL), "'gemma' is not supported: .* lacks GELU, scaled embed"),
    "phi": (tiny("Phi", **SMALL), "'phi' is not supported: .* partly rotated heads"),
    "mixture of experts": (
        tiny("Qwen3Moe", num_experts=2, moe_intermediate_size=8, **SMALL),
        "'qwen3_moe' is not supported: .* lacks a mixture of experts",
    ),
    "nobody's": (changed("config.json", model_type="own"), "does not know this architecture"),
    "sliding window": (changed("config.json", use_sliding_window=True), "sliding-window attention is not"),
    "yarn": (
        changed("config.json", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}),
        "rotary scaling 'yarn' is not supported",
    ),
    "another head": (
        changed("config.json", architectures=["Qwen2ForSequenceClassification"]),
        "Qwen2ForSequenceClassification has no head that predicts the next token; adopt a Qwen2ForCausalLM",
    ),
    "awq": (changed("config.json", quantization_config={"quant_method": "awq"}), r"quantized \(awq\)"),
    "packed integers": (packed, "'.*qweight' is stored as I32: the weights are quantized"),
    "remote code": (changed("config.json", auto_map={"AutoModel": "m.M"}), r"config\.json: asks for Python"),
    "remote tokenizer": (
        changed("tokenizer_config.json", auto_map={"AutoTokenizer": ["m.T", None]}),
        r"tokenizer_config\.json: asks for Python code of its own \(auto_map\), which is never run here",
    ),
    "pickles": (pickled, r"are pickled \(pytorch_model\.bin\), .* convert them: AutoModelForCausalLM"),
    "no tokenizer": (without("tokenizer.json"), r"no tokenizer\.json there; write it: AutoTokenizer"),
    "large tokenizer": (
        lambda folder: write_foreign(folder, vocab_size=300),
        "the tokenizer has 312 tokens, the embedding 300 rows",
    ),
    "sentencepiece": (sentencepiece, "is not of byte-level BPE; only that is read"),
    "no weights": (without("model.safetensors"), r"no model\.safetensors there"),
    "lost shard": (lost_shard, r"index\.json: names the file 'model-00001-.*, which is not there"),
    "damaged index": (bad_index, r"index\.json: not valid JSON"),
    "cut weights": (cut, r"model\.safetensors: not a whole safetensors file"),
    "no config": (without("config.json"), r"no config\.json there; expected a Hugging Face"),
    "an adapter": (adapter, r"is an adapter, not a model; adopt its base \(Qwen/Qwen2\.5-0\.5B\)"),
    "no list of heads": (
        changed("config.json", architectures=5),
        r"config\.json: architectures is 5, expected a list; copy the file again",
    ),
    "a file": (
        lambda folder: write_foreign(folder) / "model.safetensors",
        r"model\.safetensors: is a file, not a model directory; give its directory, .*source$",
    ),
    "a template elsewhere": (
        lambda folder: edit(write_foreign(folder), "chat_template.json", chat_template="x"),
        r"chat_template\.json: chat templates are not read from there; put them into chat_template\.jinja",
    ),
    "nothing": (lambda folder: folder, "no such directory; give"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_ours_is_one_sentence(tmp_path: Path, name: str) -> None:
    write, sentence = REFUSED[name]
    source = write(tmp_path / "source")
    with pytest.raises(UserError, match=sentence) as refusal:
        run_adopt(tmp_path / "model", source)
    assert "\n" not in str(refusal.value) and not (tmp_path / "model").exists()


def test_what_is_known_of_others_is_about_others() -> None:
    known = support.unsupported()
    words = [*known["encoders"], *known["encoder_decoders"], *known["decoders"]]
    assert len(words) == len(set(words)) and not {"llama", "qwen2", "qwen3"} & set(words)


def test_a_model_that_differs_is_not_signed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_foreign(tmp_path / "source", "llama", "smollm2")
    load = directory.load

    def shifted(path: Path, *rest: Any) -> Any:
        decoder = load(path, *rest)
        with torch.no_grad():
            decoder.model.norm.weight += 0.01
        return decoder

    monkeypatch.setattr(directory, "load", shifted)
    with pytest.raises(CheckFailed, match=r"transformers does not agree with us: 0 texts, 0 control tokens"):
        run_adopt(tmp_path / "model", source)
    assert not (tmp_path / "model").exists()


HOSTILE = {
    "an exception": ("{{ 1/0 }}", "ZeroDivisionError"),
    "a long text": ("{{ 'x' * (10**30) }}", "OverflowError"),
    "much memory": ("{{ ('x' * (10**9))|length }}", "too much memory"),
    "no end": (
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "it takes more than 3 s",
    ),
    "a fault": ("{% for %}", "not a Jinja template"),
    "a refusal": ("{{ raise_exception('never') }}", "it refuses this conversation: never"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_that_renders_no_question_is_refused(tmp_path: Path, name: str) -> None:
    template, reason = HOSTILE[name]
    source = write_foreign(tmp_path / "source")
    (source / "chat_template.jinja").write_text(template, encoding="utf-8")
    with pytest.raises(UserError, match=reason):
        run_adopt(tmp_path / "model", source)


def test_what_the_sandbox_refuses_is_not_asked_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_foreign(tmp_path / "source")
    (source / "chat_template.jinja").write_text("{{ 'x' * (10**30) }}", encoding="utf-8")
    asked = list[object]()
    monkeypatch.setattr(
        transformers.PreTrainedTokenizerFast, "apply_chat_template", lambda *a, **_: asked.append(a)
    )
    report = parity.compare(source, [], [], 16)
    assert not asked and report["conversations_refused"] >= 4 and report["conversations"] == 0
    assert not report["ok"]
    with pytest.raises(CheckFailed, match="its template renders none of the conversations"):
        parity.require(report, "m")


def test_what_a_template_refuses_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_foreign(tmp_path / "source")
    file = source / "chat_template.jinja"
    refusal = "{% if messages|length > 1 %}{{ raise_exception('one turn') }}{% endif %}"
    file.write_text(refusal + file.read_text(encoding="utf-8"), encoding="utf-8")
    (source / "vocab.json").write_text("{}", encoding="utf-8")
    report = run_adopt(tmp_path / "model", source).manifest["metrics"]["parity"]
    refused = report["conversations_refused"]
    assert report["ok"] and report["conversations"] and refused
    said = capsys.readouterr().err
    assert f"the chat template refuses {refused} conversations" in said and "left out: vocab.json" in said


@pytest.mark.slow
def test_a_name_on_the_hub(tmp_path: Path) -> None:
    """From a mirror; then without a network, from the hub's cache; then with neither."""
    source = write_foreign(tmp_path / "source", shards=True)
    torch.save({}, source / "pytorch_model.bin")
    with mirror(source) as server:
        home = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        done = command(tmp_path, "hf:owner/poems", "a", home)
        assert done.returncode == 0, done.stderr
        assert not any("pytorch_model.bin" in path for path in server.asked)
    made = open_artifact(str(tmp_path / "a"))
    assert made.manifest["metrics"]["adopted"]["origin"] == {"hub": "owner/poems", "commit": COMMIT}
    for file in source.glob("model*"):
        assert hash_file(made.path / file.name) == hash_file(file)
    done = command(tmp_path, "hf:owner/poems", "b", home | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0 and open_artifact(str(tmp_path / "b")).digest == made.digest, done.stderr
    done = command(tmp_path, "hf:owner/poems", "c", home | {"HF_HOME": str(tmp_path / "empty")})
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "source 'hf:owner/poems': cannot be loaded" in done.stderr and "give its folder" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("write", "sentence", "weights"),
    [
        (pickled, "hf:owner/poems: the weights are pickled", "pytorch_model.bin"),
        (sentencepiece, "is not of byte-level BPE; only that is read", "model.safetensors"),
    ],
)
def test_a_hub_model_that_cannot_be_adopted_is_refused_before_it_is_fetched(
    tmp_path: Path, write: Callable[[Path], Path], sentence: str, weights: str
) -> None:
    source = write(tmp_path / "source")
    with mirror(source) as server:
        home = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        done = command(tmp_path, "hf:owner/poems", "a", home)
        assert done.returncode == 2 and sentence in done.stderr
        assert not any(weights in path for path in server.asked)


def command(folder: Path, source: str, out: str, environment: dict[str, str]) -> Any:
    words = [sys.executable, "-m", "microlm", "adopt", source, str(folder / out)]
    known = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    return subprocess.run(words, capture_output=True, text=True, env=known | environment, timeout=200)


@pytest.mark.slow
def test_the_command_adopts(tmp_path: Path) -> None:
    source = write_foreign(tmp_path / "source")
    words = [sys.executable, "-m", "microlm", "adopt", str(source), str(tmp_path / "model"), "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    [told] = json.loads(done.stdout)["stages"]
    assert told["kind"] == "model" and Path(told["path"]) == tmp_path / "model"
    bad = subprocess.run([*words[:4], str(tmp_path / "none"), *words[5:]], capture_output=True, text=True)
    assert bad.returncode == 2 and "no such directory" in bad.stderr and "Traceback" not in bad.stderr
