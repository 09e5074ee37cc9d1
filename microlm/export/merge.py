"""Stage `merge`: a model and the adapter that was trained on it → one HF directory with float32 weights."""

from __future__ import annotations

from microlm.core.artifact import Workspace, stage
from microlm.core.recipe import StageRecipe, artifact_input
from microlm.model import directory, lora
from microlm.text.tokenizer import copy_files


class MergeRecipe(StageRecipe):
    """Which adapter is folded into which model."""

    model: str = artifact_input(
        kinds=("model",), description="model artifact that the adapter was trained on"
    )
    adapter: str = artifact_input(kinds=("adapter",), description="adapter artifact (LoRA)")


@stage("merge", kind="model", version=1)
def run(recipe: MergeRecipe, work: Workspace) -> None:
    """Load both, fold W + scale · B A in float32, write weights and tokenizer."""
    model, adapter = work.inputs["model"], work.inputs["adapter"]
    adapter.file(lora.ADAPTER_CONFIG)
    decoder = directory.load(model.path)
    lora.load_adapter(decoder, adapter.path, base_digest=model.digest)
    matrices = len(lora.adapted(decoder))
    lora.merge(decoder)
    directory.save(decoder, work.path)
    copy_files(model.path, work.path)
    work.metrics |= {"matrices": matrices, "parameters": sum(p.numel() for p in decoder.parameters())}
