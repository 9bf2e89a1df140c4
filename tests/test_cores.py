"""The number of cores that a process may use, on made-up control groups and on those of this machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from broker.cores import MOST_SENDERS, default_threads, usable_cores


@pytest.fixture(autouse=True)
def twelve_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the affinity be of twelve cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))


def machine(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    """Make /proc/self/cgroup and the files of groups below `root`."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V2 = "0::/system.slice/wsbroker.service\n"
V1 = "11:memory:/docker/1\n4:cpu,cpuacct:/docker/1\n2:cpuset:/\n"


@pytest.mark.parametrize(
    ("cgroup", "files", "cores"),
    [
        pytest.param(V2, {}, 12, id="no quota"),
        pytest.param(V2, {"system.slice/wsbroker.service/cpu.max": "max 100000\n"}, 12, id="v2 without"),
        pytest.param(V2, {"system.slice/wsbroker.service/cpu.max": "300000 100000\n"}, 3, id="v2"),
        pytest.param(V2, {"system.slice/cpu.max": "150000 100000\n"}, 1, id="v2 of a group above, rounded down"),
        pytest.param(V2, {"cpu.max": "20000 100000\n"}, 1, id="v2 less than a core"),
        pytest.param("0::/\n", {"cpu.max": "400000 100000\n"}, 4, id="v2 within a container"),
        pytest.param("0::/../outside\n", {"cpu.max": "400000 100000\n"}, 4, id="v2 with a path outside"),
        pytest.param(V2, {"cpu.max": "9900000 100000\n"}, 12, id="v2 more than there are"),
        pytest.param(V2, {"cpu.max": ""}, 12, id="v2 empty"),
        pytest.param(V2, {"cpu.max": "100000 0\n"}, 12, id="v2 no period"),
        pytest.param(
            V1,
            {"cpu/docker/1/cpu.cfs_quota_us": "200000\n", "cpu/docker/1/cpu.cfs_period_us": "100000\n"},
            2,
            id="v1",
        ),
        pytest.param(
            V1, {"cpu/docker/1/cpu.cfs_quota_us": "-1\n", "cpu/docker/1/cpu.cfs_period_us": "100000\n"}, 12, id="v1 -1"
        ),
        pytest.param(
            V1, {"memory/docker/1/cpu.cfs_quota_us": "1\n", "cpu.max": "100000 100000\n"}, 12, id="other controllers"
        ),
        pytest.param("rubbish", {"cpu.max": "100000 100000\n"}, 1, id="a line of no form"),
    ],
)
def test_quota_bounds_the_cores(tmp_path: Path, cgroup: str, files: dict[str, str], cores: int) -> None:
    assert usable_cores(machine(tmp_path, cgroup, files)) == cores


def test_machine_without_control_groups_has_the_cores_of_its_affinity(tmp_path: Path) -> None:
    assert usable_cores(tmp_path) == 12


def test_default_is_at_most_eight() -> None:
    assert 1 <= default_threads() <= MOST_SENDERS == 8
