"""Runs a table of checks. Enter: a client and checks; leaves: a `Verdict`, as JSON and as HTML."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from microlm.core import storage
from microlm.core.client import Client, EndpointError
from microlm.core.errors import CheckFailed, UserError
from microlm.core.report import Page

SCHEMA = 2
Status = Literal["pass", "fail", "not_offered", "not_shown"]


class Failed(Exception):
    """What a check found wrong, as a sentence."""


class NotOffered(Exception):
    """The endpoint does not have what a check looks at."""


class NotShown(Exception):
    """The model's answers do not let the check see what it looks for."""


@dataclass(frozen=True)
class Target:
    """The endpoint under examination and the model to ask."""

    client: Client
    model: str


@dataclass(frozen=True)
class Line:
    """One check's outcome."""

    name: str
    status: Status
    detail: str
    seconds: float


Check = Callable[[Target], str]
"""A check looks at the endpoint and returns what it saw, or raises `Failed`, `NotOffered`, `NotShown`."""


@dataclass(frozen=True)
class Verdict:
    """All lines on one endpoint."""

    url: str
    model: str
    checks: tuple[Line, ...]

    def count(self, status: Status) -> int:
        """How many lines have this status."""
        return sum(line.status == status for line in self.checks)

    def to_json(self) -> dict[str, Any]:
        """The whole verdict, with details and times."""
        lines = [asdict(line) | {"seconds": round(line.seconds, 4)} for line in self.checks]
        return {"schema": SCHEMA, "url": self.url, "model": self.model, "checks": lines} | self._counts()

    def lasting(self) -> dict[str, Any]:
        """The part that is equal for equal endpoints: names and outcomes."""
        lines = [{"name": line.name, "status": line.status} for line in self.checks]
        return {"schema": SCHEMA, "checks": lines} | self._counts()

    def to_html(self) -> str:
        """A self-contained page."""
        page = Page("MicroLM verify")
        page.heading("Verdict")
        page.paragraph(f"Model '{self.model}' at {self.url}.")
        page.paragraph(self.summary())
        rows = [(line.status, line.name, line.detail, round(line.seconds, 3)) for line in self.checks]
        page.table(("result", "check", "what was seen", "seconds"), rows)
        return page.html()

    def summary(self) -> str:
        """The counts as a phrase."""
        counts = self._counts()
        return ", ".join(f"{count} {_words(name)}" for name, count in counts.items())

    def _counts(self) -> dict[str, int]:
        return {
            "passed": self.count("pass"),
            "failed": self.count("fail"),
            "not_offered": self.count("not_offered"),
            "not_shown": self.count("not_shown"),
        }


def judge(
    client: Client,
    checks: Mapping[str, Check],
    model: str | None = None,
    report: Callable[[Line], None] | None = None,
) -> Verdict:
    """Run every check, the failed ones too; `report` hears each line at once. Unreachable is a UserError.

    A client without a deadline gets its time-out as one: an answer that never ends is a fault.
    """
    if client.deadline_s is None:
        client.deadline_s = client.timeout_s
    client.health()
    target = Target(client, model or _first_model(client))
    lines = []
    for name, check in checks.items():
        line = _run(name, check, target)
        lines.append(line)
        if report:
            report(line)
    return Verdict(client.url, _printable(target.model), tuple(lines))


def write(verdict: Verdict, folder: Path) -> None:
    """verdict.json and verdict.html."""
    with storage.explain_write(folder):
        folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(verdict.to_json(), ensure_ascii=False, indent=1) + "\n"
    storage.write_atomic(folder / "verdict.json", text.encode())
    storage.write_atomic(folder / "verdict.html", verdict.to_html().encode())


def require_passed(
    verdict: Verdict, where: Path | None = None, refused: Sequence[Status] = ("fail",)
) -> None:
    """Raise CheckFailed when a line has a refused status; the sentence names them and where to read on."""
    bad = [line for line in verdict.checks if line.status in refused]
    if bad:
        names = ", ".join(n.name if n.status == "fail" else f"{n.name}: {_words(n.status)}" for n in bad)
        hint = f"; see {where}" if where else ""
        raise CheckFailed(f"verify: {len(bad)} of {len(verdict.checks)} checks failed ({names}){hint}")


def _words(name: str) -> str:
    return name.replace("_", " ")


def _first_model(client: Client) -> str:
    """The model to ask; when the list is broken, its own check says so and the others go on."""
    try:
        return client.default_model()
    except EndpointError as e:
        if e.status in (401, 403):
            raise
        return "default"


def _run(name: str, check: Check, target: Target) -> Line:
    started = time.perf_counter()
    status: Status = "pass"
    try:
        detail = check(target)
    except Failed as e:
        status, detail = "fail", str(e)
    except NotOffered as e:
        status, detail = "not_offered", str(e)
    except NotShown as e:
        status, detail = "not_shown", str(e)
    except UserError as e:  # an error answer, a broken stream, a time-out: the sentence says it
        status, detail = "fail", str(e)
    return Line(name, status, _printable(detail), time.perf_counter() - started)


def _printable(text: str) -> str:
    """What an endpoint sent, without control characters and lone surrogates: for terminals and files."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
