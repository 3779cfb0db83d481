"""Fixtures: servers of the session, and an empty place on each for a test."""

from __future__ import annotations

import pytest
from sharing.command_forks import CommandForks
from sharing.fault_proxy import FaultProxy
from sharing.nodes import IMPATIENT, SIZES, Node
from sharing.places import (
    file_place,
    s3_place,
    sftp_place,
)
from sharing.servers import moto_server, rclone_server, sftp_server
from sharing.tcp_proxy import TcpProxy


@pytest.fixture(scope="session")
def moto(tmp_path_factory):
    with moto_server(tmp_path_factory.mktemp("moto")) as server:
        yield server


@pytest.fixture(scope="session")
def rclone(tmp_path_factory):
    with rclone_server(tmp_path_factory.mktemp("rclone")) as server:
        yield server


@pytest.fixture(scope="session")
def sftp(tmp_path_factory):
    with sftp_server(tmp_path_factory.mktemp("sftp")) as server:
        yield server


@pytest.fixture
def on_moto(moto):
    """A bucket on moto, behind a proxy."""
    proxy = FaultProxy(moto.port)
    yield s3_place(moto, proxy)
    proxy.close()


@pytest.fixture
def on_rclone(rclone):
    """A bucket on rclone, behind a proxy."""
    proxy = FaultProxy(rclone.port)
    yield s3_place(rclone, proxy)
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


@pytest.fixture(scope="session")
def command_forks():
    """Where commands are forked from."""
    forks = CommandForks()
    yield forks
    forks.close()


@pytest.fixture
def nodes_at(tmp_path, command_forks):
    """Makes nodes that share through a place."""

    def make(place, number=2, *, sizes=SIZES):
        return [
            Node(tmp_path / f"node-{index}", command_forks, place, IMPATIENT, sizes)
            for index in range(number)
        ]

    return make
