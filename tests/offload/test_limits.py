"""Host memory is what the least generous of RAM, control group and commit limit grants."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from lowvram.errors import StorageError
from lowvram.offload.direct import read_past_cache
from lowvram.offload.io import read_kernel_text
from lowvram.offload.limits import HostLimits, host_limits

GB = 10**9


def system(root: Path, texts: Mapping[str, str]) -> Path:
    for name, text in texts.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_version_2_takes_the_least_room_up_the_tree_and_gives_back_cache(tmp_path: Path) -> None:
    group = "sys/fs/cgroup"
    root = system(
        tmp_path,
        {
            "proc/self/cgroup": "0::/user/job\n",
            f"{group}/user/job/memory.max": "max\n",
            f"{group}/user/job/memory.current": "1000\n",
            f"{group}/user/memory.max": f"{4 * GB}\n",
            f"{group}/user/memory.current": f"{3 * GB}\n",
            f"{group}/user/memory.stat": f"anon {1 * GB}\ninactive_file {2 * GB}\n",
        },
    )
    limits = host_limits(root)
    assert (limits.group_limit, limits.group_room) == (4 * GB, 3 * GB)
    assert limits.usable == min(3 * GB, limits.available)


def test_version_1_is_found_where_the_container_sees_it(tmp_path: Path) -> None:
    root = system(
        tmp_path,
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/\n4:memory:/docker/abc\n0::/docker/abc\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GB}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GB}\n",
        },
    )
    assert (host_limits(root).group_limit, host_limits(root).group_room) == (2 * GB, GB)


def test_no_limit_is_no_number(tmp_path: Path) -> None:
    root = system(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "5\n",
        },
    )
    limits = host_limits(root)
    assert limits.group_limit is None and limits.group_room is None and limits.commit_room is None
    assert limits.usable == limits.available


def test_strict_overcommit_counts_promises(tmp_path: Path) -> None:
    root = system(
        tmp_path,
        {
            "proc/sys/vm/overcommit_memory": "2\n",
            "proc/meminfo": "MemTotal: 9 kB\nCommitLimit:  3000000 kB\nCommitted_AS: 1000000 kB\n",
            "proc/version": "Linux version 5.15 (Microsoft@Microsoft.com)\n",
        },
    )
    assert host_limits(root).commit_room == 2_000_000 * 1024 and host_limits(root).wsl


def test_room_is_never_negative() -> None:
    assert HostLimits(total=10, available=5, group_limit=3, group_room=-2).usable == 0


def test_this_machine_grants_something() -> None:
    assert 0 < host_limits().usable <= psutil.virtual_memory().total


def test_reading_past_the_cache_reads_the_file_once(tmp_path: Path) -> None:
    path = tmp_path / "bytes"
    path.write_bytes(bytes(40 << 20))
    assert read_past_cache(path, 1 << 30, direct=False) == 40 << 20
    assert read_past_cache(path, 1, direct=False) == 16 << 20
    assert read_past_cache(path, 1 << 30, direct=True) in (0, 40 << 20)  # 0: no direct reads here
    with pytest.raises(StorageError, match="reading failed"):
        read_past_cache(tmp_path / "none", 1, direct=False)
    assert read_kernel_text(tmp_path / "none") is None
