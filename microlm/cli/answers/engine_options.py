"""How the engine runs, as options of `generate`, `chat` and `serve`. Leaves: arguments of `Engine`.

Only what the user gave is passed on: the engine's own defaults stay its own.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from microlm.core.errors import UserError

if TYPE_CHECKING:
    from microlm.engine import Engine

Option = typer.Option
Adapters = Annotated[
    list[str] | None,
    Option("--adapter", metavar="[NAME=]DIR", help="a LoRA adapter; with NAME=, for lines that name it"),
]
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
PATIENCE_S = 2.0
_POLICIES = {8: "int8", 4: "int4"}


@dataclass(frozen=True)
class EngineOptions:
    """Precision, memory and speed."""

    max_seq_len: Annotated[
        int | None, Option("--max-seq-len", help="window in tokens; default: the model's")
    ] = None
    max_seqs: Annotated[int | None, Option("--max-seqs", help="answers that are made at once")] = None
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None, Option("--dtype", help="precision of weights and cache")
    ] = None
    quantize: Annotated[
        Literal["int8", "int4"] | None, Option("--quantize", help="pack the weights on loading")
    ] = None
    kv_dtype: Annotated[
        Literal["int8", "int4"] | None, Option("--kv-dtype", help="pack keys and values in the cache")
    ] = None
    quant_policy: Annotated[
        int | None, Option("--quant-policy", metavar="8|4", help="LMDeploy's word for --kv-dtype")
    ] = None
    kv_memory: Annotated[
        str | None, Option("--kv-memory", metavar="SIZE", help="memory of the cache, such as 512MiB or 2GB")
    ] = None
    speculate: Annotated[
        int | None, Option("--speculate", help="guess so many tokens by what was said before; 0: none")
    ] = None
    batch_invariant: Annotated[
        bool, Option("--batch-invariant", help="the same bits alone and in any batch; slower")
    ] = False
    threads: Annotated[int | None, Option("--threads", help="threads; default: all cores")] = None
    no_prefix_caching: Annotated[
        bool, Option("--no-prefix-caching", help="compute the beginnings that prompts share anew")
    ] = False

    def arguments(self, **defaults: Any) -> dict[str, Any]:
        """The keyword arguments of `Engine`; `defaults` hold where the user gave nothing."""
        kv_dtype = self._kv_dtype()
        given = {
            "max_seq_len": self.max_seq_len,
            "max_seqs": self.max_seqs,
            "dtype": self.dtype,
            "quantize": self.quantize,
            "kv_dtype": kv_dtype,
            "kv_memory": None if self.kv_memory is None else size(self.kv_memory),
            "speculate": self.speculate,
            "batch_invariant": True if self.batch_invariant else None,
            "threads": self.threads,
            "prefix_caching": False if self.no_prefix_caching else None,
        }
        return defaults | {name: value for name, value in given.items() if value is not None}

    def refuse_at_url(self) -> None:
        """An endpoint was started with its own options."""
        for f in fields(self):
            if getattr(self, f.name) != f.default:
                word = "--" + f.name.replace("_", "-")
                raise UserError(f"{word}: is for an engine here; at a URL, give it to its 'microlm serve'")

    def _kv_dtype(self) -> str | None:
        if self.quant_policy in (None, 0):
            return self.kv_dtype
        if self.quant_policy not in _POLICIES:
            raise UserError(f"--quant-policy: {self.quant_policy} is not 8 (int8), 4 (int4) or 0 (off)")
        meant = _POLICIES[self.quant_policy]
        if self.kv_dtype not in (None, meant):
            raise UserError(f"--quant-policy {self.quant_policy}: means {meant}; drop --kv-dtype")
        return meant


def size(text: str) -> int:
    """Bytes of a size as people write it: 512MiB, 1.5G, 2_000_000."""
    found = re.fullmatch(r"([\d_]*\.?\d+)\s*([KMG]?I?)B?", text.strip().upper())
    if found is None or found[2] not in _UNITS:
        raise UserError(f"--kv-memory: '{text}' is no size; write bytes, or such as 512MiB or 2GB")
    return int(float(found[1].replace("_", "")) * _UNITS[found[2]])


def warm(engine: Engine) -> None:
    """Have the engine compile what it needs; where that takes long, stderr says so."""
    lines: list[str] = []
    is_late = threading.Event()

    def tell_late() -> None:
        is_late.set()
        typer.echo(lines[-1] if lines else "loading", err=True)

    timer = threading.Timer(PATIENCE_S, tell_late)
    timer.start()
    try:
        engine.warm(lines.append)
    finally:
        timer.cancel()
    if is_late.is_set() and lines:
        typer.echo(lines[-1], err=True)


def load_adapters(engine: Engine, words: Sequence[str]) -> tuple[dict[str, Path], str | None]:
    """Load `[NAME=]DIR` each; their places by name, and the name of the one that has none: it is for all."""
    places: dict[str, Path] = {}
    for_all: str | None = None
    for word in words:
        name, named, place = word.partition("=")
        if not named or Path(word).is_dir():
            if for_all is not None:
                raise UserError(f"--adapter {word}: two adapters without a name; write NAME={word}")
            name, place = Path(word).resolve().name, word
            for_all = name
        if name in places:
            raise UserError(f"--adapter {word}: the name {name} is taken; give another NAME=")
        engine.load_adapter(name, Path(place))
        places[name] = Path(place)
    return places, for_all
