"""The device's peak: measured, plausible, kept; a cache that cannot be written or read is no obstacle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from microlm.core import peak


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MICROLM_CACHE", str(tmp_path))
    monkeypatch.setattr(peak, "SECONDS", 0.05)
    return tmp_path


def test_the_peak_is_measured_once_for_each_dtype(cache: Path) -> None:
    first = peak.peak_flops(torch.float32)
    assert 1e9 < first < 1e16
    assert peak.peak_flops(torch.float32) == first
    (file,) = (cache / peak.FOLDER).iterdir()
    told = json.loads(file.read_text())
    assert told["flops"] == first
    assert "torch.float32" in told["measured"]
    assert peak.peak_flops(torch.bfloat16) != first
    assert len(list((cache / peak.FOLDER).iterdir())) == 2


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"flops": "fast"}'])
def test_a_damaged_file_is_measured_again(cache: Path, text: str) -> None:
    peak.peak_flops(torch.float32)
    (file,) = (cache / peak.FOLDER).iterdir()
    file.write_text(text)
    assert json.loads(json.dumps(peak.peak_flops(torch.float32))) > 1e9
    assert json.loads(file.read_text())["flops"] > 1e9


def test_a_cache_that_cannot_be_written_is_no_obstacle(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "file").write_text("")
    monkeypatch.setenv("MICROLM_CACHE", str(cache / "file"))
    assert peak.peak_flops(torch.float32) > 1e9


def test_no_product_beats_the_peak_by_much(cache: Path) -> None:
    a = torch.randn(768, 768)
    before = peak._clock(torch.device("cpu"))
    for _ in range(20):
        a @ a
    rate = 20 * 2 * 768**3 / (peak._clock(torch.device("cpu")) - before)
    assert rate < 1.5 * peak.peak_flops(torch.float32)
