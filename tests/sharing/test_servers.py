"""The servers of these tests, and the proxies in front of them, do what they are there for."""

from __future__ import annotations

import os

import pytest
from botocore.exceptions import ClientError
from sharing.places import s3_client

CONTENT = os.urandom(100_000)


@pytest.fixture(params=["on_moto", pytest.param("on_rclone", marks=pytest.mark.stress)])
def bucket(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def through_proxy(bucket):
    """A client that meets the faults, and tries once."""
    client = s3_client(bucket.proxy.endpoint, num_attempts=1)
    yield client
    client.close()


def where(bucket, name):
    url = bucket.url.removeprefix("s3://")
    return {"Bucket": url.partition("/")[0], "Key": f"{url.partition('/')[2]}/{name}"}


def test_objects_go_both_ways(bucket, through_proxy):
    """What one side writes, the other reads, and each request is counted with its bytes."""
    through_proxy.put_object(**where(bucket, "one"), Body=CONTENT)
    assert bucket.contents() == {"one": CONTENT}
    bucket.objects.write("deep/two", CONTENT[:7])
    answer = through_proxy.get_object(**where(bucket, "deep/two"))
    assert answer["Body"].read() == CONTENT[:7]
    assert bucket.names() == ["deep/two", "one"]
    put, get = bucket.proxy.requests
    assert (put.method, put.name, put.status, put.num_bytes_up) == ("PUT", "one", 200, 100_000)
    assert (get.method, get.num_bytes_down) == ("GET", 7)


def test_damage(bucket):
    """A flipped byte and a cut object are what the server gives from then on."""
    bucket.objects.write("one", b"abc")
    bucket.flip("one", -1)
    assert bucket.contents() == {"one": b"abb"}
    bucket.truncate("one", 1)
    assert bucket.contents() == {"one": b"a"}
    bucket.objects.remove("one")
    assert bucket.contents() == {}


@pytest.mark.parametrize("status", [500, 503])
def test_answers_of_the_proxy(bucket, through_proxy, status):
    """As many as asked for, for the requests that fit; the server hears nothing of them."""
    bucket.proxy.fault("answer", status=status, method="PUT", times=2)
    for _ in range(2):
        with pytest.raises(ClientError):
            through_proxy.put_object(**where(bucket, "one"), Body=CONTENT)
    assert bucket.names() == []
    through_proxy.put_object(**where(bucket, "one"), Body=CONTENT)
    assert [request.status for request in bucket.proxy.requests] == [status, status, 200]


def test_cut_connections(bucket, through_proxy):
    """An upload that is cut leaves nothing whole; a lost answer leaves the object."""
    bucket.proxy.fault("cut upload", after=50_000)
    with pytest.raises(Exception, match="[Cc]onnection"):
        through_proxy.put_object(**where(bucket, "one"), Body=CONTENT)
    assert bucket.contents().get("one") != CONTENT
    bucket.proxy.fault("lose answer", method="PUT")
    with pytest.raises(Exception, match="[Cc]onnection"):
        through_proxy.put_object(**where(bucket, "one"), Body=CONTENT)
    assert bucket.contents() == {"one": CONTENT}
    bucket.proxy.fault("cut download", after=50_000, method="GET")
    with pytest.raises(Exception, match="(?i)incomplete|connection"):
        through_proxy.get_object(**where(bucket, "one"))["Body"].read()
    assert bucket.proxy.requests[-1].num_bytes_down <= 50_000


def test_flipped_bit_on_the_way(bucket, through_proxy):
    """One byte differs; what the server has stays as it is."""
    bucket.objects.write("one", CONTENT)
    bucket.proxy.fault("flip download", after=70_000, method="GET")
    got = through_proxy.get_object(**where(bucket, "one"))["Body"].read()
    assert len(got) == len(CONTENT)
    differing = [at for at in range(len(got)) if got[at] != CONTENT[at]]
    assert differing == [70_000]
    assert through_proxy.get_object(**where(bucket, "one"))["Body"].read() == CONTENT


@pytest.mark.parametrize("kind", ["stall answer", "stall upload", "stall download"])
def test_stalled_connections(bucket, through_proxy, kind):
    """Nothing more comes, and the connection stays open: only a time limit of the client helps."""
    bucket.objects.write("one", CONTENT)
    client = s3_client(bucket.proxy.endpoint, num_attempts=1, seconds=0.3)
    bucket.proxy.fault(kind, after=1000)
    with pytest.raises(Exception, match="(?i)timed? ?out|connection"):
        if kind == "stall upload":
            client.put_object(**where(bucket, "two"), Body=CONTENT)
        client.get_object(**where(bucket, "one"))["Body"].read()
    client.close()


def test_wrong_credentials(on_rclone):
    """rclone refuses a signature that isn't right; moto doesn't look."""
    client = s3_client(on_rclone.proxy.endpoint, secret_key="wrong", num_attempts=1)
    with pytest.raises(ClientError, match="SignatureDoesNotMatch|403"):
        client.put_object(**where(on_rclone, "one"), Body=b"x")
    client.close()


def test_sftp(on_sftp):
    """Files go both ways; the proxy counts their bytes, and cuts once."""
    from sharing.sftp_client import get, put

    put(on_sftp, "one", CONTENT)
    assert on_sftp.contents() == {"one": CONTENT}
    assert on_sftp.proxy.num_bytes["up"] > len(CONTENT)
    on_sftp.proxy.fault("cut", "down", 50_000)
    with pytest.raises(Exception, match="(?i)connection"):
        get(on_sftp, "one")
    assert get(on_sftp, "one") == CONTENT


def test_what_dies_takes_down_its_own_test_only(kept):
    """The next test gets another server, and another process that forks for commands."""
    server, forks = kept["moto"].get(), kept["forks"].get()
    server.process.kill()
    server.process.wait()
    with pytest.raises(TypeError):
        forks.ask(start=object())  # interrupted before the answer
    assert kept["moto"].get().is_usable
    assert kept["forks"].get() is not forks
    assert kept["forks"].get().is_usable
