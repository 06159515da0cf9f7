"""How much memory can be had: by the machine, and by the control groups that a container or a service runs in.

A group's usage counts the file pages that its processes have read, weights for instance. The kernel takes those that nobody has used
lately (`inactive_file`) back before it refuses anything, so they are free; pages of tmpfs are no such pages, nor are active ones counted
here. That is the working set of the kernel's documentation of cgroup v2 ("memory.stat") and of what container runtimes report.
"""

from __future__ import annotations

import ctypes
import gc
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True)
class _Version:
    """Where a version of control groups is mounted, and what its files are called. In version 1 `total_` counts the groups within."""

    mount: str
    limit: str
    usage: str
    idle: str


_VERSIONS = {
    2: _Version("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    1: _Version("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def free_bytes(root: Path = Path("/")) -> int | None:
    """What can be had now: of the machine's, and within the limits of this process's control group and of those around it. None where
    the system does not say."""
    available = _available_bytes(root / "proc/meminfo")
    within = [free for version, place in _places(root) if (free := _free_in_group(place, version)) is not None]
    return None if available is None else min([available, *within])


def reclaim() -> None:
    """Give back what nobody holds any more: models refer to themselves in circles, and the allocator keeps the blocks they had."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return  # no glibc, whose allocator keeps large blocks here (`tuning.py`)


def _available_bytes(meminfo: Path) -> int | None:
    try:
        return next(1024 * int(line.split()[1]) for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None


def _places(root: Path) -> list[tuple[_Version, Path]]:
    """The folders of this process's groups and of all around them. A container sees its own at the mount, under whatever path it has
    outside."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    paths = {2: "/", 1: "/"}
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            paths[2] = path
        elif "memory" in controllers.split(","):
            paths[1] = path
    found = []
    for number, path in paths.items():
        version, inside = _VERSIONS[number], PurePosixPath(path.strip("/"))
        found += [(version, root / version.mount / part) for part in (inside, *inside.parents)]
    return [(version, place) for version, place in dict.fromkeys(found) if place.is_dir()]


def _free_in_group(place: Path, version: _Version) -> int | None:
    """What a group may still take; None where it has no limit or does not count."""
    try:
        left = int((place / version.limit).read_text()) - int((place / version.usage).read_text())
    except (OSError, ValueError):  # "max": no limit is set
        return None
    return max(0, left + _idle_bytes(place / "memory.stat", version.idle))


def _idle_bytes(stat: Path, name: str) -> int:
    try:
        return next(int(line.split()[1]) for line in stat.read_text().splitlines() if line.split()[:1] == [name])
    except (OSError, StopIteration, ValueError, IndexError):
        return 0
