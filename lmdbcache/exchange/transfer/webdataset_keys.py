"""Sample ids as the names of files in a tar of webdataset."""

from __future__ import annotations

from urllib.parse import quote, unquote

__all__ = ["sample_id_of_key", "webdataset_key"]


def webdataset_key(sample_id: str) -> str:
    """A sample id without dots and slashes: webdataset ends a key at the first dot.

    Percent-encoded as in a URL, with the colon as it is: `a/b.wav:dog` is `a%2Fb%2Ewav:dog`, and
    `urllib.parse.unquote` gives it back.
    """
    return quote(sample_id, safe=":").replace(".", "%2E")


def sample_id_of_key(key: str) -> str:
    """The sample id of `webdataset_key`."""
    return unquote(key, errors="strict")
