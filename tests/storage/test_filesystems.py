"""Network file systems: recognised from mountinfo, refused, read only when asked."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from storage.child_processes import numbered, write

from lmdbcache import EmbeddingCache
from lmdbcache.errors import ReadOnlyCacheError, StorageError
from lmdbcache.storage import NETWORK_VARIABLE, filesystems
from lmdbcache.storage.filesystems import find_mount, parse_mounts

MOUNTINFO = rb"""21 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
22 21 0:5 / /dev rw - devtmpfs devtmpfs rw
30 21 0:40 / /home rw,relatime shared:9 master:1 - nfs4 server:/export/home rw,vers=4.2
31 30 0:41 / /home/ann rw - tmpfs tmpfs rw
32 21 0:42 / /mnt/with\040space\134and\011tab rw - cifs //server/a\040b rw
33 21 0:43 / /data rw - ext4 /dev/vdb rw
34 21 0:44 / /data rw - lustre mgs@tcp:/scratch rw
35 21 0:45 / /caf\303\251 rw - fuse.sshfs ann@host:/ rw
36 21 0:46 / /shared rw - virtiofs host rw
37 21 0:47 / /var/lib/docker rw - overlay overlay rw,lowerdir=/a
38 21 0:48 / /usb rw - fuseblk /dev/sdb1 rw
39 21 0:49 / /merged rw - fuse.mergerfs a:b rw
a line that is cut
40 21 0:50 / /late rw -
"""


@pytest.mark.parametrize(
    ("path", "kind", "network"),
    [
        ("/", "ext4", False),
        ("/homework/x", "ext4", False),
        ("/home", "nfs4", True),
        ("/home/bob/cache", "nfs4", True),
        ("/home/ann/cache", "tmpfs", False),
        ("/mnt/with space\\and\ttab/x", "cifs", True),
        ("/data/x", "lustre", True),  # the later of two at one place
        ("/café/x", "fuse.sshfs", True),
        ("/shared/x", "virtiofs", True),
        ("/var/lib/docker/x", "overlay", False),
        ("/usb/x", "fuseblk", False),
        ("/merged/x", "fuse.mergerfs", False),
        ("/late/x", "ext4", False),
    ],
)
def test_longest_and_latest_mount_wins(path, kind, network):
    """A path lies on the deepest mount above it, with octal escapes undone."""
    mount = find_mount(parse_mounts(MOUNTINFO), path)
    assert mount is not None
    assert (mount.kind, mount.is_network) == (kind, network)


@pytest.mark.parametrize("kind", ["9p", "virtiofs", "overlay", "ext4", "btrfs", "xfs", "zfs"])
def test_root_of_a_virtual_machine_is_its_own_disk(kind):
    """What a container or a virtual machine has as its root is accepted; NFS isn't even there."""
    (mount,) = parse_mounts(f"1 0 0:1 / / rw - {kind} none rw".encode())
    assert not mount.is_network
    (mount,) = parse_mounts(b"1 0 0:1 / / rw - nfs server:/ rw")
    assert mount.is_network


def test_this_machine_is_accepted(tmp_path):
    """Where the tests run nothing is refused, whatever is below a folder that doesn't exist yet."""
    filesystems.check_local_for_writing(tmp_path / "not" / "made" / "yet")
    assert filesystems.check_local_for_reading(tmp_path)


def test_mounts_are_read_once(tmp_path, monkeypatch):
    """The second opening of a store asks the kernel for no list of mounts."""
    filesystems.mount_of(tmp_path)
    monkeypatch.setattr(filesystems, "_statfs", None)
    monkeypatch.setattr(Path, "read_bytes", None)
    filesystems.check_local_for_writing(tmp_path)


@pytest.fixture
def network(filled, monkeypatch):
    """The filled cache, on what mountinfo calls NFS."""
    root = os.path.realpath(filled.root)
    text = f"1 0 0:1 / / rw - ext4 disk rw\n2 1 0:2 / {root} rw - nfs4 server:/x rw\n"
    read_bytes = Path.read_bytes

    def mountinfo(path):
        return text.encode() if str(path) == "/proc/self/mountinfo" else read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", mountinfo)
    monkeypatch.setattr(filesystems, "_statfs", None)
    monkeypatch.delenv(NETWORK_VARIABLE, raising=False)
    caches = (filesystems._mount_of, filesystems._warn)
    for cache in caches:
        cache.cache_clear()
    yield filled
    for cache in caches:
        cache.cache_clear()


def test_network_file_system_is_refused(network, config, embeddings):
    """Every use names the mount, its type and what to do; nothing is written."""
    before = sorted(network.root.rglob("*"))
    for use in (
        lambda: network.writer(config),
        lambda: network.writer(config.replace(duration=9)),
        lambda: network.check_writable(config),
        lambda: network.compact(config),
    ):
        with pytest.raises(
            ReadOnlyCacheError, match=r"nfs4.*Put the cache root on a local disk"
        ) as caught:
            use()
        assert "\n" not in str(caught.value)
    for use in (lambda: len(network.reader(config)), lambda: network.info(config)):
        with pytest.raises(StorageError, match=r"nfs4.*Copy the store to a local disk"):
            use()
    assert sorted(network.root.rglob("*")) == before


def test_network_file_system_is_read_without_locks_when_asked(
    network, config, embeddings, monkeypatch, caplog
):
    """With the variable set it is read, with one warning for a mount, and takes no lock."""
    monkeypatch.setenv(NETWORK_VARIABLE, "1")
    with caplog.at_level(logging.WARNING), network.reader(config) as reader:
        assert reader == embeddings
        assert not reader._holder.environment.env.flags()["lock"]
        with EmbeddingCache(network.root).reader(config) as another:
            assert another.get_batch(list(embeddings)).shape == (20, 8)
    assert network.reader(config) == embeddings
    (record,) = caplog.records
    assert "nfs4" in record.getMessage()
    assert str(network.root) in record.getMessage()
    write(network.root, config, numbered(0, 3, 8))
    assert len(network.reader(config)) == len(embeddings) + 3


def test_no_mountinfo_recognises_nothing(filled, config, monkeypatch):
    """On systems without /proc a store is used as ever."""

    read_bytes = Path.read_bytes

    def without_proc(path):
        if path.is_relative_to("/proc"):
            raise FileNotFoundError(path)
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", without_proc)
    monkeypatch.setattr(filesystems, "_statfs", None)
    filesystems._mount_of.cache_clear()
    write(filled.root, config, {"new:x": np.ones(8, np.float32)})
    assert "new:x" in filled.reader(config)
    filesystems._mount_of.cache_clear()


def test_mount_over_a_folder_is_noticed(filled, config, embeddings, tmp_path):
    """A mount made later at the same place is looked up again: the device is another."""
    code = """
import ctypes, os, subprocess, sys
from pathlib import Path
from lmdbcache.storage import filesystems
place = Path(sys.argv[1])
seen = []
lookup = filesystems.find_mount
filesystems.find_mount = lambda *args: seen.append(lookup(*args)) or seen[-1]
filesystems.mount_of(place)
if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(place)], capture_output=True).returncode:
    sys.exit(5)
try:
    filesystems.mount_of(place)
    filesystems.mount_of(place)
finally:
    subprocess.run(["umount", "-l", str(place)], check=True)
print([mount.kind for mount in seen], seen[-1].point == os.path.realpath(place))
"""
    if os.getuid() != 0:
        pytest.skip("mounting isn't allowed here")
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], check=False, capture_output=True, text=True
    )
    if done.returncode == 5:
        pytest.skip("mounting isn't allowed here")
    assert done.returncode == 0, done.stderr
    kinds, at_place = done.stdout.strip().rsplit(" ", 1)
    assert kinds.endswith("'tmpfs']")
    assert kinds.count("'") == 4
    assert at_place == "True"
