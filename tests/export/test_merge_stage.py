"""The merged artifact computes what base and adapter compute; an adapter of another base is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from artifacts import sign, write_model

from microlm.core.artifact import Artifact, Workspace
from microlm.core.errors import UserError
from microlm.export import merge
from microlm.model import directory, lora
from microlm.text.tokenizer import FILES

IDS = torch.tensor([[5, 7, 2, 250, 0, 31, 99, 4]])


def write_adapter(out: Path, base: Artifact) -> Artifact:
    """An adapter artifact with values far from zero."""

    def body(work: Workspace) -> None:
        decoder = directory.load(base.path)
        generator = torch.Generator().manual_seed(5)
        lora.apply(decoder, lora.LoraConfig(4, 8.0), generator)
        with torch.no_grad():
            for weight in lora.adapter_parameters(decoder):
                weight.normal_(0, 0.1, generator=generator)
        lora.save_adapter(decoder, work.path, base.path.name, base.digest)

    return sign(out, "adapter", body, model=str(base.path))


def run_merge(out: Path, model: Artifact, adapter: Artifact) -> Artifact:
    return merge.run(merge.MergeRecipe(out=str(out), model=str(model.path), adapter=str(adapter.path)))


def test_merged_computes_what_base_and_adapter_compute(model: Artifact, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "lora", model)
    merged = run_merge(tmp_path / "merge", model, adapter)
    wrapped = directory.load(model.path)
    lora.load_adapter(wrapped, adapter.path, model.digest)
    with torch.no_grad():
        difference = (directory.load(merged.path)(IDS) - wrapped(IDS)).abs().max()
    assert difference <= 1e-5
    assert merged.kind == "model" and merged.manifest["metrics"]["matrices"] == 14
    assert merged.manifest["licences"] == ["CC0-1.0"]
    for name in (*FILES, "config.json", "generation_config.json"):
        assert merged.file(name).read_bytes() == model.file(name).read_bytes()


def test_unmerged_is_the_base_again(model: Artifact, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "lora", model)
    decoder, base = (directory.load(a.path) for a in (run_merge(tmp_path / "merge", model, adapter), model))
    assert (decoder(IDS) - base(IDS)).abs().max() > 1e-2
    lora.unmerge(decoder, *lora.read_pairs(decoder, adapter.path))
    assert (decoder(IDS) - base(IDS)).abs().max() <= 1e-4
    for name, weight in base.named_parameters():
        assert (decoder.get_parameter(name) - weight).abs().max() <= 1e-6, name


def test_equal_merges_have_equal_digests(model: Artifact, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "lora", model)
    assert (
        run_merge(tmp_path / "a", model, adapter).digest == run_merge(tmp_path / "b", model, adapter).digest
    )


def test_an_adapter_of_another_base_is_refused(
    model: Artifact, tokenizer: Artifact, data: Artifact, tmp_path: Path
) -> None:
    other = write_model(tmp_path / "other", tokenizer, data, seed=1)
    adapter = write_adapter(tmp_path / "lora", other)
    with pytest.raises(UserError, match="give the model that it was trained on"):
        run_merge(tmp_path / "merge", model, adapter)


def test_a_model_is_no_adapter(model: Artifact, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"but 'adapter' takes adapter"):
        run_merge(tmp_path / "merge", model, model)
