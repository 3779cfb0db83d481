"""Each thing that the doctor looks at, sound and not."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import stat
import time

import numpy as np
import pytest
from small_disks import fill, small_disk
from storage.child_processes import NOBODY, hold, in_fork, let_go, peer_process, write

from lmdbcache import EmbeddingCache
from lmdbcache.cli.doctor import machine, root, software
from lmdbcache.cli.doctor.memory import memory_of
from lmdbcache.cli.doctor.stores import check_stores, newest_file
from lmdbcache.errors import StorageError
from lmdbcache.storage import Mount, write_lock


def by_subject(findings):
    found = {}
    for finding in findings:
        found.setdefault(finding.subject, []).append(finding)
        assert (finding.remedy != "") or finding.level != "problem"
    return found


# ---- software


def check_audio(monkeypatch, tmp_path, **modules):
    """What is said of audio packages that are these files."""
    for name, code in modules.items():
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(software, "_AUDIO", tuple(modules))
    monkeypatch.setattr(software, "_version", lambda _: "1.0")
    return {finding.subject: finding for finding in software._check_audio()}


def test_a_torchaudio_that_refuses_its_torch(monkeypatch, tmp_path):
    """The import is tried in a process of its own; the remedy names the versions that fit."""
    refusal = "raise RuntimeError('built for CUDA 13.0')"
    found = check_audio(monkeypatch, tmp_path, torchaudio=refusal, soxr="")
    assert found["soxr"].level == "ok"
    assert found["torchaudio"].level == "problem"
    assert "built for CUDA 13.0" in found["torchaudio"].text
    assert "torch>=2.11,<2.15" in found["torchaudio"].remedy


def test_packages_that_end_the_process(monkeypatch, tmp_path):
    """A crash in an import is a problem with its exit code, not the doctor's end."""
    deadly = "import os, sys\nsys.stderr.write('symbol lookup error\\n')\nos._exit(127)"
    found = check_audio(monkeypatch, tmp_path, torchaudio=deadly)
    assert "exit code 127: symbol lookup error" in found["torchaudio"].text


def test_what_torch_says_of_the_gpu(monkeypatch, tmp_path):
    """GPUs are named; none is a note, as models run on the CPU."""
    torch = (
        "class version: cuda = {built!r}\n"
        "class cuda:\n"
        "    is_available = staticmethod(lambda: {there})\n"
        "    device_count = staticmethod(lambda: 1)\n"
        "    get_device_name = staticmethod(lambda number: 'H100')\n"
    )
    for built, there, level in (
        ("13.0", True, "ok"),
        ("13.0", False, "note"),
        (None, False, "note"),
    ):
        code = torch.format(built=built, there=there)
        found = check_audio(monkeypatch, tmp_path, torch=code)
        assert found["cuda"].level == level
        assert ("H100" in found["cuda"].text) is there


def test_missing_packages_are_notes(monkeypatch):
    """Without the audio extra everything but extraction works."""
    monkeypatch.setattr(software, "_AUDIO", ("no_such_package",))
    found = by_subject(software.check_software())
    (missing,) = found["no_such_package"]
    assert missing.level == "note"
    assert "lmdbcache[audio]" in missing.remedy
    assert all(f.level == "ok" for name in ("python", "lmdb", "numpy") for f in found[name])


# ---- machine


def test_limits_of_the_shell(monkeypatch):
    """Little address space, few files, more threads than cores: notes with a remedy."""
    monkeypatch.setenv("OMP_NUM_THREADS", "512")

    def limited():
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 4096))
        return [finding.to_dict() for finding in machine.check_machine()]

    found = {finding["subject"]: finding for finding in in_fork(limited)}
    for subject, remedy in (
        ("ulimit -v", "unlimited"),
        ("ulimit -n", "ulimit -n 4096"),
        ("cores", "OMP_NUM_THREADS="),
    ):
        assert found[subject]["level"] == "note"
        assert remedy in found[subject]["remedy"]
    assert by_subject(machine.check_machine())["ulimit -v"][0].level == "ok"


def test_shared_memory(tmp_path):
    """A small /dev/shm is a note, none a problem."""
    with small_disk(tmp_path / "disk", 64) as disk:
        found = machine._shared_memory(disk)
    assert (found.level, "--shm-size" in found.remedy) == ("note", True)
    assert machine._shared_memory(tmp_path / "absent").level == "problem"
    assert machine._shared_memory(tmp_path).level == "ok"


def test_few_maps(tmp_path):
    (tmp_path / "max_map_count").write_text("1024\n")
    assert machine._max_maps(tmp_path / "max_map_count").level == "note"
    assert machine._max_maps(tmp_path / "absent") is None


def test_clock(tmp_path, monkeypatch):
    """A store from the future, and a clock before any store, are problems."""
    file = tmp_path / "data.mdb"
    file.touch()
    assert machine.check_clock(file).level == machine.check_clock(None).level == "ok"
    os.utime(file, (time.time() + 9000,) * 2)
    assert "in the future" in machine.check_clock(file).text
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert machine.check_clock(None).level == "problem"


# ---- root


def levels(folder):
    return {finding.subject: finding.level for finding in root.check_root(folder)}


def test_roots_that_are_there_and_not(tmp_path):
    """A root to be made is fine; a file in its place isn't; nothing is made."""
    assert set(levels(tmp_path).values()) == {"ok"}
    assert levels(tmp_path / "a" / "b")["root"] == "ok"
    (tmp_path / "file").touch()
    assert levels(tmp_path / "file" / "b")["root"] == "problem"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become another user")
def test_roots_of_others(tmp_path_factory):
    """Readable is a note; not readable, or nowhere to make it, a problem."""
    import tempfile

    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        for mode, path, level in (
            (0o755, folder, "note"),
            (0o700, folder, "problem"),
            (0o755, f"{folder}/new", "problem"),
        ):
            os.chmod(folder, mode)
            found = in_fork(lambda path=path: levels(root.Path(path)), user=NOBODY)
            assert found["root"] == level


def test_network_mounts(tmp_path, monkeypatch):
    """Refused is a problem; allowed by the user a note."""
    monkeypatch.setattr(root, "mount_of", lambda _: Mount("/net", "nfs4", "server:/export"))
    assert levels(tmp_path)["file system"] == "problem"
    monkeypatch.setenv("LMDBCACHE_ALLOW_NETWORK", "1")
    assert levels(tmp_path)["file system"] == "note"
    monkeypatch.setattr(root, "mount_of", lambda _: None)
    assert levels(tmp_path)["file system"] == "note"


def test_full_disks(tmp_path):
    """Less than the reserve of a commit is a problem, little a note."""
    with small_disk(tmp_path / "disk", 64) as disk:
        assert levels(disk)["free space"] == "note"
        fill(disk, 1 << 20)
        assert levels(disk)["free space"] == "problem"


@pytest.mark.parametrize(
    ("line", "level"),
    [
        ("/dev/x 4711 100000 120000 0 9 0 0 0", "ok"),
        ("/dev/x 119000* 100000 120000 0 9 0 0 0", "problem"),
        ("/dev/other 119000 100000 120000 0 9 0 0 0", None),
        ("/dev/x 119000 0 0 0 9 0 0 0", None),
        ("nonsense", None),
    ],
)
def test_quota(tmp_path, monkeypatch, line, level):
    """What the quota program prints for the root's file system; silence where it has none."""
    program = tmp_path / "quota"
    program.write_text(f"#!/bin/sh\necho 'Disk quotas for user x:'\necho '{line}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = root._quota(Mount("/", "ext4", "/dev/x"))
    assert (found.level if found else None) == level


def test_umask_of_a_group(tmp_path):
    """A group's folder and a umask that shuts it out: a note."""
    tmp_path.chmod(0o775 | stat.S_ISGID)

    def with_umask(umask):
        os.umask(umask)
        return levels(tmp_path)["umask"]

    assert in_fork(lambda: with_umask(0o022)) == "note"
    assert in_fork(lambda: with_umask(0o002)) == "ok"


# ---- stores


def test_sound_stores(filled, config):
    """One line in all; nothing is changed by the look."""
    before = sorted((path, path.stat().st_mtime_ns) for path in filled.root.rglob("data.mdb"))
    (finding,) = check_stores(filled)
    assert (finding.level, finding.text) == ("ok", "1 of 1 open and say what they hold")
    assert sorted((p, p.stat().st_mtime_ns) for p in filled.root.rglob("data.mdb")) == before
    assert filled.info(config).last_used is None
    assert newest_file(filled) == before[0][0]
    assert newest_file(EmbeddingCache("/nowhere")) is None


def test_damaged_copied_and_half_stores(filled, config, tmp_path):
    """Damage is a problem with repair; a copy a note with verify; leftovers a note with prune."""
    copy = EmbeddingCache(tmp_path / "copy")
    shutil.copytree(filled.root, copy.root)
    found = by_subject(check_stores(copy))
    assert "lmdbcache verify" in found[copy.path(config).name][0].remedy
    shutil.copytree(filled.path(config) / "gen-000001", filled.path(config) / "gen-000002")
    next(copy.path(config).glob("gen-*/data.mdb")).write_bytes(b"x" * 9000)
    (finding,) = by_subject(check_stores(copy))[copy.path(config).name]
    assert (finding.level, "lmdbcache repair" in finding.remedy) == ("problem", True)
    (finding,) = by_subject(check_stores(filled))["leftovers"]
    assert (finding.level, finding.remedy) == ("note", "lmdbcache prune --leftovers")


def test_who_uses_a_store(filled, config):
    """Writers and readers are named; slots of killed readers, too."""
    name = filled.path(config).name
    with write_lock(filled.path(config)):
        text = " ".join(finding.text for finding in by_subject(check_stores(filled))[name])
        assert f"written to now by {os.getpid()}" in text
    with peer_process() as peer, peer_process() as other:
        peer.call(hold, filled.root, config)
        other.call(hold, filled.root, config)
        text = " ".join(finding.text for finding in by_subject(check_stores(filled))[name])
        assert f"{peer.process.pid} " in text
        assert f"{other.process.pid} " in text
        assert "2 of 2048 reader slots" in text
        assert "ended" not in text
        os.kill(other.process.pid, signal.SIGKILL)
        other.process.join()
        text = " ".join(finding.text for finding in by_subject(check_stores(filled))[name])
        assert f"ended processes ({other.process.pid})" in text
        assert "ended" not in str(by_subject(check_stores(filled))[name])
        peer.call(let_go)


# ---- memory


def test_pages_of_a_store_are_not_the_process_s_own(cache, config):
    """Reading 32 MiB from a mapped store adds them to the store pages, not to the private ones."""
    values = {f"{n}:x": np.full(1 << 20, n, np.float32) for n in range(8)}
    write(cache.root, config, values)
    with peer_process() as peer:
        peer.call(len, [])
        before = memory_of(peer.process.pid)
        peer.call(hold, cache.root, config, list(values))
        after = memory_of(peer.process.pid)
        peer.call(let_go)
    assert before.store_pages == 0
    assert after.store_pages >= 32 << 20
    assert after.private - before.private < 24 << 20
    assert after.private + after.store_pages + after.shared >= after.resident


def test_memory_of_nobody():
    """No such process is an error that says so."""
    with pytest.raises(StorageError, match="no process"):
        memory_of(2**22 + 1)
