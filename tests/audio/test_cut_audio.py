"""A file that was cut off is refused; one whose length its writer left open is decoded."""

from __future__ import annotations

import random

import numpy as np
import pytest
import soundfile
from audio.encoded_audio import (
    RATE,
    InMemory,
    chunk,
    decoded,
    encoded,
    id3,
    put,
    tone,
    wave_file,
)

from lmdbcache.audio import load_clip
from lmdbcache.errors import AudioDecodeError

WAVE_LIST = chunk(b"LIST", b"INFOISFT" + b"\x05\0\0\0abcde\0")
KINDS = {
    "wav": encoded("WAV", "PCM_16"),
    "wav, 24 bits": encoded("WAV", "PCM_24"),
    "wav, float": encoded("WAV", "FLOAT"),
    "wav, A-law": encoded("WAV", "ALAW"),
    "wav, ADPCM": encoded("WAV", "MS_ADPCM"),
    "wav, GSM": encoded("WAV", "GSM610"),
    "wav, extensible": encoded("WAVEX", "PCM_16"),
    "wav, 8 bits and odd": encoded("WAV", "PCM_U8", tone()[:-1]),
    "wav, big-endian": wave_file(tone(), ">"),
    "wav, chunk before": wave_file(tone(), before=WAVE_LIST),
    "wav, odd chunk before": wave_file(tone(), before=chunk(b"note", b"abc")),
    "rf64": encoded("RF64", "PCM_16"),
    "w64": encoded("W64", "PCM_16"),
    "w64, ADPCM": encoded("W64", "IMA_ADPCM"),
    "aiff": encoded("AIFF", "PCM_16"),
    "aifc": encoded("AIFF", "FLOAT"),
    "caf": encoded("CAF", "PCM_24"),
    "caf, ALAC": encoded("CAF", "ALAC_16"),
    "au": encoded("AU", "PCM_16"),
    "au, G.723": encoded("AU", "G723_24"),
    "ogg": encoded("OGG", "VORBIS"),
    "opus": encoded("OGG", "OPUS"),
    "flac": encoded("FLAC", "PCM_16"),
    "flac with an ID3 tag": id3(300) + encoded("FLAC", "PCM_16"),
    "mp3": encoded("MP3", "MPEG_LAYER_III"),
    "mp3, variable": encoded("MP3", "MPEG_LAYER_III", bitrate_mode="VARIABLE"),
    "mp3, 44.1 kHz": encoded("MP3", "MPEG_LAYER_III", rate=44100),
    "mp3 with an ID3 tag": id3(3000) + encoded("MP3", "MPEG_LAYER_III"),
    "voc": encoded("VOC", "PCM_16"),
    "svx": encoded("SVX", "PCM_16"),
    "nist": encoded("NIST", "PCM_16"),
    "nist, A-law": encoded("NIST", "ALAW"),
    "nist, stereo": encoded("NIST", "PCM_16", np.stack([tone(), tone(900.0)], 1)),
    "avr": encoded("AVR", "PCM_16"),
    "mat4": encoded("MAT4", "FLOAT"),
    "mat5": encoded("MAT5", "FLOAT"),
    "mpc2k": encoded("MPC2K", "PCM_16"),
    "htk": encoded("HTK", "PCM_16"),
    "sds": encoded("SDS", "PCM_16"),
    "wve": encoded("WVE", "ALAW"),
}
by_kind = pytest.mark.parametrize("kind", KINDS)


def of_bytes(content: bytes, duration: float = 20.0) -> np.ndarray:
    return decoded(InMemory(content), RATE, duration)


@by_kind
def test_a_whole_file(kind, tmp_path):
    """It decodes to its length, from a path and from bytes."""
    path = tmp_path / "clip"
    path.write_bytes(KINDS[kind])
    waveform = decoded(path)
    assert waveform.tobytes() == of_bytes(KINDS[kind]).tobytes()
    assert len(waveform) == pytest.approx(1.5 * RATE, abs=0.1 * RATE)


@by_kind
def test_any_cut(kind, tmp_path):
    """A part is refused, from a path and from bytes; any cut is refused or costs nothing."""
    content, chance = KINDS[kind], random.Random(kind)
    path = tmp_path / "clip"
    for kept in (0.1, 0.5, 0.9):
        part = content[: round(kept * len(content))]
        path.write_bytes(part)
        for source in (path, InMemory(part)):
            with pytest.raises(AudioDecodeError):
                load_clip(source, RATE, 20.0)
    whole = of_bytes(content)
    cuts = [*range(len(content) - 4, len(content)), *range(1, 100, 18)]
    for cut in cuts + [chance.randrange(1, len(content)) for _ in range(8)]:
        try:
            waveform = of_bytes(content[:cut])
        except AudioDecodeError:
            continue
        assert waveform.tobytes() == whole.tobytes(), f"cut at {cut} of {len(content)}"


@pytest.mark.parametrize(
    "kind", ["wav", "rf64", "w64", "aiff", "au", "nist", "ogg", "opus", "flac", "mp3"]
)
def test_a_cut_behind_the_duration(kind):
    """Audio that isn't needed isn't missed."""
    forms = {"opus": "OGG", "ogg": "OGG"}
    form = forms.get(kind, kind.upper())
    subtype = "OPUS" if kind == "opus" else soundfile.default_subtype(form)
    content = encoded(form, subtype, tone(seconds=12))
    half = content[: len(content) // 2]
    with pytest.raises(AudioDecodeError):
        of_bytes(half, 9.0)
    try:
        waveform = of_bytes(half, 1.0)
    except AudioDecodeError:
        assert kind in {"ogg", "opus"}  # libsndfile looks for the last page first
    else:
        assert waveform.tobytes() == of_bytes(content, 1.0).tobytes()


def test_chunks_behind_the_audio_may_be_missing():
    """A cut inside a chunk behind the audio costs nothing, nor does the padding of an odd one."""
    content = wave_file(tone(), after=WAVE_LIST)
    whole = of_bytes(content)
    assert of_bytes(content[:-3]).tobytes() == whole.tobytes()
    assert of_bytes(content[: -len(WAVE_LIST)]).tobytes() == whole.tobytes()
    odd = KINDS["wav, 8 bits and odd"]
    assert of_bytes(odd[:-1]).tobytes() == of_bytes(odd).tobytes()


def _opened() -> dict[str, tuple[bytes, bytes]]:
    """Files whose sizes say that they weren't known, and the same with sizes."""
    found = {}
    for kind, layout, value_of_none in (("wav", "<I", 0), ("wav, extensible", "<I", 0)):
        content = KINDS[kind]
        at = content.index(b"data") + 4
        for size in (value_of_none, 0x7FFF_FFFF, 0x7FFF_F000, 0x8000_0000, 0xFFFF_FFFF):
            for outer in (0, 36, size):
                changed = put(put(content, at, layout, size), 4, "<I", outer)
                found[f"{kind}: {size:#x} in {outer:#x}"] = (changed, content)
    content = KINDS["wav, big-endian"]
    found["rifx: 0"] = (put(content, content.index(b"data") + 4, ">I", 0), content)
    content = KINDS["aiff"]
    at, frames = content.index(b"SSND") + 4, content.index(b"COMM") + 10
    for size in (0, 8, 0x7F00_0008, 0x7EFF_FFFE, 0xFFFF_FFFF):
        changed = put(put(content, at, ">I", size), frames, ">I", size)
        found[f"aiff: {size:#x}"] = (changed, content)
    content = KINDS["w64"]
    at = content.index(b"data") + 16
    for size in (0, 24, 2**63 - 1, 2**64 - 1):
        changed = put(put(content, at, "<Q", size), 16, "<Q", size)
        found[f"w64: {size:#x}"] = (changed, content)
    content = KINDS["rf64"]
    at = content.index(b"ds64") + 8
    for size in (0, 2**64 - 1):
        changed = content
        for place in (0, 8, 16):
            changed = put(changed, at + place, "<Q", size)
        found[f"rf64: {size:#x}"] = (changed, content)
    at, data = content.index(b"ds64") + 16, content.index(b"data") + 4
    changed = put(put(content, at, "<Q", 0), data, "<I", len(content) - data - 4)
    found["rf64: size in 32 bits"] = (changed, content)
    content = KINDS["caf"]
    at = content.index(b"data") + 4
    for size in (-1, 0, 4):
        found[f"caf: {size}"] = (put(content, at, ">q", size), content)
    for size in (0, 0x7FFF_FFFF, 0xFFFF_FFFF):
        found[f"au: {size:#x}"] = (put(KINDS["au"], 8, ">I", size), KINDS["au"])
    return found


OPENED = _opened()


@pytest.mark.parametrize("kind", OPENED)
def test_a_length_left_open(kind, tmp_path):
    """The file of a pipe's writer or a stopped recorder is read to its end."""
    content, whole = OPENED[kind]
    assert content != whole
    waveform, expected = of_bytes(content), of_bytes(whole)
    # A container's padding may be read as a last sample.
    assert len(expected) <= len(waveform) <= len(expected) + 2
    assert waveform[: len(expected)].tobytes() == expected.tobytes()
    path = tmp_path / "clip"
    path.write_bytes(content)
    assert decoded(path).tobytes() == waveform.tobytes()


@pytest.mark.parametrize("after", [b"", WAVE_LIST, WAVE_LIST * 3])
def test_no_audio_at_all(after):
    """A size of 0 with other chunks behind it is a file without samples."""
    with pytest.raises(AudioDecodeError, match="row 3 of a table"):
        of_bytes(wave_file(tone()[:0], after=after))


def test_flac_of_unknown_length():
    """It is refused: nothing shows whether it is whole."""
    content = bytearray(KINDS["flac"])
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    with pytest.raises(AudioDecodeError, match="row 3 of a table"):
        of_bytes(bytes(content))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "ALAC" not in kind])
def test_damaged_headers(kind):
    """Bytes written over at random give a finite waveform or AudioDecodeError."""
    content, chance = KINDS[kind], random.Random(kind)
    for _ in range(15):
        changed = bytearray(content)
        for _ in range(chance.randint(1, 6)):
            changed[chance.randrange(min(160, len(changed)))] = chance.randrange(256)
        try:
            waveform = of_bytes(bytes(changed), 5.0)
        except AudioDecodeError:
            continue
        assert np.isfinite(waveform).all()
        assert waveform.size
