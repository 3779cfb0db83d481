"""The second decoder: what only FFmpeg reads, by the same rules."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
from audio.encoded_audio import InMemory, decoded, encoded, id3, tone

from lmdbcache import CacheConfig, config_for
from lmdbcache.audio import decoder_of, load_clip, load_waveform, with_decoder
from lmdbcache.errors import AudioDecodeError, ConfigError

av = pytest.importorskip("av")

RATE = 16000


def muxed(container: str, codec: str, samples: np.ndarray, rate: int = RATE, **options) -> bytes:
    """What FFmpeg writes for these samples (num_samples, channels)."""
    file = io.BytesIO()
    layout = {1: "mono", 2: "stereo"}[samples.shape[1]]
    with av.open(file, "w", format=container, options=options) as output:
        stream = output.add_stream(codec, rate=rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(samples.T), format="fltp", layout=layout
        )
        frame.sample_rate = rate
        resampler = av.AudioResampler(
            format=stream.format.name,
            layout=layout,
            rate=rate,
            frame_size=stream.frame_size or 1024,
        )
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            output.mux(stream.encode(part))
        output.mux(stream.encode(None))
    return file.getvalue()


def speech(rate: int = RATE, channels: int = 1, seconds: float = 2.0) -> np.ndarray:
    return np.stack([tone(seconds=seconds, rate=rate)] * channels, 1)


OTHERS = {
    "m4a": muxed("ipod", "aac", speech()),
    "m4a, stereo": muxed("ipod", "aac", speech(channels=2)),
    "mp4": muxed("mp4", "aac", speech(44100), 44100),
    "mp4 in fragments": muxed("mp4", "aac", speech(), movflags="frag_keyframe+empty_moov"),
    "mp4, ALAC": muxed("mp4", "alac", speech()),
    "mov": muxed("mov", "pcm_s16le", speech()),
    "aac": muxed("adts", "aac", speech()),
    "webm": muxed("webm", "libopus", speech(48000), 48000),
    "mkv": muxed("matroska", "aac", speech()),
}
BOTH = {
    "wav": encoded("WAV", "PCM_16", rate=RATE),
    "wav, 24 bits": encoded("WAV", "PCM_24", rate=RATE),
    "wav, 8 bits": encoded("WAV", "PCM_U8", rate=RATE),
    "wav, float": encoded("WAV", "DOUBLE", rate=RATE),
    "aiff": encoded("AIFF", "PCM_16", rate=RATE),
    "caf": encoded("CAF", "PCM_32", rate=RATE),
    "flac": encoded("FLAC", "PCM_24", rate=RATE),
    "flac, stereo": encoded("FLAC", "PCM_16", np.stack([tone(), tone(900)], 1), rate=RATE),
    "ogg": encoded("OGG", "VORBIS", rate=RATE),
    "mp3": encoded("MP3", "MPEG_LAYER_III", rate=RATE),
    "mp3 with a picture": id3(50_000) + encoded("MP3", "MPEG_LAYER_III", rate=RATE),
}


def by_ffmpeg(content: bytes, duration: float = 9.0, rate: int = RATE) -> np.ndarray:
    return decoded(InMemory(content), rate, duration, "ffmpeg")


@pytest.mark.parametrize("kind", OTHERS)
def test_what_libsndfile_does_not_read(kind, tmp_path):
    """It is decoded in full, resampled, cut, and the same from a path."""
    waveform = by_ffmpeg(OTHERS[kind])
    # An encoder fills up its last frame.
    assert 2.0 * RATE - 1100 <= len(waveform) <= 2.2 * RATE
    original = speech()[:, 0]
    found = np.correlate(waveform[8000:16000], original[8000 - 2100 : 16000 + 100], "valid")
    assert found.max() > 0.9 * np.dot(original[8000:16000], original[8000:16000])
    assert by_ffmpeg(OTHERS[kind], 0.5).tobytes() == waveform[:8000].tobytes()
    path = tmp_path / "http:clip"
    path.write_bytes(OTHERS[kind])
    assert decoded(path, RATE, 9.0, "ffmpeg").tobytes() == waveform.tobytes()
    padded = load_waveform(path, RATE, 3.0, "ffmpeg")
    assert padded[: len(waveform)].tobytes() == waveform.tobytes()


@pytest.mark.parametrize("kind", OTHERS)
def test_soundfile_names_the_other_decoder(kind):
    """The reason for a refusal says what reads it."""
    with pytest.raises(AudioDecodeError, match=r'decoder="ffmpeg"'):
        load_clip(InMemory(OTHERS[kind]), RATE, 9.0)


@pytest.mark.parametrize("kind", BOTH)
def test_both_decoders_agree(kind):
    """Files that both read give the same samples."""
    for rate in (RATE, 8000):
        expected = decoded(InMemory(BOTH[kind]), rate, 9.0)
        np.testing.assert_allclose(by_ffmpeg(BOTH[kind], rate=rate), expected, atol=1e-4)


@pytest.mark.parametrize("kind", [*OTHERS, *BOTH])
def test_any_cut(kind):
    """A file cut anywhere is refused, or decodes to what the whole file does."""
    content, chance = {**OTHERS, **BOTH}[kind], random.Random(kind)
    whole = by_ffmpeg(content)
    cuts = [*range(len(content) - 3, len(content)), len(content) // 2, len(content) // 10]
    for cut in cuts + [chance.randrange(1, len(content)) for _ in range(12)]:
        try:
            waveform = by_ffmpeg(content[:cut])
        except AudioDecodeError:
            continue
        assert waveform.tobytes() == whole.tobytes(), f"cut at {cut} of {len(content)}"


@pytest.mark.parametrize("kind", [*OTHERS, *BOTH])
def test_damage(kind):
    """Bytes written over at random give a finite waveform or AudioDecodeError."""
    content, chance = {**OTHERS, **BOTH}[kind], random.Random(kind)
    for _ in range(20):
        changed = bytearray(content)
        for _ in range(chance.randint(1, 6)):
            changed[chance.randrange(min(200, len(changed)))] = chance.randrange(256)
        try:
            waveform = by_ffmpeg(bytes(changed))
        except AudioDecodeError:
            continue
        assert waveform.size
        assert np.isfinite(waveform).all()


@pytest.mark.parametrize("content", [b"<html>404</html>", bytes(3000), b"ffconcat version 1.0\n"])
def test_no_audio(content):
    """It is refused as with the other decoder."""
    with pytest.raises(AudioDecodeError):
        by_ffmpeg(content)


def test_a_playlist_leads_nowhere(tmp_path):
    """A file that names another file doesn't make FFmpeg open that."""
    (tmp_path / "other.wav").write_bytes(BOTH["wav"])
    other = (tmp_path / "other.wav").as_uri()
    text = f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:1,\n{other}\n#EXT-X-ENDLIST\n"
    for content in (text, f"ffconcat version 1.0\nfile {tmp_path}/other.wav\n"):
        with pytest.raises(AudioDecodeError):
            by_ffmpeg(content.encode())


def test_cancelling_channels():
    """They are reported as with the other decoder."""
    left = tone(rate=RATE)
    content = encoded("FLAC", "PCM_16", np.stack([left, -left], 1), rate=RATE)
    assert load_clip(InMemory(content), RATE, 9.0, "ffmpeg").is_cancelled


def test_the_decoder_is_part_of_the_identity():
    """Configs of both decoders differ in their front end only, and name their decoder."""
    by_default, other = config_for("ast"), config_for("ast", decoder="ffmpeg")
    assert by_default == config_for("ast", decoder="soundfile") == CacheConfig()
    assert other.front_end == by_default.front_end.replace("soundfile+", "ffmpeg+")
    assert other.fingerprint != by_default.fingerprint
    assert [decoder_of(each.front_end) for each in (by_default, other)] == ["soundfile", "ffmpeg"]
    with pytest.raises(ConfigError):
        config_for("ast", decoder="sox")
    with pytest.raises(ConfigError):
        with_decoder("log-mel/1", "ffmpeg")
    with pytest.raises(ConfigError):
        load_clip(InMemory(BOTH["wav"]), RATE, 1.0, "sox")
