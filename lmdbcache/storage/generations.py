"""Which generation of a store is live, and who may change that.

A store's folder holds `CURRENT` (the live generation's name), `writer.lock` (a flock that whoever
commits, compacts or clears holds) and `gen-NNNNNN/`, each an LMDB environment with a lock file of
its own. A data file never meets another generation's lock file: LMDB keeps the number of the
newest transaction in there, and the wrong one shows an empty store.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from lmdbcache.errors import (
    CacheFullError,
    IntegrityError,
    NotRegularFileError,
    ReadOnlyCacheError,
    StorageError,
)
from lmdbcache.files import (
    check_folder,
    flocked,
    free_bytes,
    is_temporary,
    read_file,
    remove_entry,
    replace_file,
    sync_file,
)
from lmdbcache.storage.layout import (
    CURRENT_NAME,
    EXTRAS_NAME,
    GENERATION_NAME,
    STATISTICS_NAME,
    WRITER_LOCK_NAME,
)
from lmdbcache.storage.pages.commit_record import record_commit
from lmdbcache.storage.reader_slots import holders

# What a commit leaves free beyond what it writes.
RESERVE_BYTES: Final = 16 << 20
# A folder that is gone again this often after it was made can't be made.
_MOST_TRIES: Final = 1000
_MAX_NAME_BYTES: Final = 4096


def current_generation(store: Path) -> Path | None:
    """The live generation's folder, or None if nothing was ever committed here.

    Raises:
        IntegrityError: `CURRENT` doesn't name a generation.
        NotRegularFileError: `CURRENT` isn't a file, or the generation isn't a folder.
    """
    try:
        content = read_file(f"{store}/{CURRENT_NAME}", _MAX_NAME_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except NotRegularFileError:
        raise
    except OSError as error:
        raise StorageError(
            f"{store / CURRENT_NAME} can't be read ({error.strerror}). Check its permissions"
        ) from None
    name = content.decode("ascii", "replace").strip()
    if not GENERATION_NAME.fullmatch(name):
        raise IntegrityError(
            f"{store / CURRENT_NAME} holds {name[:40]!r} instead of a generation's name such as "
            "'gen-000001'. If the folder has just one gen-* folder, write its name there"
        )
    generation = store / name
    check_folder(generation)
    return generation


@contextlib.contextmanager
def write_lock(store: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the store's writer lock; waits until others have released it.

    Creates the store's folder. The lock file may be removed by whoever holds it (`remove_store`),
    so the one that was locked must still be the one in the folder.

    Raises:
        ReadOnlyCacheError: The folder can't be written.
        StorageError: Another process holds it, and waiting wasn't asked for.
    """
    while True:
        with contextlib.ExitStack() as stack:
            descriptor = _locked(store, stack, wait=wait)
            try:
                same = os.path.samestat(os.fstat(descriptor), (store / WRITER_LOCK_NAME).lstat())
            except FileNotFoundError:
                same = False
            if same:
                yield
                return


def create_generation(store: Path) -> Path:
    """Make the next generation's empty folder. The caller holds the writer lock."""
    remove_other_generations(store)
    current = current_generation(store)
    number = int(current.name.removeprefix("gen-")) + 1 if current else 1
    generation = store / f"gen-{number:06d}"
    generation.mkdir()
    return generation


def publish_generation(store: Path, generation: Path) -> None:
    """Make a generation the live one, durably and at once. The caller holds the writer lock."""
    record_commit(generation)
    sync_file(generation)
    point_at(store, generation)


def point_at(store: Path, generation: Path) -> None:
    """Write `CURRENT`, durably and at once. The caller holds the writer lock."""
    replace_file(store / CURRENT_NAME, f"{generation.name}\n".encode("ascii"), durable=True)
    sync_file(store)
    sync_file(store.parent)


def remove_other_generations(store: Path) -> None:
    """Remove generations that `CURRENT` doesn't name: a killed process left them, or they are old.

    Processes that have one mapped go on reading it; its space is freed when they close it. The
    caller holds the writer lock, so a `CURRENT` that is half written is a killed process's too.
    """
    current = current_generation(store)
    for child in store.iterdir():
        is_generation = GENERATION_NAME.fullmatch(child.name) is not None
        if (is_generation and child != current) or is_temporary(child.name, CURRENT_NAME):
            remove_entry(child)


def check_room(store: Path, needed: int, purpose: str) -> None:
    """Refuse what the disk can't hold.

    Raises:
        CacheFullError: Fewer than `needed` bytes are free.
    """
    free = free_bytes(store)
    if free < needed:
        raise CacheFullError(
            f"{store}: {free >> 20} MiB free, {purpose} needs {-(-needed >> 20)} MiB. Free space "
            "and go on; what was committed is safe"
        )


def remove_store(store: Path) -> None:
    """Remove a store. The caller holds the writer lock.

    `CURRENT` goes first: from then on there is no store, whatever else is left.
    """
    remove_entry(store / CURRENT_NAME)
    sync_file(store)
    remove_other_generations(store)
    own_folders = (STATISTICS_NAME, EXTRAS_NAME)
    for child in store.iterdir():
        is_folder = child.is_dir() and not child.is_symlink()
        if child.name in own_folders or (child.name != WRITER_LOCK_NAME and not is_folder):
            remove_entry(child)
    (store / WRITER_LOCK_NAME).unlink(missing_ok=True)
    # Another writer may have begun anew in the meantime, or a stranger keeps a file here.
    with contextlib.suppress(OSError):
        store.rmdir()


def _locked(store: Path, stack: contextlib.ExitStack, *, wait: bool) -> int:
    path = store / WRITER_LOCK_NAME
    num_tries = 0
    while True:
        num_tries += 1
        try:
            store.mkdir(parents=True, exist_ok=True)
            return stack.enter_context(flocked(path, os.O_RDWR | os.O_CREAT, wait=wait))
        except NotRegularFileError:
            raise
        except BlockingIOError:
            raise StorageError(
                f"{store} is being written to. Try again when its writer has ended"
            ) from None
        except (FileExistsError, NotADirectoryError) as error:
            raise ReadOnlyCacheError(
                f"{error.filename or store} is a file where a folder is needed. "
                "Choose another cache root"
            ) from None
        except OSError as error:
            if error.errno == errno.ENOENT and num_tries < _MOST_TRIES:
                continue  # removed between the two calls
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise CacheFullError(f"{store}: the disk is full. Free space and go on") from None
            raise ReadOnlyCacheError(
                f"{store} can't be written ({error.strerror}). Check the permissions of this "
                "folder, or choose another cache root"
            ) from None


def writers_of(store: Path) -> list[str]:
    """Return `4711 python` of whoever commits to, compacts, repairs or removes the store now.

    Nothing is made for that, and no process has to wait.
    """
    try:
        with flocked(store / WRITER_LOCK_NAME, shared=True, wait=False):
            return []
    except BlockingIOError:
        return holders([store / WRITER_LOCK_NAME]) or ["a process"]
    except OSError:
        return []  # no such file, or a file system without such locks
