"""An SFTP server of one folder: `python sftp_server.py FOLDER USER PASSWORD`.

Its key is written to `.ssh/known_hosts` beside the folder: whose HOME that is knows the host.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import asyncssh


class _OneUser(asyncssh.SSHServer):
    def __init__(self, user: str, password: str) -> None:
        self._credentials = (user, password)

    def begin_auth(self, username: str) -> bool:
        return bool(username)

    def password_auth_supported(self) -> bool:
        return True

    def validate_password(self, username: str, password: str) -> bool:
        return (username, password) == self._credentials


async def serve(folder: str, user: str, password: str) -> None:
    """Serve until the process is ended; the address is printed."""
    key = asyncssh.generate_private_key("ssh-ed25519")
    known = Path(folder).parent / ".ssh" / "known_hosts"
    known.parent.mkdir()
    known.write_text(f"* {key.export_public_key().decode()}")
    acceptor = await asyncssh.listen(
        "127.0.0.1",
        0,
        server_factory=lambda: _OneUser(user, password),
        server_host_keys=[key],
        sftp_factory=lambda channel: asyncssh.SFTPServer(channel, chroot=folder),
    )
    print(f"127.0.0.1:{acceptor.get_port()}", flush=True)
    await acceptor.wait_closed()


if __name__ == "__main__":
    asyncio.run(serve(*sys.argv[1:]))
