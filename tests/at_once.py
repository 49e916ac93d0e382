"""A pytest plugin for runs that may end at any moment: `pytest -p at_once --begun FILE`.

A failure is told when it happens, not at the end. FILE holds the tests that have begun; those that a run finds in it
are left out, so that the same command goes on behind a test that ended its process.
"""

from __future__ import annotations

from pathlib import Path

import pytest

_left_out = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--begun", type=Path, required=True, help="file of the tests that have begun")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_AtOnce(config), "at_once reports")


class _AtOnce:
    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.begun: Path = config.getoption("--begun")

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        old = set(self.begun.read_text().splitlines()) if self.begun.exists() else set()
        left_out = [item for item in items if item.nodeid in old]
        items[:] = [item for item in items if item.nodeid not in old]
        self.config.hook.pytest_deselected(items=left_out)
        self.config.stash[_left_out] = len(left_out)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        with self.begun.open("a") as file:
            file.write(f"{nodeid}\n")

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal = self.config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and terminal is not None:
            terminal.ensure_newline()
            terminal.write_line(report.longreprtext)
            terminal.flush()

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.config.stash.get(_left_out, 0):
            session.exitstatus = pytest.ExitCode.OK  # the last test of all was the one that ended the run before
