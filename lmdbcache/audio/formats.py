"""The table of audio formats: which decoder reads the files of which suffix. No torch here.

To add a format, add its suffixes to the table. If its files decode without an error after they were
cut off, add what shows the cut to `lmdbcache.audio.containers`.
"""

from __future__ import annotations

from typing import Final

from lmdbcache.errors import ConfigError

DECODERS: Final = ("soundfile", "ffmpeg")


def _suffixes(names: str) -> frozenset[str]:
    return frozenset(f".{name}" for name in names.split())


# Missing are suffixes that usually mean other content: .mat (arrays), .iff (pictures).
_READ_BY_BOTH: Final = _suffixes(
    "aif aifc aiff au avr bwf caf flac ircam mp1 mp2 mp3 mpga nist oga ogg opus paf pvf rf64 sds "
    "sf sph svx 8svx 16sv voc w64 wav wave wve"
)
_READ_BY: Final = {
    # What libsndfile 1.2 reads.
    "soundfile": _READ_BY_BOTH | _suffixes("htk snd"),
    # Audio, and video that usually has a sound track.
    "ffmpeg": _READ_BY_BOTH
    | _suffixes(
        "3g2 3gp 3gpp aac ac3 adts alac amr ape asf avi awb dff dsf dts eac3 flv m4a m4b m4v mka "
        "mkv mov mp4 mpc mpeg mpg ogv ra rm spx tta weba webm wma wmv wv"
    ),
}
# Without a header, or a sample rate in it, or encrypted.
_READ_BY_NONE: Final = _suffixes("aax gsm m4p pcm raw sd2 vox xi")
_AUDIO: Final = _READ_BY_NONE.union(*_READ_BY.values())


def check_decoder(decoder: str) -> None:
    """Refuse an unknown decoder.

    Raises:
        ConfigError: It isn't one of `DECODERS`.
    """
    if decoder not in DECODERS:
        raise ConfigError(f"decoder: {decoder!r}; use {', '.join(map(repr, DECODERS))}")


def decoder_of(front_end: str) -> str:
    """Return the decoder that a front end's name begins with, `"soundfile"` if it names none."""
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
            f"begin with a decoder; name it {decoder + '+' + front_end!r} if {decoder} decodes it"
        )
    return f"{decoder}+{rest}"


def by_soundfile(front_end: str) -> str:
    """Return the name of the same front end decoded by soundfile, to compare names by."""
    name, _, rest = front_end.partition("+")
    return f"{DECODERS[0]}+{rest}" if name in DECODERS else front_end


def is_readable(suffix: str, decoder: str = "soundfile") -> bool:
    """Return whether a decoder reads files with this suffix, in any case.

    Raises:
        ConfigError: An unknown decoder.
    """
    check_decoder(decoder)
    return suffix.lower() in _READ_BY[decoder]


def is_audio(suffix: str) -> bool:
    """Return whether files with this suffix hold audio or video, readable or not."""
    return suffix.lower() in _AUDIO
