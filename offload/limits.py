"""How much host memory the system really grants: RAM, control groups, commit and locking limits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil  # type: ignore[import-untyped]

from lowvram.offload.io import read_kernel_text

_UNLIMITED = 1 << 60
"""Control groups of version 1 write "no limit" as a number near 2^63."""


@dataclass(frozen=True, slots=True)
class HostLimits:
    """Bytes. None: the system sets no such limit, or does not tell."""

    total: int
    """RAM of the machine."""
    available: int
    """RAM that can be had without swapping, as the whole system sees it."""
    group_limit: int | None = None
    """The least limit of this process's memory control group and those above it."""
    group_room: int | None = None
    """What that group may still take; the file cache counted against it is given back when needed."""
    commit_room: int | None = None
    """What may still be promised to programs, where the system counts promises (Windows, strict overcommit)."""
    locked_limit: int | None = None
    """What a process may lock with `mlock`. Pinning through the CUDA driver does not count against it."""
    wsl: bool = False
    """Whether this is Linux inside Windows, where about half of the RAM can be pinned."""

    @property
    def usable(self) -> int:
        """What this process can take now."""
        rooms = (self.available, self.group_room, self.commit_room)
        return max(0, min(room for room in rooms if room is not None))


def host_limits(root: Path = Path("/")) -> HostLimits:
    """The limits of this process. `root` is where `proc` and `sys` lie."""
    memory = psutil.virtual_memory()
    limit, room = _group(root)
    version = read_kernel_text(root / "proc" / "version") or ""
    return HostLimits(
        total=int(memory.total),
        available=int(memory.available),
        group_limit=limit,
        group_room=room,
        commit_room=_commit_room(root),
        locked_limit=_locked_limit(),
        wsl="microsoft" in version.lower(),
    )


def _group(root: Path) -> tuple[int | None, int | None]:
    """Limit and room of the group with the least room among this process's group and those above it."""
    found: list[tuple[int, int]] = []
    for folder, limit_name, usage_name, cache_name in _group_folders(root):
        limit, usage = _number(folder / limit_name), _number(folder / usage_name)
        if limit is None or usage is None or limit >= _UNLIMITED:
            continue
        cache = _table(folder / "memory.stat").get(cache_name, 0)
        found.append((limit - max(0, usage - cache), limit))
    return (min(found)[1], min(found)[0]) if found else (None, None)


def _group_folders(root: Path) -> Iterator[tuple[Path, str, str, str]]:
    """Every folder that may hold limits: version 2 is one tree, version 1 has a tree for memory alone."""
    mounted = root / "sys" / "fs" / "cgroup"
    for line in (read_kernel_text(root / "proc" / "self" / "cgroup") or "").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            tree, names = mounted, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            tree = mounted / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # Inside a container the path may be that of the host: what cannot be found is passed over.
        inside = PurePosixPath(path.lstrip("/"))
        for part in (inside, *inside.parents):
            yield (tree / part, *names)


def _commit_room(root: Path) -> int | None:
    if os.name == "nt":
        swap = psutil.swap_memory()
        return int(psutil.virtual_memory().available + swap.free)
    strict = _number(root / "proc" / "sys" / "vm" / "overcommit_memory") == 2
    table = _table(root / "proc" / "meminfo")
    if not strict or "CommitLimit" not in table or "Committed_AS" not in table:
        return None
    return (table["CommitLimit"] - table["Committed_AS"]) * 1024


def _locked_limit() -> int | None:
    if os.name == "nt":
        return None
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else int(soft)


def _number(path: Path) -> int | None:
    text = (read_kernel_text(path) or "").strip()
    return int(text) if text.isdigit() else None


def _table(path: Path) -> dict[str, int]:
    """Lines "name 123" or "Name:  123 kB" by name."""
    rows = (line.replace(":", " ").split() for line in (read_kernel_text(path) or "").splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) >= 2 and row[1].isdigit()}
