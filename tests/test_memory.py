"""Free memory: a machine's, and within control groups of both versions, where file pages that nobody uses count as free."""

import gc
import weakref

import pytest

from workbench import memory, model_info
from workbench.options import BadInput

MB = 2**20
UNLIMITED_V1 = 0x7FFFFFFFFFFFF000


@pytest.fixture
def machine(tmp_path):
    """A made-up system: machine(available_mb, line of /proc/self/cgroup, {folder: {file: text}})."""
    def make(available_mb, group="", files=None):
        for name, text in {"proc/meminfo": f"MemTotal: 99 kB\nMemAvailable: {available_mb * 1024} kB\n", "proc/self/cgroup": group}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        for folder, texts in (files or {}).items():
            (tmp_path / "sys/fs/cgroup" / folder).mkdir(parents=True, exist_ok=True)
            for name, text in texts.items():
                (tmp_path / "sys/fs/cgroup" / folder / name).write_text(str(text))
        return tmp_path
    return make


def v2(limit_mb, used_mb, idle_mb, more=""):
    limit = limit_mb if limit_mb == "max" else limit_mb * MB
    return {"memory.max": f"{limit}\n", "memory.current": f"{used_mb * MB}\n",
            "memory.stat": f"anon 5\nfile {used_mb * MB}\nactive_file {3 * MB}\ninactive_file {idle_mb * MB}\nshmem {7 * MB}\n{more}"}


def v1(limit_bytes, used_mb, idle_mb):
    stat = f"cache 9\ninactive_file 4096\ntotal_inactive_file {idle_mb * MB}\ntotal_active_file 8192\n"
    return {"memory.limit_in_bytes": limit_bytes, "memory.usage_in_bytes": used_mb * MB, "memory.stat": stat}


@pytest.mark.parametrize(("available_mb", "group", "files", "free_mb"), [
    (900, "", {}, 900),
    (900, "0::/\n", {"": v2(1000, 800, 300)}, 500),
    (400, "0::/\n", {"": v2(1000, 800, 300)}, 400),
    (900, "0::/\n", {"": v2("max", 800, 300)}, 900),
    (900, "0::/\n", {"": v2(1000, 1100, 20)}, 0),
    (900, "0::/app/job\n", {"app/job": v2("max", 10, 0), "app": v2(600, 350, 50), "": {}}, 300),
    (900, "0::/app/job\n", {"app/job": v2(200, 150, 100), "app": v2(600, 350, 50)}, 150),
    (900, "0::/of/the/host\n", {"": v2(1000, 800, 300)}, 500),
    (900, "5:cpu,cpuacct:/x\n4:memory:/\n", {"memory": v1(1000 * MB, 800, 300)}, 500),
    (900, "4:memory:/docker/1f\n", {"memory": v1(1000 * MB, 800, 300)}, 500),
    (900, "4:memory:/a/b\n", {"memory/a/b": v1(UNLIMITED_V1, 800, 300), "memory/a": v1(700 * MB, 600, 0)}, 100),
    (900, "4:memory:/\n", {"memory": v1(UNLIMITED_V1, 800, 300)}, 900),
    (900, "0::/\n", {"": {"memory.max": 1000 * MB, "memory.current": 800 * MB}}, 200),
], ids=["no group", "v2", "v2, the machine has less", "v2 without a limit", "v2, over its limit", "v2, the limit is around",
        "v2, the limit within", "v2 in a container that sees its path outside", "v1", "v1 in a container",
        "v1, the limit is around", "v1 without a limit", "v2 without memory.stat"])
def test_free_memory_within_groups(machine, available_mb, group, files, free_mb):
    assert memory.free_bytes(machine(available_mb, group, files)) == free_mb * MB


def test_a_system_that_does_not_say(tmp_path):
    assert memory.free_bytes(tmp_path) is None


def test_what_is_held_by_itself_alone_is_given_back():
    class Circle:
        pass

    circle = Circle()
    circle.itself, watched = circle, weakref.ref(circle)
    gc.disable()
    try:
        del circle
        assert watched() is not None
        memory.reclaim()
        assert watched() is None
    finally:
        gc.enable()


def test_a_model_is_refused_only_after_what_nobody_holds_is_given_back(monkeypatch):
    free = [500]
    known = model_info.ModelInfo(source="maker/model", kind="hub id", family="F", parameters=1000, all_parameters=1000)
    monkeypatch.setattr(model_info, "free_bytes", lambda: free[-1])
    monkeypatch.setattr(model_info, "reclaim", lambda: free.append(10**9))
    model_info.require_room(known)
    assert len(free) == 2
    monkeypatch.setattr(model_info, "reclaim", lambda: None)
    free.append(500)
    with pytest.raises(BadInput, match="maker/model needs about"):
        model_info.require_room(known)
