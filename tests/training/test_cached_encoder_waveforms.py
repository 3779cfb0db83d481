"""CachedEncoder with a front end: waveforms of any length up to the duration."""

from __future__ import annotations

from functools import cache as once, partial

import numpy as np
import pytest
import torch
from embedders.small_folders import folder_of

from lmdbcache import CachedEncoder, config_for
from lmdbcache.errors import AudioDecodeError, ConfigError

LENGTHS = (1000, 3200, 2000)
IDS = ["a:x", "b:x", "c:x"]


def masked():
    return folder_of("wav2vec2-masked")


@once
def config_of():
    return config_for(masked(), duration=0.2)


def of(values):
    """A function of the sample ids that are missing."""
    return lambda ids: [dict(zip(IDS, values, strict=True))[name] for name in ids]


@pytest.fixture
def encoder(cache):
    with CachedEncoder(cache, config_of(), masked(), device="cpu") as encoder:
        yield encoder


def clips():
    return [np.random.default_rng(n).uniform(-0.5, 0.5, n).astype(np.float32) for n in LENGTHS]


def padded(value=0.0):
    rows = [np.pad(c, (0, 3200 - len(c)), constant_values=value) for c in clips()]
    return torch.from_numpy(np.stack(rows))


def filled(root):
    """What the clips give as they are."""
    with CachedEncoder(root, config_of(), masked(), device="cpu") as encoder:
        return encoder(clips(), sample_ids=IDS)


@pytest.mark.parametrize(
    ("given", "num_valid"),
    [
        (lambda: [torch.from_numpy(clip) for clip in clips()], None),
        (lambda: [partial(np.copy, clip) for clip in clips()], None),
        (lambda: of(clips()), None),
        (padded, LENGTHS),
        (lambda: padded().numpy(), np.array(LENGTHS)),
        (lambda: padded(value=0.25), torch.tensor(LENGTHS)),
        (lambda: list(padded()), of(LENGTHS)),
        (lambda: padded().double(), torch.tensor(LENGTHS, dtype=torch.int32)),
    ],
)  # fmt: skip
def test_ways_to_give_short_clips(given, num_valid, encoder, tmp_path):
    """One value, however they come: only the samples that count have a part in it."""
    encoder(clips()[2:], sample_ids=IDS[2:])  # a hit among them
    found = encoder(given(), sample_ids=IDS, num_valid=num_valid)
    torch.testing.assert_close(found, filled(tmp_path / "other"), atol=1e-6, rtol=1e-5)
    assert encoder.num_computed == 3


def test_rows_that_may_be_padded_to_the_longest(encoder, cache):
    """A table of shorter rows doesn't tell clip from padding: refused where that matters."""
    rows = padded()[:, :2000]
    with pytest.raises(ConfigError):
        encoder(rows, sample_ids=IDS)
    encoder(list(rows), sample_ids=IDS)
    assert encoder.num_computed == 3
    full = torch.full((2, 3200), 0.25)  # clips that fill the duration need no num_valid
    found = encoder(full, sample_ids=["g:x", "h:x"])
    assert torch.equal(found, encoder(full, sample_ids=["i:x", "j:x"], num_valid=[3200, 3200]))
    with CachedEncoder(
        cache, config_for(folder_of("ast"), duration=0.2), folder_of("ast")
    ) as other:
        other(rows, sample_ids=IDS)
        longer = torch.nn.functional.pad(rows, (0, 1200))
        again = other(longer, sample_ids=["d:x", "e:x", "f:x"])
        assert torch.equal(again, other(rows, sample_ids=IDS))


@pytest.mark.parametrize(
    ("given", "num_valid"),
    [
        (torch.zeros(1, 3201), None),
        ([np.zeros(3200, np.int16)], None),
        (torch.zeros(1, 3200), [3201]),
        (torch.zeros(1, 3200), [-1]),
        (torch.zeros(1, 3200), [0.5]),
        (torch.zeros(1, 3200), 3200),
        (torch.zeros(1, 3200), torch.ones(1, 3200, dtype=torch.long)),
        (torch.zeros(1, 3200), [3200, 3200]),
    ],
)
def test_waveforms_that_do_not_fit(given, num_valid, encoder):
    """Refused; nothing is stored."""
    with pytest.raises(ConfigError):
        encoder(given, sample_ids=["a:x"], num_valid=num_valid)
    assert config_of() not in encoder.cache


def test_clips_that_give_no_features(encoder):
    """Too short for the front end, empty, or with NaN: as the extraction says it, never stored."""
    broken = clips()[0].copy()
    broken[7] = np.nan
    for clip in (np.ones(399, np.float32), np.ones(0, np.float32), broken):
        with pytest.raises(AudioDecodeError, match="b:x"):
            encoder([clips()[0], clip], sample_ids=["a:x", "b:x"])
    assert encoder.num_computed == 0


def test_waveforms_in_half_precision(cache):
    """Taken where the config says so."""
    config = config_of().replace(compute_dtype="bfloat16")
    with CachedEncoder(cache, config, masked(), device="cpu") as encoder:
        rows = [torch.from_numpy(clip).bfloat16() for clip in clips()]
        assert torch.isfinite(encoder(rows, sample_ids=IDS)).all()
