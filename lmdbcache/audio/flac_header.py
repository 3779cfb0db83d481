"""How long a FLAC file says it is. No torch here."""

from __future__ import annotations

from typing import BinaryIO

from lmdbcache.audio.containers import DamagedAudioError
from lmdbcache.audio.mpeg_frames import skip_tags
from lmdbcache.audio.pieced_file import read_at

__all__ = ["check_flac_length", "is_flac"]


def is_flac(file: BinaryIO) -> bool:
    """Return whether a file is FLAC, behind any ID3 tags."""
    return read_at(file, skip_tags(file, 0), 4) == b"fLaC"


def check_flac_length(file: BinaryIO, num_samples: int | None) -> None:
    """Compare what a FLAC file that ends early decodes to with its header.

    Args:
        file: A FLAC file.
        num_samples: What it decodes to, per channel; None if that isn't known.

    Raises:
        DamagedAudioError: It is too short, or its header doesn't say how long it should be.
    """
    head = read_at(file, skip_tags(file, 0), 26)
    total = int.from_bytes(head[21:26], "big") & 0xF_FFFF_FFFF
    if len(head) == 26 and not total:
        raise DamagedAudioError(
            "its header doesn't say how long it is, as in a FLAC written to a pipe; write it to a "
            "file, or decode and encode it again"
        )
    if num_samples is not None and num_samples < total:
        raise DamagedAudioError(
            f"it has {num_samples} of the {total} samples that its header announces: cut off or "
            "damaged; copy or download it again"
        )
