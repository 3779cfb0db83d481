"""File suffixes of audio: which ones a decoder reads, and which ones it can't. No torch here."""

from __future__ import annotations

import functools
from typing import Final

from lmdbcache.errors import ConfigError

__all__ = ["DECODERS", "is_audio", "is_readable", "readable_suffixes", "unreadable_suffixes"]

DECODERS: Final = ("soundfile",)

# Format of libsndfile → its suffixes. Missing are those without a header of their own (RAW, SD2)
# and suffixes that usually mean something else: .mat (arrays), .iff (pictures), .mpc (Musepack).
_SUFFIXES: Final[dict[str, tuple[str, ...]]] = {
    "AIFF": (".aiff", ".aif", ".aifc"),
    "AU": (".au", ".snd"),
    "AVR": (".avr",),
    "CAF": (".caf",),
    "FLAC": (".flac",),
    "HTK": (".htk",),
    "IRCAM": (".sf", ".ircam"),
    "MAT4": (),
    "MAT5": (),
    "MP3": (".mp3", ".mp2", ".mp1", ".mpga"),
    "MPC2K": (".snd",),
    "NIST": (".sph", ".nist"),
    "OGG": (".ogg", ".oga", ".opus"),
    "PAF": (".paf",),
    "PVF": (".pvf",),
    "RAW": (),
    "RF64": (".rf64",),
    "SD2": (),
    "SDS": (".sds",),
    "SVX": (".svx", ".8svx", ".16sv"),
    "VOC": (".voc",),
    "W64": (".w64",),
    "WAV": (".wav", ".wave", ".bwf"),
    "WAVEX": (".wav",),
    "WVE": (".wve",),
    "XI": (".xi",),
}

# Audio, and video that usually has a sound track, in formats that libsndfile doesn't read.
_OTHER: Final = frozenset(
    {
        *(
            ".m4a",
            ".m4b",
            ".m4p",
            ".aac",
            ".adts",
            ".alac",
            ".aax",
            ".amr",
            ".awb",
            ".3gp",
            ".3gpp",
        ),
        *(".3g2", ".mp4", ".m4v", ".mov", ".webm", ".weba", ".mka", ".mkv", ".wma", ".wmv", ".asf"),
        *(".avi", ".flv", ".mpg", ".mpeg", ".ogv", ".ac3", ".eac3", ".dts", ".ape", ".wv", ".tta"),
        *(".mpc", ".spx", ".ra", ".rm", ".dsf", ".dff", ".gsm", ".vox", ".pcm", ".raw", ".sd2"),
    }
)

_KNOWN: Final = _OTHER.union(*_SUFFIXES.values())


@functools.cache
def readable_suffixes(decoder: str = "soundfile") -> frozenset[str]:
    """Return the file suffixes that a decoder reads, lower-case and with the dot.

    Those of `"soundfile"` are what the installed libsndfile says that it reads; where soundfile
    isn't installed, which listing a dataset doesn't need, those of libsndfile 1.2.

    Args:
        decoder: One of `DECODERS`.

    Raises:
        ConfigError: An unknown decoder.
    """
    if decoder not in DECODERS:
        raise ConfigError(f"decoder: {decoder!r}; use {', '.join(map(repr, DECODERS))}")
    try:
        import soundfile

        formats = list(soundfile.available_formats())
    except (ImportError, OSError):  # OSError: soundfile without its libsndfile
        formats = list(_SUFFIXES)
    return frozenset(suffix for name in formats for suffix in _SUFFIXES.get(name, ()))


def unreadable_suffixes(decoder: str = "soundfile") -> frozenset[str]:
    """Return the suffixes of audio and video files that a decoder doesn't read.

    Args:
        decoder: One of `DECODERS`.

    Raises:
        ConfigError: An unknown decoder.
    """
    return _KNOWN - readable_suffixes(decoder)


def is_readable(suffix: str, decoder: str = "soundfile") -> bool:
    """Return whether a decoder reads files with this suffix, in any case.

    The same as asking `readable_suffixes`, but a folder of wav files is listed without loading
    the decoder.

    Raises:
        ConfigError: An unknown decoder.
    """
    suffix = suffix.lower()
    return suffix in _KNOWN and (suffix == ".wav" or suffix in readable_suffixes(decoder))


def is_audio(suffix: str) -> bool:
    """Return whether files with this suffix hold audio or video, readable or not."""
    return suffix.lower() in _KNOWN
