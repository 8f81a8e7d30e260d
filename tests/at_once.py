"""A plugin (``-p tests.at_once``) that prints each failure when it happens: a run that is stopped has shown its own."""

from __future__ import annotations

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        print(f"\n{report.nodeid} ({report.when}):\n{report.longreprtext}", flush=True)
