"""Jobs: order, progress, cancellation within one report, ownership, and what a failure leaves behind."""

import gc
import threading
import weakref

import pytest

from workbench.jobs import USE_REMEMBERED_S, Board, Job
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


def test_a_job_that_has_ended_and_that_nobody_holds_is_forgotten_with_its_result():
    class Result:
        pass

    board = Board()
    job = board.submit("one", "me", lambda _: Result())
    assert job.wait(WAIT_S) and board.get(job.id, "me") is job
    name, result = job.id, weakref.ref(job.result)
    assert runs_on(board)  # the worker has put the job down
    del job
    gc.collect()
    assert board.get(name, "me") is None and result() is None


class Unreadable(Exception):
    def __str__(self):
        raise ValueError("no text")


def raising(error):
    def call(*_):
        raise error
    return call


def runs_on(board):
    after = board.submit("after", "me", gated_work(1, open_gate()))
    return after.wait(WAIT_S) and after.state == "done"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("error", [RuntimeError("first\nsecond"), BadInput("no"), Unreadable(), SystemExit(3), KeyboardInterrupt()])
@pytest.mark.parametrize(("work", "state"), [(gated_work(1, open_gate()), "done"), (raising(BadInput("too small")), "failed")])
def test_a_fault_after_the_work_is_the_failure_of_that_job_and_the_next_one_still_runs(error, work, state):
    board, told = Board(), []

    def on_finish(ending, _):
        told.append(ending)
        raise error

    job = board.submit("work", "me", work, on_finish)
    assert job.wait(WAIT_S), "whoever waits for it is not left alone"
    assert told == [state] and (job.state, job.active) == ("failed", False)
    after_it = f"work failed after its work had ended: {type(error).__name__}: "
    assert job.error == "too small" if state == "failed" else job.error.startswith(after_it)
    assert "\n" not in job.error
    assert runs_on(board)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(("error", "line"), [
    (SystemExit(3), "work failed: SystemExit: 3"),
    (KeyboardInterrupt(), "work failed: KeyboardInterrupt: no message"),
    (GeneratorExit("closed"), "work failed: GeneratorExit: closed"),
    (Unreadable(), "work failed: Unreadable: its message cannot be read (ValueError)"),
])
def test_work_that_ends_its_thread_is_a_failure_and_the_next_one_still_runs(error, line):
    board, endings = Board(), []
    job = board.submit("work", "me", raising(error), lambda *ending: endings.append(ending))
    assert job.wait(WAIT_S)
    assert (job.state, job.error) == ("failed", line) and endings == [("failed", line)]
    assert runs_on(board)


def test_a_waiting_job_whose_end_cannot_be_told_is_cancelled_without_an_error_to_whoever_cancels():
    board, gate, started = Board(), threading.Event(), threading.Event()
    hold = board.submit("hold", "me", gated_work(1, gate, started))
    assert started.wait(WAIT_S)
    waiting = board.submit("work", "me", gated_work(1, gate), raising(RuntimeError("no room")))
    board.cancel(waiting)
    assert waiting.state == "failed" and waiting.error == "work failed after its work had ended: RuntimeError: no room"
    gate.set()
    assert hold.wait(WAIT_S) and runs_on(board)


def test_a_worker_that_could_not_be_started_is_started_for_the_next_job(monkeypatch):
    board = Board()
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", raising(RuntimeError("can't start new thread")))
        with pytest.raises(RuntimeError, match="can't start"):
            board.submit("work", "me", gated_work(1, open_gate()))
    assert runs_on(board)


def test_what_owners_used_is_forgotten_with_time(monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr("workbench.jobs.time.monotonic", lambda: clock[0])
    board = Board()
    for number in range(20):
        assert board.submit("once", f"visitor {number}", gated_work(1, open_gate())).wait(WAIT_S)
        clock[0] += USE_REMEMBERED_S / 4
    assert len(board._used) <= 6


class SlowCount(int):
    """Whoever adds to it gives the others time to do the same."""

    def __add__(self, other):
        threading.Event().wait(0.001)
        return SlowCount(int(self) + other)


def test_every_change_counts_though_several_threads_make_them():
    """Reports come from a stage's threads, cancelling from a request."""
    job = Job("work", "me", gated_work(1, open_gate()), None)
    job._version = SlowCount(0)
    threads = [threading.Thread(target=lambda: [job.report(Progress(stage="count", done=1, total=2)) for _ in range(20)]) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for thread in (threads := [threading.Thread(target=job.cancel) for _ in range(20)]):
        thread.start()
    for thread in threads:
        thread.join()
    assert job.snapshot().version == 80


def test_a_version_is_never_seen_with_what_was_before_it():
    """A page that has drawn a version does not draw it again: it must not be told of the version before the change that made it."""
    class Slow(Job):
        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            if name == "state" and value == "done":
                reader.start()
                reader.join(0.2)  # it may read now only where it would read half of the change

    job, seen = Slow("work", "me", lambda report: None, None), []
    reader = threading.Thread(target=lambda: seen.append(job.snapshot()))
    job.run()
    reader.join(WAIT_S)
    assert (seen[0].state, seen[0].version) == ("done", job.snapshot().version)
