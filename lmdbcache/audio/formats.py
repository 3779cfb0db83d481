"""File suffixes of audio: which ones a decoder reads, and which ones it can't. No torch here."""

from __future__ import annotations

import functools
from typing import Final

from lmdbcache.errors import ConfigError

__all__ = [
    "DECODERS",
    "by_soundfile",
    "check_decoder",
    "decoder_of",
    "is_audio",
    "is_readable",
    "readable_suffixes",
    "unreadable_suffixes",
    "with_decoder",
]

DECODERS: Final = ("soundfile", "ffmpeg")

# Format of libsndfile → its suffixes. Missing are those without a header (RAW, SD2), XI, whose
# header has no sample rate, and suffixes that usually mean other content: .mat (arrays),
# .iff (pictures), .mpc (Musepack).
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
    "XI": (),
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
        ".xi",
    }
)

_KNOWN: Final = _OTHER.union(*_SUFFIXES.values())

# Of libsndfile alone; without a header; encrypted.
_NOT_BY_FFMPEG: Final = frozenset(
    {".htk", ".snd", ".xi", ".gsm", ".vox", ".pcm", ".raw", ".sd2", ".m4p", ".aax"}
)


def check_decoder(decoder: str) -> None:
    """Refuse a decoder that there isn't.

    Raises:
        ConfigError: It isn't one of `DECODERS`.
    """
    if decoder not in DECODERS:
        raise ConfigError(f"decoder: {decoder!r}; use {', '.join(map(repr, DECODERS))}")


def decoder_of(front_end: str) -> str:
    """Return the decoder that a front end's name begins with: `"soundfile"` if it names none."""
    name = front_end.partition("+")[0]
    return name if name in DECODERS else DECODERS[0]


def with_decoder(front_end: str, decoder: str) -> str:
    """Return the name of the same front end behind another decoder.

    Args:
        front_end: As `CacheConfig.front_end`.
        decoder: One of `DECODERS`.

    Raises:
        ConfigError: An unknown decoder, or a front end that names none to be replaced.
    """
    check_decoder(decoder)
    name, _, rest = front_end.partition("+")
    if name == decoder:
        return front_end
    if name not in DECODERS or not rest:
        raise ConfigError(
            f"decoder: {decoder!r} can't be part of the front end {front_end!r}, which doesn't "
            f"begin with a decoder; call it {decoder + '+' + front_end!r} if it is decoded by that"
        )
    return f"{decoder}+{rest}"


def by_soundfile(front_end: str) -> str:
    """Return the name of the same front end decoded by soundfile, to compare names by."""
    name, _, rest = front_end.partition("+")
    return f"{DECODERS[0]}+{rest}" if name in DECODERS else front_end


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
    check_decoder(decoder)
    if decoder == "ffmpeg":
        return _KNOWN - _NOT_BY_FFMPEG
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
