"""Jobs: order, progress, cancellation within one report, ownership, and what a failure leaves behind."""

import threading

import pytest

from workbench.jobs import KEPT_JOBS, Board
from workbench.options import BadInput, Progress

WAIT_S = 5


def gated_work(steps, gate, started=None):
    """Reports `steps` times; waits at the gate before each report."""
    def work(on_progress):
        if started:
            started.set()
        for step in range(steps):
            assert gate.wait(WAIT_S)
            on_progress(Progress(stage="count", done=step + 1, total=steps, detail={"step": step}))
        return "counted"
    return work


def open_gate():
    gate = threading.Event()
    gate.set()
    return gate


def test_progress_and_result_are_kept():
    board = Board()
    job = board.submit("count", "me", gated_work(3, open_gate()))
    assert job.wait(WAIT_S)
    seen = board.snapshot(job)
    assert (seen.state, seen.done, seen.total, seen.error) == ("done", 3, 3, "")
    assert [detail["step"] for _, detail in job.events] == [0, 1, 2]
    assert job.result == "counted"


def test_cancel_stops_at_the_next_report():
    board, reached = Board(), []

    def work(on_progress):
        for step in range(10):
            reached.append(step)
            on_progress(Progress(stage="count", done=step, total=10))
            if step == 2:
                board.cancel(job)

    hold = threading.Event()
    first = board.submit("hold", "me", gated_work(1, hold))
    job = board.submit("count", "me", work)
    hold.set()
    assert first.wait(WAIT_S) and job.wait(WAIT_S)
    assert reached == [0, 1, 2, 3]
    assert job.state == "cancelled" and job.error == ""


def test_one_at_a_time_and_the_others_know_their_place():
    board, gate, started = Board(), threading.Event(), threading.Event()
    first = board.submit("first", "me", gated_work(1, gate, started))
    assert started.wait(WAIT_S)
    second = board.submit("second", "you", gated_work(1, gate))
    third = board.submit("third", "you", gated_work(1, gate))
    assert [board.snapshot(j).ahead for j in (first, second, third)] == [0, 1, 2]
    assert board.snapshot(second).state == "queued"
    board.cancel(second)
    assert second.state == "cancelled", "a waiting job ends at once"
    assert board.snapshot(third).ahead == 1
    gate.set()
    assert third.wait(WAIT_S) and third.state == "done"


def test_who_has_used_much_lets_others_pass_but_not_for_ever(monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr("workbench.jobs.time.monotonic", lambda: clock[0])
    board, order, gate = Board(), [], threading.Event()

    def work(name, seconds=0.0):
        def run(on_progress):
            assert gate.wait(WAIT_S)
            order.append(name)
            clock[0] += seconds
        return run

    def come(name, owner, seconds=0.0):
        return board.submit(name, owner, work(name, seconds))

    gate.set()
    assert come("long", "heavy user", 60).wait(WAIT_S)
    for _ in range(200):  # the worker notes what was used just after the job counts as finished
        if board._used:
            break
        gate.wait(0.01)
    gate.clear()
    hold = come("hold", "somebody")
    again = come("again", "heavy user")
    clock[0] += 10
    newcomer = come("newcomer", "new")
    clock[0] += 60
    late = come("late", "another")
    assert board.snapshot(newcomer).ahead < board.snapshot(again).ahead < board.snapshot(late).ahead
    gate.set()
    assert all(job.wait(WAIT_S) for job in (hold, again, newcomer, late))
    assert order == ["long", "hold", "newcomer", "again", "late"]


def test_the_eta_is_for_the_present_stage(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("workbench.jobs.time.monotonic", lambda: clock[0])
    board, etas = Board(), []

    def work(on_progress):
        on_progress(Progress(stage="slow", done=0, total=1))
        clock[0] += 60
        on_progress(Progress(stage="fast", done=0, total=4))
        clock[0] += 2
        on_progress(Progress(stage="fast", done=1, total=4))
        etas.append(board.snapshot(job).eta_s)

    hold = threading.Event()
    board.submit("hold", "me", gated_work(1, hold))
    job = board.submit("work", "me", work)
    hold.set()
    assert job.wait(WAIT_S)
    assert etas == [pytest.approx(6.0)]


@pytest.mark.parametrize(("error", "line"), [
    (BadInput("budget: no limit is set"), "budget: no limit is set"),
    (RuntimeError("first\nsecond"), "work failed: RuntimeError: first"),
])
def test_a_failure_is_one_line_and_the_next_job_still_runs(error, line):
    hold = threading.Event()

    def work(_):
        assert hold.wait(WAIT_S)
        raise error

    def job_is_active():
        return job.active

    board, finished = Board(), []
    job = board.submit("work", "me", work, on_finish=lambda *ending: finished.append((job_is_active(), *ending)))
    after = board.submit("after", "me", gated_work(1, open_gate()))
    hold.set()
    assert after.wait(WAIT_S) and after.state == "done"
    assert (job.state, job.error) == ("failed", line)
    assert finished == [(True, "failed", line)], "told before the job counts as finished"


def test_a_job_belongs_to_its_owner():
    board = Board()
    mine = board.submit("mine", "me", gated_work(1, open_gate()))
    shared = board.submit("shared", "", gated_work(1, open_gate()))
    assert board.get(mine.id, "me") is mine
    assert board.get(mine.id, "you") is None
    assert board.get(shared.id, "you") is shared
    assert board.get("unknown", "me") is None


def test_old_jobs_are_forgotten():
    board = Board()
    jobs = []
    for _ in range(KEPT_JOBS + 10):
        jobs.append(board.submit("one", "me", gated_work(1, open_gate())))
        assert jobs[-1].wait(WAIT_S)
    assert board.get(jobs[0].id, "me") is None
    assert board.get(jobs[-1].id, "me") is jobs[-1]
