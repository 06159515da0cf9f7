"""Settings of the libraries under torch."""

import os
import sys
import threading

import pytest
import torch

from workbench import tuning


def in_a_thread(work):
    """What `work` gives in a new thread, and how many threads the process has right after it, the thread still there."""
    found = []

    def run():
        found.append(work())
        found.append(len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 0)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found


def in_parallel():
    """More elements than torch leaves to one thread."""
    torch.randn(1 << 20).mul(2).sum()
    return torch.get_num_threads()


def single_threaded():
    with tuning.single_threaded():
        return in_parallel()


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_only_the_thread_that_asks_computes_alone(two_threads):
    in_parallel()
    assert in_a_thread(single_threaded)[0] == 1 and single_threaded() == 1
    assert torch.get_num_threads() == 2 and in_a_thread(in_parallel)[0] == 2


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_computing_alone_starts_no_helpers(two_threads):
    in_parallel()
    _, beside = in_a_thread(in_parallel)
    _, alone_beside = in_a_thread(single_threaded)
    assert alone_beside == beside - 1
