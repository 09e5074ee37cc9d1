"""Gates of an audit. Enters: `leakage>0,eos_cut>0.01` and the numbers. Leaves: which of them fail."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from microlm.core.errors import UserError
from microlm.core.recipe import nearest

_FORM = re.compile(r"\s*(\w+)\s*(>=|<=|>|<)\s*(\d+(?:\.\d+)?(?:e-?\d+)?)\s*", re.ASCII)
_COMPARE = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
_NEEDS = {"eos_cut": "--tokenizer", "mask_errors": "--tokenizer", "near_leakage": "--near"}


@dataclass(frozen=True)
class Gate:
    """A number that must not be so."""

    name: str
    sign: str
    limit: float

    def __str__(self) -> str:
        return f"{self.name}{self.sign}{self.limit:g}"

    def fails(self, value: float) -> bool:
        """Whether the number is what it must not be."""
        return bool(_COMPARE[self.sign](value, self.limit))


def parse(words: Sequence[str], known: Sequence[str]) -> list[Gate]:
    """The gates of `--fail-on`; an unknown name is a UserError that names the nearest."""
    found = []
    for word in (w for words_of in words for w in words_of.split(",") if w.strip()):
        match = _FORM.fullmatch(word)
        if not match:
            raise UserError(f"--fail-on {word.strip()}: expected NAME>NUMBER, such as leakage>0")
        if match[1] not in known:
            raise UserError(f"--fail-on {word.strip()}: no number is called so; {nearest(match[1], known)}")
        found.append(Gate(match[1], match[2], float(match[3])))
    return found


def require_measured(gates: Sequence[Gate], measured: Mapping[str, bool]) -> None:
    """Refuse a gate on a number that this audit does not measure: it would pass unseen."""
    for gate in gates:
        if not measured.get(gate.name, True):
            raise UserError(f"--fail-on {gate}: is not measured without {_NEEDS[gate.name]}")
