"""Fixtures of all rooms; its folder is on the path, so that tests can import `tiny_model`."""

from pathlib import Path

import hypothesis
import pytest

from microlm.core import runtime

hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine fails no test
hypothesis.settings.load_profile("untimed")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out, and count as deselected, what needs the shared corpora, or vLLM, where they are not."""
    root = Path(__file__).parents[1]
    needs = {"shared": root.parent / "shared/data", "vllm": root / ".vllm/.microlm-setup"}
    for marker, place in needs.items():
        if not place.exists():
            gone = [item for item in items if item.get_closest_marker(marker)]
            config.hook.pytest_deselected(items=gone)
            items[:] = [item for item in items if item not in gone]


def _skipped(config: pytest.Config) -> list[str]:
    """The skips that this process reports; a worker of xdist reports none, its controller all of them."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    skips = reporter.stats.get("skipped", []) if reporter is not None else []
    return [f"{report.nodeid}: {report.longrepr[2] if report.longrepr else 'no reason'}" for report in skips]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """In CI a skip is a failure: what does not run there runs nowhere."""
    if runtime.is_ci() and exitstatus == pytest.ExitCode.OK and _skipped(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Name what was skipped, above the last line."""
    if runtime.is_ci() and (skipped := _skipped(config)):
        terminalreporter.section("skipped, and CI allows none", red=True)
        for line in skipped:
            terminalreporter.write_line(line)
