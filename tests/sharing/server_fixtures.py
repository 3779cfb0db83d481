"""Fixtures: servers of the session, and an empty place on each for a test."""

from __future__ import annotations

import contextlib

import pytest
from sharing.command_forks import CommandForks
from sharing.fault_proxy import FaultProxy
from sharing.nodes import IMPATIENT, PATIENT, SIZES, Node
from sharing.places import (
    file_place,
    s3_place,
    sftp_place,
)
from sharing.servers import moto_server, sftp_server
from sharing.tcp_proxy import TcpProxy


class Kept:
    """What tests of the session share; one that has died takes no test down but its own."""

    def __init__(self, start):
        self._start, self._open, self._value = start, contextlib.ExitStack(), None

    def get(self):
        """The one that runs; another if there is none yet or it is broken."""
        if self._value is None or not self._value.is_usable:
            self.close()
            self._value = self._open.enter_context(self._start())
        return self._value

    def close(self):
        self._value = None
        self._open.close()


@pytest.fixture(scope="session")
def kept(tmp_path_factory):
    """Servers, and the process that commands are forked from, by name."""
    kinds = {"moto": moto_server, "sftp": sftp_server}
    found = {
        name: Kept(lambda name=name, server=server: server(tmp_path_factory.mktemp(name)))
        for name, server in kinds.items()
    }
    found["forks"] = Kept(lambda: contextlib.closing(CommandForks()))
    yield found
    for one in found.values():
        one.close()


@pytest.fixture
def moto(kept):
    return kept["moto"].get()


@pytest.fixture
def sftp(kept):
    return kept["sftp"].get()


@pytest.fixture
def on_moto(moto):
    """A bucket on moto, behind a proxy."""
    proxy = FaultProxy(moto.port)
    yield s3_place(moto, proxy)
    proxy.close()


@pytest.fixture
def on_sftp(sftp):
    """A folder on the SFTP server, behind a proxy."""
    proxy = TcpProxy(sftp.port)
    yield sftp_place(sftp, proxy)
    proxy.close()


@pytest.fixture
def on_file(tmp_path):
    return file_place(tmp_path / "shared")


@pytest.fixture
def command_forks(kept):
    """Where commands are forked from."""
    return kept["forks"].get()


@pytest.fixture
def nodes_at(tmp_path, command_forks):
    """Makes nodes that share through a place."""

    def make(place, number=2, *, sizes=SIZES, is_impatient=False):
        environment = IMPATIENT if is_impatient else PATIENT
        return [
            Node(tmp_path / f"node-{index}", command_forks, place, environment, sizes)
            for index in range(number)
        ]

    return make
