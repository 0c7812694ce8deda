"""Tests in a process of their own: for what, once done to a process, can't be undone.

The process runs a pytest session over the same files, and each test when it is asked
to. Its reports are the test's own: selection, parameters, fixtures, output and xdist
are as everywhere.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import pytest

import forked


class OwnProcess:
    """Runs tests of `files` after `prepare()`. Starts with the first test, and anew if
    it died.
    """

    def __init__(
        self, prepare: Callable[[], None], files: Sequence[str], root: str
    ) -> None:
        self.arguments = (prepare, [*files, f"--rootdir={root}"])
        self.process: Any = None

    def run(
        self, item: pytest.Item, following: pytest.Item | None
    ) -> list[dict[str, Any]]:
        """The reports of `item`, serialized. Fails where it ended the process."""
        if self.process is None:
            self._start()
        self.pipe.send((item.nodeid, following and following.nodeid))
        try:
            return self.pipe.recv()
        except EOFError:
            self.process.join()
            ended = (
                f"the test's own process ended with exit code {self.process.exitcode}"
            )
            pytest.fail(ended, pytrace=False)

    def stop(self) -> None:
        """End it, at once."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.pipe.close()
            shutil.rmtree(self.folder, ignore_errors=True)
        self.process = None

    def _start(self) -> None:
        self.pipe, theirs = forked.CONTEXT.Pipe()
        self.folder = tempfile.mkdtemp()
        prepare, words = self.arguments
        words = [*words, f"--basetemp={self.folder}/tests"]
        given = (theirs, prepare, words, sys.path, dict(os.environ))
        self.process = forked.CONTEXT.Process(target=_serve, args=given)
        self.process.start()
        theirs.close()


def reports_of(
    process: OwnProcess,
    item: pytest.Item,
    following: pytest.Item | None,
) -> list[pytest.TestReport]:
    """The reports of `item` from that process, or one of why there are none."""
    call = pytest.CallInfo.from_call(lambda: process.run(item, following), when="call")
    if call.excinfo is None:
        restored = item.config.hook.pytest_report_from_serializable
        return [restored(config=item.config, data=report) for report in call.result]
    process.stop()  # it died, or this test took too long
    return [pytest.TestReport.from_item_and_call(item, call)]


def _serve(
    pipe: Connection,
    prepare: Callable[[], None],
    words: list[str],
    path: list[str],
    environment: dict[str, str],
) -> None:
    sys.path[:] = path
    os.environ.update(environment)
    prepare()
    plain = ["-p", "no:cacheprovider", "-p", "no:xdist", "-m", "", "-q"]
    with open(os.devnull, "w") as nowhere:
        sys.stdout = nowhere
        pytest.main([*plain, *words], plugins=[_Server(pipe)])


class _Server:
    """A plugin that runs the session's tests as the pipe asks for them, and sends their
    reports.
    """

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe
        self.reports: list[dict[str, Any]] = []

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.config = session.config
        items = {item.nodeid: item for item in session.items}
        while True:
            item, following = (items.get(name) for name in self.pipe.recv())
            self.reports = []
            self.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            self.pipe.send(self.reports)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        serialized = self.config.hook.pytest_report_to_serializable
        self.reports.append(serialized(config=self.config, report=report))
