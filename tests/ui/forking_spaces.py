"""A stand-in for the `spaces` package on ZeroGPU, after what its wrappers do: a decorated generator runs in a forked process,
arguments and yielded values are pickled, an exception that escapes arrives as its class's name alone, and closing the generator is
noticed at the worker's next yield. One fork per call; the real one may use a worker again."""

import multiprocessing
import pickle
from functools import wraps

FORK = multiprocessing.get_context("fork")
durations = []


def GPU(task=None, *, duration=60):
    if task is None:
        return lambda function: GPU(function, duration=duration)
    durations.append(duration)

    @wraps(task)
    def in_worker(*args):
        call, stopped = pickle.dumps(args), FORK.Event()
        mine, theirs = FORK.Pipe()
        process = FORK.Process(target=_work, args=(task, call, theirs, stopped), daemon=True)
        process.start()
        theirs.close()
        try:
            while True:
                try:
                    kind, value = pickle.loads(mine.recv_bytes())
                except EOFError:
                    raise RuntimeError("GPU task aborted") from None
                if kind == "end":
                    return
                if kind == "raised":
                    raise RuntimeError(value)
                yield value
        finally:
            stopped.set()
            process.join(20)
            assert process.exitcode == 0, "the worker did not stop"

    return in_worker


def _work(task, call, pipe, stopped):
    stream = task(*pickle.loads(call))
    try:
        while True:
            value = next(stream)
            if stopped.is_set():
                stream.close()
                return
            pipe.send_bytes(pickle.dumps(("yielded", value)))
    except StopIteration:
        pipe.send_bytes(pickle.dumps(("end", None)))
    except Exception as error:
        pipe.send_bytes(pickle.dumps(("raised", type(error).__name__)))
