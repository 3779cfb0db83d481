"""Places that embeddings are pushed to, with a way around push and pull to look and to damage."""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sharing.servers import ACCESS_KEY, PASSWORD, SECRET_KEY, USER

if TYPE_CHECKING:
    from sharing.fault_proxy import FaultProxy
    from sharing.servers import Server
    from sharing.tcp_proxy import TcpProxy


class Objects(Protocol):
    """What lies below a URL, by the path from there."""

    def names(self) -> list[str]: ...
    def read(self, name: str) -> bytes: ...
    def write(self, name: str, content: bytes) -> None: ...
    def remove(self, name: str) -> None: ...


@dataclass
class Place:
    """One empty place of a test: its URL, how to get there, and what is there."""

    url: str
    objects: Objects
    environment: dict[str, str] = field(default_factory=dict)
    proxy: Any = None

    def names(self, part: str = "") -> list[str]:
        """Sorted; those that have this in their path."""
        return sorted(name for name in self.objects.names() if part in name)

    def contents(self) -> dict[str, bytes]:
        return {name: self.objects.read(name) for name in self.names()}

    def flip(self, name: str, at: int, mask: int = 1) -> None:
        """Change a byte; `at` may count from the end."""
        content = bytearray(self.objects.read(name))
        content[at] ^= mask
        self.objects.write(name, bytes(content))

    def truncate(self, name: str, num_bytes: int) -> None:
        self.objects.write(name, self.objects.read(name)[:num_bytes])


@dataclass
class FolderObjects:
    folder: Path

    def names(self) -> list[str]:
        return [
            str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file()
        ]

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # A new file, as a server would make it: what others have open stays as it is.
        written = path.with_name(f".{path.name}")
        written.write_bytes(content)
        written.replace(path)

    def remove(self, name: str) -> None:
        (self.folder / name).unlink()


@dataclass
class S3Objects:
    client: Any
    bucket: str
    prefix: str

    def names(self) -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(
            Bucket=self.bucket, Prefix=f"{self.prefix}/"
        )
        found = [item["Key"] for page in pages for item in page.get("Contents", ())]
        return [key.removeprefix(f"{self.prefix}/") for key in found]

    def read(self, name: str) -> bytes:
        return self.client.get_object(Bucket=self.bucket, Key=self._key(name))["Body"].read()

    def write(self, name: str, content: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=self._key(name), Body=content)

    def remove(self, name: str) -> None:
        self.client.delete_object(Bucket=self.bucket, Key=self._key(name))

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}"


def s3_environment(endpoint: str, secret_key: str = SECRET_KEY) -> dict[str, str]:
    """What a user sets for a server that isn't Amazon's."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": secret_key,
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }


def s3_client(
    endpoint: str,
    secret_key: str = SECRET_KEY,
    *,
    num_attempts: int = 5,
    seconds: float = 60.0,
) -> Any:
    """botocore without s3fs: no event loop, no cache."""
    from botocore.config import Config
    from botocore.session import Session

    session = Session()
    session.set_config_variable("config_file", os.devnull)
    session.set_config_variable("credentials_file", os.devnull)
    return session.create_client(
        "s3",
        region_name="us-east-1",
        endpoint_url=endpoint,
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=secret_key,
        config=Config(
            s3={"addressing_style": "path"},
            request_checksum_calculation="when_required",
            retries={"total_max_attempts": num_attempts},
            read_timeout=seconds,
            connect_timeout=seconds,
        ),
    )


def s3_place(server: Server, proxy: FaultProxy) -> Place:
    """A bucket of its own; the proxy is only in the way of push and pull."""
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    client = s3_client(server.endpoint)
    client.create_bucket(Bucket=bucket)
    objects = S3Objects(client, bucket, "some/place")
    return Place(f"s3://{bucket}/some/place", objects, s3_environment(proxy.endpoint), proxy)


def sftp_place(server: Server, proxy: TcpProxy) -> Place:
    name = f"place-{uuid.uuid4().hex[:12]}"
    assert server.folder is not None
    url = f"ssh://{USER}:{PASSWORD}@127.0.0.1:{proxy.port}/{name}"
    objects = FolderObjects(server.folder / name)
    return Place(url, objects, {"HOME": str(server.folder.parent)}, proxy)


def file_place(folder: Path) -> Place:
    return Place(folder.as_uri(), FolderObjects(folder))
