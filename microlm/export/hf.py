"""Stage `export`: the model that was evaluated → an HF directory with its card, proven in transformers."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from pydantic import Field

from microlm.core import lineage, runtime
from microlm.core.artifact import Artifact, Workspace, open_artifact, stage
from microlm.core.errors import UserError
from microlm.core.recipe import StageRecipe, artifact_input
from microlm.core.records import Conversation, Document
from microlm.export import card, licences, parity
from microlm.model import directory
from microlm.text.read import read_records
from microlm.text.tokenizer import copy_files


class ExportRecipe(StageRecipe):
    """What leaves the house, and in which precision."""

    model: str = artifact_input(kinds=("model",), description="model artifact to export")
    scores: str | None = artifact_input(
        None, kinds=("scores",), description="scores artifact of this very model, for the model card"
    )
    title: str = Field("MicroLM", pattern=r"^[\w.\- ]+$", description="the model's name on its card")
    dtype: runtime.Dtype = Field("float32", description="precision of the stored weights")
    parity_texts: int = Field(
        500, ge=0, description="held-out texts, and conversations, compared with transformers"
    )
    parity_tokens: int | None = Field(
        None, ge=16, description="longest sequence compared with transformers; none: the whole window"
    )


@stage("export", kind="model", version=4)
def run(recipe: ExportRecipe, work: Workspace) -> None:
    """Check that this model was the one evaluated, write it with its card, compare with transformers."""
    model, scores = work.inputs["model"], work.inputs.get("scores")
    if scores is not None:
        require_evaluated(model, scores)
    decoder = directory.load(model.path)
    directory.save(decoder, work.path, runtime.torch_dtype(recipe.dtype))
    copy_files(model.path, work.path)
    history = ancestors(model)
    facts = card.Facts(
        recipe.title,
        recipe.dtype,
        decoder.config,
        sum(p.numel() for p in decoder.parameters()),
        parity.longest(decoder.config, recipe.parity_tokens),
    )
    found = licences.find(history, work.licences)
    licences.warn(found)
    work.write_text("README.md", card.render(facts, history, scores, sorted(work.licences), found))
    del decoder  # the check loads the written files, twice
    texts, conversations = held_out(history, recipe.parity_texts)
    dtypes = {"stored_dtype": recipe.dtype, "compared_dtype": "float32"}
    report = dtypes | parity.compare(work.path, texts, conversations, recipe.parity_tokens)
    work.write_json("logs/parity.json", report)
    work.metrics |= report
    if found:
        work.metrics["licence_warnings"] = [concern._asdict() for concern in found]
    parity.tell(report, work.out)
    parity.require(report, work.out)


def require_evaluated(model: Artifact, scores: Artifact) -> None:
    """Refuse a model that is not the one whose predictions were scored."""
    predictions = [a for a in ancestors(scores) if a.kind == "predictions"]
    if not predictions:
        raise UserError(
            f"{scores.url}: its predictions are gone, so nobody knows which model was scored; score again"
        )
    for artifact in predictions:
        evaluated = artifact.manifest["inputs"].get("model", {}).get("digest")
        if evaluated != model.digest:
            raise UserError(
                f"{scores.url}: the scores are of model {str(evaluated)[:12]}, and {model.url} is "
                f"{model.digest[:12]}; export the model that was evaluated, or evaluate this one"
            )


def ancestors(artifact: Artifact) -> list[Artifact]:
    """The artifact and all that it was made from and that is still there, each once, oldest first."""
    urls: dict[str, None] = {}
    _walk(lineage.tree(artifact.url, verify=False), urls)
    return [open_artifact(url) for url in urls]


def _walk(node: lineage.Node, urls: dict[str, None]) -> None:
    if node.digest and node.url not in urls:
        for name in sorted(node.inputs):
            _walk(node.inputs[name], urls)
        urls[node.url] = None


def held_out(history: list[Artifact], limit: int) -> tuple[list[str], list[Conversation]]:
    """At most `limit` validation texts and conversations of the data that the model comes from."""
    texts: list[str] = []
    conversations: list[Conversation] = []
    for data in (a for a in history if a.kind == "data"):
        documents, chats = _file(data, "documents"), _file(data, "conversations")
        if documents.exists():
            texts += [d.text for d in islice(read_records(documents, Document), limit)]
        if chats.exists():
            conversations += islice(read_records(chats, Conversation), limit)
    return texts[:limit], conversations[:limit]


def _file(data: Artifact, folder: str) -> Path:
    return data.path / folder / "validation.jsonl"
