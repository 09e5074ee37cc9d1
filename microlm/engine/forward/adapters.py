"""LoRA adapters at run time: several in one step, each on its own rows. Enters: saved adapters by name.

`W x + scale · B (A x)` is added behind each adapted matrix, so that the base's weights stay as they are.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from microlm.core import manifest
from microlm.core.errors import UserError
from microlm.model import lora
from microlm.model.transformer import Decoder


@dataclass(frozen=True, eq=False)
class Adapter:
    """A loaded one: `key` is of this loading only; matrices (A, B) by module, B scaled already."""

    name: str
    key: str
    matrices: dict[str, tuple[Tensor, Tensor]]


class Adapters:
    """The adapters of one decoder. A request keeps its adapter itself: unloading takes it from nobody."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._loaded: dict[str, Adapter] = {}
        self._numbers = itertools.count()
        self._active: list[tuple[Adapter, int, int]] = []
        self._is_hooked = False

    @property
    def names(self) -> list[str]:
        """What is loaded."""
        return sorted(self._loaded)

    def load(self, name: str, directory: Path, base_digest: str | None) -> None:
        """Read a saved adapter; a wrong base, shape or name is a UserError."""
        if not name:
            raise UserError("adapter: the name is empty; give it one")
        if name in self._loaded:
            raise UserError(f"adapter: '{name}' is loaded already; unload it first, or choose another name")
        config, pairs = lora.read_pairs(self._decoder, directory, base_digest)
        dtype, device = self._decoder.compute_dtype, self._decoder.cos.device
        scale = config.scale
        matrices = {
            module: (a.to(device, dtype), (b * scale).to(device, dtype)) for module, (a, b) in pairs.items()
        }
        if not self._is_hooked:
            self._hook()
        self._loaded[name] = Adapter(name, f"{name}#{next(self._numbers)}", matrices)

    def unload(self, name: str) -> None:
        """Forget an adapter; requests that run with it go on."""
        self.get(name)
        del self._loaded[name]

    def get(self, name: str) -> Adapter:
        """A loaded adapter."""
        if name not in self._loaded:
            known = ", ".join(self.names) or "none"
            raise UserError(f"adapter: '{name}' is not loaded (loaded: {known}); load it, or leave it out")
        return self._loaded[name]

    def use(self, rows: Iterable[tuple[Adapter | None, int, int]]) -> None:
        """Which rows first … stop-1 of the next forward pass go through which adapter."""
        self._active = [(adapter, first, stop) for adapter, first, stop in rows if adapter is not None]

    def _hook(self) -> None:
        for name, module in lora.matrices(self._decoder).items():
            module.register_forward_hook(partial(self._add, name))
        self._is_hooked = True

    def _add(self, name: str, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """Add each adapter's update to its rows of `output` [1,T,out]."""
        for adapter, first, stop in self._active:
            pair = adapter.matrices.get(name)
            if pair is not None:
                low = F.linear(inputs[0][:, first:stop], pair[0])
                output[:, first:stop] += F.linear(low, pair[1])
        return output


def base_digest(directory: Path, adapter: Path) -> str | None:
    """The digest of the model in a directory, where an adapter asks for one; a warning when there is none."""
    wanted = lora.made_for(adapter)
    base = manifest.find(str(directory)) if wanted else None
    if wanted and base is None:
        warnings.warn(
            f"{adapter}: was made for model {wanted[:12]}…; {directory} has no manifest that says whether it "
            "is that one: if it is not, answers are worth nothing",
            stacklevel=3,
        )
    return base.digest if base else None
