"""CachedEncoder: embeddings that can't be stored, and stores that can't be written."""

from __future__ import annotations

import pytest
import torch
from training.encoders import (
    OWN,
    ask,
    direct,
    names_of,
    stored,
)

from lmdbcache import CachedEncoder
from lmdbcache.errors import CacheFullError, InvalidEmbeddingError, ReadOnlyCacheError
from lmdbcache.storage import EmbeddingWriter


def test_nan_is_named_and_the_rest_kept(cache):
    """One sample's NaN is an error for it alone; the others aren't computed again."""
    passes = []

    def model(inputs):
        passes.append(inputs[:, 0].tolist())
        return inputs.clone().masked_fill_(inputs == 2, torch.nan)

    with CachedEncoder(cache, OWN, model) as encoder:
        numbers = torch.arange(4.0)[:, None]
        with pytest.raises(InvalidEmbeddingError, match="clip_002:x"):
            encoder(numbers, sample_ids=names_of(range(4)))
        with pytest.raises(InvalidEmbeddingError, match="clip_002:x"):
            encoder(numbers, sample_ids=names_of(range(4)))
        found = encoder(numbers[[0, 1, 3]], sample_ids=names_of([0, 1, 3]))
    assert passes == [[0.0, 1.0, 2.0, 3.0], *[[3.0] * 4] * 2, [2.0]]
    assert found.tolist() == [[0.0], [1.0], [3.0]]
    assert list(stored(cache)) == names_of([0, 1, 3])


NO_REAL_NUMBERS = {
    "bool": lambda inputs: inputs > 0,
    "complex": lambda inputs: torch.complex(inputs, inputs),
    "complex array": lambda inputs: inputs.numpy() * 1j,
    "complex, half precision": lambda inputs: torch.complex(inputs.half(), inputs.half()),
    "sparse": lambda inputs: inputs.to_sparse(),
    "quantized": lambda inputs: torch.quantize_per_tensor(inputs, 0.1, 0, torch.qint8),
    "nested": lambda inputs: torch.nested.nested_tensor(list(inputs)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model", NO_REAL_NUMBERS.values(), ids=NO_REAL_NUMBERS)
def test_embeddings_that_are_no_array_of_real_numbers_are_refused(cache, model):
    """Neither answered nor stored as their real part."""
    with CachedEncoder(cache, OWN, model) as encoder:
        with pytest.raises(InvalidEmbeddingError):
            ask(encoder, [1, 2])
    assert not stored(cache)


def test_wrong_number_or_shape(cache):
    """A model that loses or adds samples, or changes its shape, stores nothing of that batch."""
    for rows in ([0], [0, 1, 1]):
        with CachedEncoder(cache, OWN, lambda inputs, rows=rows: inputs[rows]) as encoder:
            with pytest.raises(InvalidEmbeddingError):
                ask(encoder, [1, 2])
    width = 3
    with CachedEncoder(cache, OWN, lambda x: x[:, :width]) as encoder:
        ask(encoder, [1])
        width = 4
        with pytest.raises(InvalidEmbeddingError, match="clip_002:x"):
            ask(encoder, [2])
    assert list(stored(cache)) == names_of([1])


def test_a_full_disk_loses_nothing(encoder, model, cache, monkeypatch):
    """It is told; what was computed stays in memory and is committed once there is room."""
    with monkeypatch.context() as patch:

        def refuse(*_):
            raise CacheFullError("the disk is full")

        patch.setattr(EmbeddingWriter, "_write", refuse)
        ask(encoder, [1, 2])
        with pytest.raises(CacheFullError):
            encoder.flush()
        assert torch.equal(ask(encoder, [2, 1]), direct([2, 1]))
    encoder.flush()
    assert list(stored(cache)) == names_of([1, 2])
    assert model.passes == [2]


def test_an_unwritable_root_is_told_before_computing(tmp_path, model):
    """No forward pass for what can't be kept."""
    (tmp_path / "file").write_text("")
    with CachedEncoder(tmp_path / "file", OWN, model) as encoder:
        with pytest.raises(ReadOnlyCacheError):
            ask(encoder, [1])
    assert not model.passes
