"""Coverage before training: the table, the threshold, and the call that fills the gap."""

from __future__ import annotations

import numpy as np
import pytest
from extraction.clips import write_tones
from small_ast import save_small_ast
from synthetic_layouts import make_audio_folder

import lmdbcache
from lmdbcache import CacheConfig, Coverage, VEGASDataset, model_identity, open_dataset
from lmdbcache.cache import ClipFailure, update_failures
from lmdbcache.errors import ConfigError, CoverageError


class Clips:
    """A dataset by the protocol, its samples with split and node."""

    namespace = "mine"
    root = "/data/my clips"

    def __init__(self, sample_ids):
        self.samples = [
            {
                "file_id": name.split(":")[0],
                "class_name": name.split(":")[1],
                "split": "train" if number % 2 else "val",
                "node": number // 10,
            }
            for number, name in enumerate(sample_ids)
        ]
        self.sample_ids = list(sample_ids)


def test_enough_is_stored(filled, config, embeddings):
    """The coverage comes back, by class, split and node."""
    found = filled.require(config, Clips(embeddings))
    assert (found.num_present, found.num_asked, found.fraction) == (20, 20, 1.0)
    assert found.by_split == {"val": (10, 10), "train": (10, 10)}
    assert {row.node for row in found.rows} == {"0", "1"}
    assert filled.require(config, list(embeddings)).by_class == {"drum": (10, 10), "dog": (10, 10)}
    assert filled.require(config, []).fraction == 1.0


def test_too_little_is_stored(filled, config, embeddings):
    """The table has every class, split and node; the threshold decides."""
    wanted = {
        "a": {"train": [*embeddings, "new:dog"], "val": ["new:cat"]},
        "b": {"train": ["x:cat"]},
    }
    with pytest.raises(CoverageError) as caught:
        filled.require(config, wanted)
    rows = [line.split() for line in str(caught.value).splitlines()]
    assert ["class", "node", "a", "train", "node", "a", "val", "node", "b", "train"] in rows
    assert ["dog", "10/11", "-", "-"] in rows
    assert ["cat", "-", "0/1", "0/1"] in rows
    assert ["all", "20/21", "0/1", "0/1"] in rows
    assert filled.require(config, wanted, min_coverage=20 / 23).num_present == 20
    with pytest.raises(CoverageError):
        filled.require(config, wanted, min_coverage=0.88)


@pytest.mark.parametrize(
    ("num_stored", "num_asked", "min_coverage", "is_enough"),
    [
        (7, 100, 0.07, True),  # as floats multiply, 7.000000000000001 are asked for
        (6, 100, 0.07, False),
        (19, 20, 0.95, True),
        (19, 20, 0.951, False),  # of 19.02 samples 19 are too few
        (19, 20, 0.975, False),  # of 19.5, too
        (0, 20, 0.0, True),
        (20, 20, 1.0, True),
        (19, 20, 1.0, False),
    ],
)
def test_threshold_is_a_number_of_samples(num_stored, num_asked, min_coverage, is_enough):
    """Enough is at least that share of what is asked for, and no rounding moves the threshold."""
    names = [f"{number}:x" for number in range(num_asked)]
    found = Coverage(num_asked, tuple(names[num_stored:]), {})
    assert found.is_enough(min_coverage) is is_enough


@pytest.mark.parametrize("min_coverage", [-0.01, 1.01, float("nan")])
def test_threshold_outside_0_to_1_is_refused(filled, config, embeddings, min_coverage):
    """A share is 0 to 1, even where everything is stored."""
    with pytest.raises(ConfigError):
        filled.require(config, list(embeddings), min_coverage=min_coverage)


def test_sample_listed_twice_is_one_sample(filled, config, embeddings):
    """A part that names a sample twice asks for it once, stored or missing."""
    asked = [*embeddings, *embeddings, "new:dog", "new:dog"]
    with pytest.raises(CoverageError, match=r"all\s+20/21"):
        filled.require(config, {"train": asked})
    found = filled.require(config, {"train": asked}, min_coverage=0.9)
    assert (found.num_present, found.num_asked) == (20, 21)
    assert found.by_split == {"train": (20, 21)}
    assert {row.class_name: (row.num_present, row.num_asked) for row in found.rows} == {
        "dog": (10, 11),
        "drum": (10, 10),
    }


def test_nothing_is_stored_names_the_nearest_config(filled, config, embeddings):
    """A wrong duration is named before the call that would compute everything anew."""
    with pytest.raises(CoverageError, match=r"10\.0.*5\.0"):
        filled.require(config.replace(duration=10), list(embeddings))


def test_failed_clips_are_counted_apart(filled, config, embeddings):
    """No run fills them: the table says so, and allow_failed leaves them out."""
    update_failures(filled.path(config), [], [ClipFailure("x:dog", "x.wav", "empty")])
    asked = [*embeddings, "x:dog"]
    with pytest.raises(CoverageError) as caught:
        filled.require(config, {"train": asked})
    assert "10/11, 1 failed" in str(caught.value)
    assert "lmdbcache.extract" not in str(caught.value)
    found = filled.require(config, asked, allow_failed=True)
    assert found.failed == ("x:dog",)
    with pytest.raises(CoverageError):
        filled.require(config, [*asked, "y:dog"], allow_failed=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint; not to be changed."""
    return save_small_ast(tmp_path_factory.mktemp("model") / "small ast", max_length=128)


def fill(error, **names):
    """Run the call in the message as it stands."""
    code = "\n".join(line[4:] for line in str(error).splitlines() if line.startswith("    "))
    exec(code, {"lmdbcache": lmdbcache, **names})


@pytest.mark.parametrize("part", [{}, {"split": "val"}, {"node_split_id": 1, "num_nodes": 2}])
def test_call_fills_the_gap_and_nothing_else(cache, tmp_path, model, part):
    """Run as it stands it computes what is missing: of this split and node."""
    folder = tmp_path / "my clips"
    write_tones(folder, 6, "dog")
    write_tones(folder, 6, "drum")
    config = CacheConfig(duration=0.5, model_name=model_identity(model), namespace="vegas")
    dataset = VEGASDataset(folder, load_audio=False, **part)
    with cache.writer(config) as writer:
        for name in dataset.sample_ids:
            if name.endswith("dog"):
                writer.put(name, np.zeros(64, np.float32))
    with pytest.raises(CoverageError) as caught:
        cache.require(config, dataset)
    fill(caught.value, cache=cache, config=config, dataset=dataset, model=model)
    found = cache.require(config, dataset)
    with cache.reader(config) as reader:
        assert len(reader) == found.num_asked
    if not part:
        assert set(found.by_split) == {"train", "val", "test"}


def test_call_for_a_class_of_ones_own(cache, tmp_path, model):
    """`samples` and `sample_ids` are enough."""
    opened = open_dataset(make_audio_folder(tmp_path / "x", classes=["bell"]), namespace="mine")

    class Own:
        namespace = "mine"
        samples = opened.samples
        sample_ids = opened.sample_ids

    config = CacheConfig(duration=0.2, model_name=model_identity(model), namespace="mine")
    with pytest.raises(CoverageError) as caught:
        cache.require(config, Own())
    fill(caught.value, cache=cache, config=config, dataset=Own(), model=model)
    assert cache.require(config, {"train": Own()}).fraction == 1.0


def test_another_namespace_than_the_config(cache, tmp_path, config):
    """No extraction fills that gap: the two names are in the message instead."""
    dataset = open_dataset(make_audio_folder(tmp_path / "x", classes=["bell"]), namespace="mine")
    for asked in (dataset, {"train": dataset}):
        with pytest.raises(CoverageError, match=r"'mine'.*'vegas'") as caught:
            cache.require(config.replace(namespace="vegas"), asked)
        assert "lmdbcache.extract" not in str(caught.value)


@pytest.mark.parametrize("given", [[{"file_id": "a"}], {"train": [{"file_id": "a"}]}, "a:b", 7])
def test_what_is_no_dataset_is_refused(cache, config, given):
    """Samples in place of sample ids, one id, a number: an error that says what to give."""
    with pytest.raises(ConfigError):
        cache.require(config, given)
