"""Files on an SFTP server, without fsspec."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import asyncssh

if TYPE_CHECKING:
    from sharing.places import Place


def put(place: Place, name: str, content: bytes) -> None:
    asyncio.run(_transfer(place, name, content))


def get(place: Place, name: str) -> bytes:
    return asyncio.run(_transfer(place, name, None))


async def _transfer(place: Place, name: str, content: bytes | None) -> bytes:
    url = urlsplit(place.url)
    async with (
        asyncssh.connect(
            url.hostname or "",
            url.port or 22,
            username=url.username,
            password=url.password,
            known_hosts=None,
        ) as connection,
        connection.start_sftp_client() as client,
    ):
        if content is not None:
            await client.makedirs(url.path, exist_ok=True)
        async with client.open(f"{url.path}/{name}", "rb" if content is None else "wb") as file:
            if content is not None:
                await file.write(content)
                return content
            return await file.read()
