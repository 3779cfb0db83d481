"""The length of a file is what decodes: files of several parts, mp3s without a length."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from audio.encoded_audio import (
    RATE,
    SECONDS,
    InMemory,
    decoded as decoded_source,
    encoded,
    id3,
    tone,
    without_first_frame,
)

from lmdbcache.audio import load_clip
from lmdbcache.errors import AudioDecodeError

TAG = b"TAG" + b"\0" * 125
APE = (b"APETAGEX" + (2000).to_bytes(4, "little") + (5032).to_bytes(4, "little")).ljust(5064, b"\0")
OGG = ("OGG", "VORBIS"), ("OGG", "OPUS")


def decoded(content: bytes, duration: float = 30.0) -> np.ndarray:
    return decoded_source(InMemory(content), RATE, duration)


def frequencies(waveform: np.ndarray, num_parts: int) -> list[float]:
    """The loudest frequency in the middle of each part, in Hz."""
    found = []
    for part in np.array_split(waveform, num_parts):
        middle = part[len(part) // 4 : -len(part) // 4]
        spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle))))
        found.append(float(np.argmax(spectrum)) * RATE / len(middle))
    return found


def mp3(frequency: float = 440.0, **options) -> bytes:
    return encoded("MP3", "MPEG_LAYER_III", tone(frequency), **options)


def loud_behind(seconds: float) -> np.ndarray:
    """Silence, then noise: the first frames say nothing about the later ones' bit rate."""
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, RATE).astype(np.float32)
    return np.concatenate([np.zeros(round(seconds * RATE), np.float32), noise])


VARIABLE = {
    "rising": encoded("MP3", "MPEG_LAYER_III", loud_behind(3), bitrate_mode="VARIABLE"),
    "falling": encoded("MP3", "MPEG_LAYER_III", loud_behind(3)[::-1], bitrate_mode="VARIABLE"),
    "rising, stereo": encoded(
        "MP3", "MPEG_LAYER_III", np.stack([loud_behind(3)] * 2, 1), bitrate_mode="VARIABLE"
    ),
}
AROUND = {
    "nothing": (b"", b""),
    "ID3v1": (b"", TAG),
    "APE": (b"", APE),
    "APE and ID3v1": (b"", APE + TAG),
    "a picture": (id3(200_000), b""),
    "two ID3v2": (id3(300), b""),
    "zeros behind": (b"", bytes(4000)),
}
AROUND["two ID3v2"] = (id3(300) + id3(5000), TAG)


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("has_header", [True, False])
@pytest.mark.parametrize("kind", VARIABLE)
def test_an_mp3_of_variable_bit_rate(kind, has_header, around):
    """All of it is decoded, whatever its tags and with or without a header that counts frames."""
    before, behind = AROUND[around]
    content = VARIABLE[kind] if has_header else without_first_frame(VARIABLE[kind])
    waveform, plain = decoded(before + content + behind), decoded(VARIABLE[kind])
    assert len(plain) == 4 * RATE
    # Without a header the encoder's own samples stay: two frames and the filter's.
    assert 0 <= len(waveform) - len(plain) <= 0.2 * RATE
    if has_header:
        assert waveform.tobytes() == plain.tobytes()


@pytest.mark.parametrize("behind", [b"", TAG, TAG + id3(300), APE, id3(300, footer=True)])
@pytest.mark.parametrize("headers", ["both", "first", "second", "none"])
def test_mp3s_behind_each_other(headers, behind):
    """Every part is decoded, though the first header counts its own frames only."""
    first, second = mp3(440.0), mp3(1200.0)
    if headers in {"second", "none"}:
        first = without_first_frame(first)
    if headers in {"first", "none"}:
        second = without_first_frame(second)
    waveform = decoded(first + behind + second)
    assert len(waveform) == pytest.approx(2 * SECONDS * RATE, abs=0.35 * RATE)
    assert frequencies(waveform, 2) == pytest.approx([440.0, 1200.0], abs=10)
    # Where the duration ends before the first part does, nothing else is looked at.
    assert decoded(first + behind + second, 1.0).tobytes() == decoded(first, 1.0).tobytes()


def test_a_cut_mp3_behind_another():
    """It is refused, as is one whose first part is cut."""
    first, second = mp3(440.0), mp3(1200.0)
    for content in (first + second[:-3000], first[:-3000] + second, first + second[:-1]):
        with pytest.raises(AudioDecodeError):
            decoded(content)
    whole = without_first_frame(first)
    with pytest.raises(AudioDecodeError):
        decoded(whole[:-5])


@pytest.mark.parametrize("has_header", [True, False])
def test_mp3s_of_different_rates(has_header):
    """They are refused."""
    second = encoded("MP3", "MPEG_LAYER_III", rate=16000)
    second = second if has_header else without_first_frame(second)
    with pytest.raises(AudioDecodeError):
        decoded(mp3() + second)


def _headers() -> dict[str, bytes]:
    """A constant bit rate behind a loud beginning: libmpg123's own estimate is too short."""
    content = encoded("MP3", "MPEG_LAYER_III", bitrate_mode="CONSTANT")
    header = content[: len(content) - len(without_first_frame(content))]
    audio = content[len(header) :]
    sizes = len(content).to_bytes(4, "big") + struct.pack(">I", NUM_FRAMES)
    vbri = header[:4].ljust(36, b"\0") + b"VBRI\0\1\0\0\0\x4b" + sizes
    behind_checksum = bytes((header[0], header[1] & 0xFE, *header[2:4], 0, 0)) + header[4:-2]
    return {
        "Info": content,
        "VBRI": vbri.ljust(len(header), b"\0") + audio,
        "behind a checksum": behind_checksum + audio,
    }


NUM_FRAMES = 23
HEADERS = _headers()


@pytest.mark.parametrize("kind", HEADERS)
def test_headers_that_count_frames(kind):
    """All frames are decoded, whether or not libmpg123 reads the header; none may be missing."""
    content = HEADERS[kind]
    waveform = decoded(content)
    assert len(waveform) == (SECONDS * RATE if kind == "Info" else NUM_FRAMES * 576)
    if kind != "Info":
        assert waveform.tobytes() == decoded(without_first_frame(HEADERS["Info"])).tobytes()
    # At the ends of frames: nothing else tells that it was cut there.
    for num_missing in (1, 2, 3, 10):
        with pytest.raises(AudioDecodeError, match=f"{NUM_FRAMES - num_missing} are there"):
            decoded(content[: FRAME_ENDS[-1 - num_missing]])


def _frame_ends(content: bytes) -> list[int]:
    """Where each frame ends, by its own bit rate: MPEG 2.5, layer III, 8 kHz, no padding."""
    rates, ends, position = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160), [], 0
    while position < len(content):
        position += 9 * rates[content[position + 2] >> 4]
        ends.append(position)
    return ends


FRAME_ENDS = _frame_ends(HEADERS["Info"])


@pytest.mark.parametrize(("form", "subtype"), OGG)
def test_chained_ogg_streams(form, subtype):
    """Each link is decoded, and behind the duration none."""
    links = [encoded(form, subtype, tone(each)) for each in (440.0, 900.0, 1500.0)]
    waveform = decoded(b"".join(links))
    assert waveform.tobytes() == b"".join(decoded(link).tobytes() for link in links)
    assert frequencies(waveform, 3) == pytest.approx([440.0, 900.0, 1500.0], abs=10)
    assert decoded(links[0] + links[1] + TAG).tobytes() == waveform[: 3 * RATE].tobytes()
    assert len(decoded(links[0] + links[1] + links[2][:500], 2.0)) == 2 * RATE


def test_a_part_whose_channels_cancel_is_reported():
    """Silence before it doesn't hide it; a part that can be heard does."""
    opposite = encoded("OGG", "OPUS", np.stack([tone(), -tone()], 1))
    for first, is_cancelled in ((0 * tone(), True), (tone(), False)):
        content = encoded("OGG", "OPUS", first) + opposite
        assert load_clip(InMemory(content), RATE, 30.0).is_cancelled is is_cancelled


@pytest.mark.parametrize(("form", "subtype"), OGG)
def test_a_cut_link(form, subtype):
    """A chain is refused whichever of its links was cut, at a page's end or inside one."""
    first, second = (encoded(form, subtype, tone(each)) for each in (440.0, 900.0))
    last_page = second.rindex(b"OggS")
    for content in (
        first + second[:-10],
        first + second[:last_page],
        first[:-10] + second,
        first[: first.rindex(b"OggS")] + second,
        first + second[:10],
    ):
        with pytest.raises(AudioDecodeError):
            decoded(content)
    # Nor do whole links behind it help, of which the last isn't needed.
    with pytest.raises(AudioDecodeError):
        decoded(first[: first.rindex(b"OggS")] + second + second, 2.0)


@pytest.mark.parametrize(("form", "subtype"), OGG)
def test_a_damaged_page(form, subtype):
    """libogg passes over a page whose checksum is wrong; a second that is missing is refused."""
    whole = encoded(form, subtype, tone(seconds=9.0))
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    for content in (damaged, damaged + whole, whole + damaged):
        with pytest.raises(AudioDecodeError):
            decoded(bytes(content))


@pytest.mark.parametrize(("form", "subtype"), OGG)
def test_links_of_different_rates_or_channels(form, subtype):
    """Other channels are mixed; another sample rate is refused."""
    first = encoded(form, subtype, tone())
    stereo = encoded(form, subtype, np.stack([tone(900.0)] * 2, 1))
    assert len(decoded(first + stereo)) == pytest.approx(2 * SECONDS * RATE, abs=2)
    with pytest.raises(AudioDecodeError):
        decoded(first + encoded(form, subtype, rate=16000))
