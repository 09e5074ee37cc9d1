"""Licences to heed, of all data that a model comes from. Enters: its ancestors. Leaves: concerns."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence

from microlm.core.manifest import Artifact
from microlm.text.inspection.licences import Concern, concerning


def find(history: Sequence[Artifact], names: Iterable[str]) -> list[Concern]:
    """The licences among `names` that a person should look at, with the records that the audits counted."""
    counts: Counter[str] = Counter()
    for artifact in history:
        path = artifact.path / "logs" / "audit.json"
        if artifact.kind == "data" and path.is_file():
            counts.update(json.loads(path.read_bytes()).get("licences", {}))
    return concerning(names, counts)


def warn(found: Sequence[Concern]) -> None:
    """Say each on stderr."""
    for concern in found:
        said = "".join(c if c.isprintable() else "?" for c in str(concern))
        sys.stderr.write(f"export: warning: the model comes from {said}\n")
