"""How much memory a container or a batch system's job leaves to this process."""

from __future__ import annotations

import pytest

from lmdbcache.machine import cgroup_limit, memory_limit

NO_LIMIT = 1 << 62
GIB = 1 << 30


@pytest.fixture
def write_groups(tmp_path):
    def write(version, limits):
        """Limits by group; the name of the file follows from the version."""
        top = tmp_path / "mount" / ("memory" if version == 1 else "")
        name = "memory.limit_in_bytes" if version == 1 else "memory.max"
        for group, text in limits.items():
            folder = top / group
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(f"{text}\n")
        membership = {1: "9:name=systemd:/x\n4:cpu,memory:/job/step\n", 2: "0::/job/step\n"}
        (tmp_path / "cgroup").write_text(membership[version])
        return cgroup_limit(tmp_path / "cgroup", tmp_path / "mount")

    return write


@pytest.mark.parametrize("version", [1, 2])
def test_the_lowest_limit_on_the_way_up_counts(write_groups, version):
    """A job's limit binds its steps, which have none of their own, and the other way round."""
    assert write_groups(version, {"": "max", "job": GIB, "job/step": "max"}) == GIB
    assert write_groups(version, {"job/step": GIB // 2}) == GIB // 2
    assert write_groups(version, {"job/step": 9223372036854771712}) == GIB


def test_without_limits_there_is_none(tmp_path, write_groups):
    """No file, no group, no number: no limit, and no error."""
    assert cgroup_limit(tmp_path / "none", tmp_path) == NO_LIMIT
    assert write_groups(2, {"": "max"}) == NO_LIMIT
    (tmp_path / "cgroup").write_bytes(b"\xff nonsense\n0::/../../etc\n:\n")
    assert cgroup_limit(tmp_path / "cgroup", tmp_path) == NO_LIMIT
    (tmp_path / "cgroup").write_text("0::/../../etc\n4:memory\n\n")
    assert cgroup_limit(tmp_path / "cgroup", tmp_path / "mount") == NO_LIMIT


def test_this_machine_has_a_limit():
    """The machine that runs this has some memory, and not more than any machine."""
    assert 64 << 20 < memory_limit() < 1 << 50
