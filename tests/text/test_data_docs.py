"""docs/data.md: every example is read as the page says, without a drop, in both languages."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from microlm.text import sources
from microlm.text.sources import Tally, arithmetic

DOCS = Path(__file__).parents[2] / "docs"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def fences(name: str) -> list[tuple[str, str]]:
    return FENCE.findall((DOCS / name).read_text(encoding="utf-8"))


def examples() -> list[tuple[str, str, str, str]]:
    """(language, content, word of the source, what is said)."""
    blocks = fences("data.md")
    assert len(blocks) % 3 == 0
    found = []
    for (lang, body), (sh, command), (text, said) in zip(*(blocks[i::3] for i in range(3)), strict=True):
        assert (sh, text) == ("sh", "text")
        found.append((lang, body, command.split("data.source=")[1].strip(), said.strip()))
    return found


@pytest.mark.parametrize(("lang", "body", "word", "said"), examples(), ids=lambda v: v[:40].split("\n")[0])
def test_an_example_is_read_as_the_page_says(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    lang: str,
    body: str,
    word: str,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if lang == "python":
        if word.startswith("hf:"):
            pytest.importorskip("datasets", reason="needs the extra 'hub'")
        subprocess.run([sys.executable, "-c", body], check=True, capture_output=True)
    else:
        Path(word.partition(":")[2]).write_text(body, encoding="utf-8")
    source = sources.parse(word)
    sources.announce(source)
    assert capsys.readouterr().err.strip() == said
    tally = Tally()
    records = list(sources.read(source, tally, strict=True))
    assert records and tally.kept == int(said.rsplit(" of ", 1)[1].split()[0])


def test_every_kind_of_source_has_an_example() -> None:
    kinds = {word.partition(":")[0] for _, _, word, _ in examples()}
    assert kinds == set(sources.KINDS) - {sources.FACTBOOK, arithmetic.TASK, "ms"}


def test_both_languages_have_the_same_examples() -> None:
    assert fences("data.md") == fences("data.zh.md") != []
