"""What only POSIX systems have is asked for where it is there, and done without elsewhere: the other systems are made up here."""

import ast
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from workbench import bench, runs, tuning

ROOT = Path(__file__).resolve().parents[1]
POSIX_ONLY = {"resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "syslog", "posix", "readline", "curses"}
POSIX_CALLS = {"fork", "forkpty", "killpg", "getuid", "geteuid", "sched_getaffinity", "sched_setaffinity", "setsid", "mkfifo", "sysconf",
               "getloadavg", "nice", "wait", "waitpid", "fchmod", "sync", "statvfs", "uname", "pread"}
SOURCES = [*ROOT.glob("workbench/**/*.py"), *ROOT.glob("kernels/**/*.py"), ROOT / "app.py"]


def test_peak_memory_is_what_the_system_says():
    held = bytearray(b"x") * 50_000_000
    assert len(held) < bench.peak_process_bytes() < 1e12
    if sys.platform == "linux":
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
        assert bench.peak_process_bytes() == pytest.approx(int(line.split()[1]) * 1024, rel=0.05)


def test_peak_memory_in_the_units_of_each_system(monkeypatch):
    asked = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: SimpleNamespace(ru_maxrss=7))
    monkeypatch.setitem(sys.modules, "resource", asked)
    for platform, size in (("linux", 7 * 1024), ("darwin", 7)):
        monkeypatch.setattr(bench.sys, "platform", platform)
        assert bench.peak_process_bytes() == size
    monkeypatch.setitem(sys.modules, "resource", None)
    assert bench.peak_process_bytes() is None


def test_no_module_needs_posix_to_be_imported():
    """Imports of what Windows lacks are inside functions, guarded; nothing calls what `os` has only on POSIX."""
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(ast.Module(body=[n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)], type_ignores=[])):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", "")]
            assert not POSIX_ONLY & set(names), f"{path.name} imports {names}"
        called = {node.attr for node in ast.walk(tree)
                  if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os"}
        assert not POSIX_CALLS & called, f"{path.name} calls {POSIX_CALLS & called}"


def test_runs_are_kept_where_folders_cannot_be_opened_and_processes_not_asked(tmp_path, monkeypatch):
    opened = os.open

    def like_windows(path, flags, *rest, **more):
        if Path(path).is_dir():
            raise PermissionError(13, "Permission denied")
        assert flags & os.O_RDWR, "a file that is open for reading cannot be synced"
        return opened(path, flags, *rest, **more)

    monkeypatch.setattr(runs, "POSIX", False)
    monkeypatch.setattr(os, "open", like_windows)
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("signal 0 is Ctrl-C on Windows"))
    run = runs.Run(tmp_path / "run")
    run.save_json("note", "ab", {"a": 1})
    left = run.folder / ".999999-ab.tmp"
    left.write_text("half")
    assert runs.Run(run.folder).load_json("note", "ab") == {"a": 1} and left.exists()


def test_without_glibc_nothing_is_tuned_and_nothing_fails(monkeypatch):
    def missing(name):
        raise FileNotFoundError(f"Could not find module {name!r}")

    monkeypatch.setattr(tuning.ctypes, "CDLL", missing)
    assert tuning.keep_large_blocks() is False
    tuning.tune()
