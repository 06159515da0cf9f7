"""Fixtures of the interface's tests: a fake pipeline, and sessions that use it."""

import sys
import threading

import pytest

from tests.ui.fakes import FakePipeline
from workbench.jobs import Board
from workbench.ui.session import Store

WAIT_S = 20


@pytest.fixture
def pipeline(monkeypatch):
    fake = FakePipeline()
    monkeypatch.setitem(sys.modules, "workbench.pipeline", fake)
    return fake


@pytest.fixture
def store(pipeline, monkeypatch, tmp_path):
    monkeypatch.setenv("ADATSQ_RUNS", str(tmp_path))
    return Store(Board())


@pytest.fixture
def session(store):
    """A session whose model is loaded."""
    store.start_preload()
    fresh = store.open("")
    assert fresh.job.wait(WAIT_S)
    fresh.sync()
    return fresh


@pytest.fixture
def finish():
    """Wait for a session's job and take over what it left."""
    def wait(session):
        assert session.job.wait(WAIT_S)
        session.sync()
        return session
    return wait


@pytest.fixture
def profiled(session, finish):
    from tests.ui.test_actions import profile

    profile(session)
    return finish(session)


@pytest.fixture
def searched(profiled, finish):
    from tests.ui.test_actions import SEARCH_SETTINGS
    from workbench.ui.actions import search

    search.search(profiled, 1.2, None, 5.0, *SEARCH_SETTINGS)
    return finish(profiled)


@pytest.fixture
def gate(pipeline, monkeypatch):
    """Stops the fake pipeline at every report until it is set."""
    event = threading.Event()
    report = type(pipeline)._report

    def wait_and_report(self, *args):
        assert event.wait(20)
        report(self, *args)

    monkeypatch.setattr(type(pipeline), "_report", wait_and_report)
    return event
