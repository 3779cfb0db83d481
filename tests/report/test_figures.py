"""What the report finds in the embeddings: samples, distributions, neighbours, the map."""

from __future__ import annotations

import statistics
from collections import Counter

import numpy as np
import pytest
from report.clusters import CONFIG, clustered, store

from lmdbcache.report import DatasetSplits, collect_report
from lmdbcache.report.neighbours import find_neighbours
from lmdbcache.report.vectors import (
    EmbeddingMap,
    distribution_of,
    in_stratified_order,
    map_of,
    read_vectors,
)
from lmdbcache.storage import class_of


def vectors_of(tmp_path, embeddings, config=CONFIG, *, limit=None, **options):
    cache = store(tmp_path / "cache", embeddings, config, **options)
    with cache.reader(config, verify="first_read") as reader:
        return read_vectors(reader, in_stratified_order(reader)[:limit])


def test_every_beginning_of_the_order_is_a_fair_sample():
    """Each class is there in proportion, every class at once, and the order is always the same."""
    sample_ids = [f"{n}:a" for n in range(600)] + [f"{n}:b" for n in range(300)] + ["0:c"]
    ordered = in_stratified_order(sample_ids)
    assert sorted(ordered) == sorted(sample_ids)
    assert ordered == in_stratified_order(reversed(sample_ids))
    assert {class_of(sample_id) for sample_id in ordered[:3]} == {"a", "b", "c"}
    counts = Counter(class_of(sample_id) for sample_id in ordered[:301])
    assert counts == {"a": 200, "b": 100, "c": 1}


def test_planted_neighbours_are_found(tmp_path):
    """Equal embeddings, near-duplicates and outliers that were planted are named, and no others."""
    embeddings = clustered(40, ["dog", "drum"], hidden_size=200)
    embeddings["twin:dog"] = embeddings["video_00000:dog"].copy()
    embeddings["twin:drum"] = embeddings["video_00000:dog"].copy()
    embeddings["near:drum"] = 3 * embeddings["video_00001:drum"] + 1e-4
    embeddings["wrong:dog"] = (
        embeddings["video_00002:drum"] + np.float32(0.2) * embeddings["video_00009:dog"]
    )
    embeddings["zero:dog"] = np.zeros(200, np.float32)
    splits = {"video_00000:dog": "train", "twin:dog": "test", "video_00001:drum": "val"}
    found = find_neighbours(vectors_of(tmp_path, embeddings), splits)
    (group,) = found.equal
    assert set(group.sample_ids) == {"video_00000:dog", "twin:dog", "twin:drum"}
    assert (group.count, group.crosses_classes, group.splits) == (3, True, ["test", "train"])
    near = {tuple(pair.sample_ids) for pair in found.near}
    assert ("near:drum", "video_00001:drum") in near
    assert found.near[0].cosine >= 0.99
    assert "wrong:dog" in {outlier.sample_id for outlier in found.outliers}
    assert found.outliers[0].sample_id == "wrong:dog"
    assert found.outliers[0].nearest == "video_00002:drum"
    assert found.zero_norms == ["zero:dog"]
    assert not any("zero:dog" in pair for pair in near)


def test_equal_and_near_of_one_class_do_not_cross(tmp_path):
    """Copies within a class and copies across two are told apart, in both lists."""
    embeddings = clustered(12, ["dog", "drum"], hidden_size=32)
    for number, name in ((1, "dog"), (2, "drum")):
        embeddings[f"equal_{number}:{name}"] = embeddings[f"video_{number:05d}:dog"].copy()
        near = embeddings[f"video_{number + 2:05d}:dog"] * np.float32(1.5)
        embeddings[f"near_{number}:{name}"] = near
    found = find_neighbours(vectors_of(tmp_path, embeddings), {})
    assert {group.sample_ids[0]: group.crosses_classes for group in found.equal} == {
        "equal_1:dog": False,
        "equal_2:drum": True,
    }
    assert {pair.sample_ids[0]: pair.crosses_classes for pair in found.near} == {
        "near_1:dog": False,
        "near_2:drum": True,
    }


def outliers_by_hand(embeddings):
    """(median distance, deviations by sample id) of one class, from the definitions."""
    names = list(embeddings)
    rows = np.stack([embeddings[name] for name in names]).astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    distances = np.sort(1 - rows @ rows.T, axis=1)[:, 1:6].mean(axis=1)  # [0] is the row itself
    median = np.median(distances)
    of_normal = statistics.NormalDist().inv_cdf(0.75)  # half of a normal distribution is nearer
    spread = np.median(np.abs(distances - median)) / of_normal
    return median, dict(zip(names, (distances - median) / spread, strict=True))


def test_outliers_are_robust_standard_deviations_away(tmp_path):
    """Distance, median and deviations are those of the definition; 5 is the least that is told."""
    embeddings = clustered(60, ["dog"], hidden_size=12, spread=0.5, seed=3)
    generator = np.random.default_rng(4)
    for number in range(12):  # farther and farther away
        away = embeddings["video_00000:dog"] + (1 + 0.25 * number) * generator.normal(size=12)
        embeddings[f"away_{number}:dog"] = away.astype(np.float32)
    median, deviations = outliers_by_hand(embeddings)
    expected = {name: value for name, value in deviations.items() if value >= 5}
    assert 2 <= len(expected) <= 11
    assert any(3.2 < value < 5 for value in deviations.values())
    found = find_neighbours(vectors_of(tmp_path, embeddings), {})
    assert found.num_outliers == len(found.outliers) == len(expected)
    assert {one.sample_id: one.deviations for one in found.outliers} == pytest.approx(
        expected, rel=1e-3
    )
    assert found.outliers[0].median_distance == pytest.approx(median, rel=1e-4)
    assert list(expected.values()) != sorted(expected.values(), reverse=True)
    told = [one.deviations for one in found.outliers]
    assert told == sorted(told, reverse=True)


def test_a_class_of_nine_has_no_outliers(tmp_path):
    """Of fewer than ten no median tells anything; of ten it does."""
    embeddings = clustered(9, ["dog"], hidden_size=12)
    embeddings["away:dog"] = -embeddings["video_00000:dog"]
    assert find_neighbours(vectors_of(tmp_path / "10", embeddings), {}).num_outliers == 1
    del embeddings["video_00008:dog"]
    assert find_neighbours(vectors_of(tmp_path / "9", embeddings), {}).num_outliers == 0


def test_leaks_come_first(tmp_path):
    """Pairs across splits precede those across classes, and these any other."""
    embeddings = clustered(12, ["dog", "drum"], hidden_size=32)
    for number, name in ((1, "dog"), (2, "drum"), (3, "dog")):
        copy = embeddings[f"video_{number:05d}:dog"] * np.float32(1.5)
        embeddings[f"copy_{number}:{name}"] = copy
    splits = {"copy_3:dog": "train", "video_00003:dog": "test"}
    near = find_neighbours(vectors_of(tmp_path, embeddings), splits).near
    assert [pair.sample_ids[0] for pair in near] == ["copy_3:dog", "copy_2:drum", "copy_1:dog"]


@pytest.mark.parametrize(
    ("case", "embeddings", "options", "says"),
    [
        ("one", {"a:x": np.ones(4)}, {}, "One embedding alone"),
        ("constant", {f"{n}:x": np.ones(4) for n in range(20)}, {}, "equal"),
        ("zeros", {f"{n}:x": np.zeros(4) for n in range(20)}, {}, "equal"),
        (
            "lengths",
            {f"{n}:x": np.ones(n + 1) for n in range(20)},
            {"ragged": True},
            "different lengths",
        ),
    ],
)
def test_embeddings_without_a_map(tmp_path, case, embeddings, options, says):
    """Where no map is possible the reason is given, and everything else goes on."""
    vectors = vectors_of(tmp_path, embeddings, **options)
    assert says in map_of(vectors)
    found = find_neighbours(vectors, {})
    assert found.near == []
    assert found.outliers == []
    assert found.num_equal_groups == (case in ("constant", "zeros"))
    assert sum(distribution_of(vectors.norms).counts) == len(embeddings)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_hidden_states_of_any_dtype_and_length_are_pooled(tmp_path, dtype):
    """A ragged store of hidden states: each embedding is the mean over its tokens."""
    generator = np.random.default_rng(0)
    embeddings = {f"{n}:x": generator.normal(size=(n + 1, 8)) for n in range(12)}
    config = CONFIG.replace(dtype=dtype, output="last_hidden_state")
    vectors = vectors_of(tmp_path, embeddings, config, ragged=True)
    assert vectors.is_mean
    expected = np.stack([embeddings[sample_id].mean(0) for sample_id in vectors.sample_ids])
    np.testing.assert_allclose(vectors.pooled, expected, atol=0.02)
    assert isinstance(map_of(vectors), EmbeddingMap)


def test_few_and_narrow_embeddings_have_a_map(tmp_path):
    """Two embeddings, or one dimension, are enough for a map."""
    two = map_of(vectors_of(tmp_path / "2", {"a:x": [1.0, 2.0, 3.0], "b:y": [2.0, 0.0, 1.0]}))
    assert len(two.x) == len(two.y) == 2
    assert two.explained_variance[0] == pytest.approx(1)
    narrow = map_of(vectors_of(tmp_path / "1", {f"{n}:x": [float(n)] for n in range(5)}))
    assert narrow.y == [0] * 5


def test_distribution_of_extreme_numbers():
    """Equal, nearly equal, huge and far-off numbers all give a histogram that counts each once."""
    for numbers in (
        np.ones(10),
        np.array([1.0, np.nextafter(1.0, 2)]),
        np.array([-3e38, 3e38], np.float32),
        np.append(np.zeros(9999), 1e30),
        np.array([5.0]),
    ):
        found = distribution_of(numbers, trim=0.1)
        assert sum(found.counts) == len(numbers)
        assert np.all(np.diff(found.edges) > 0)
        assert np.isfinite(found.edges).all()
    assert distribution_of(np.empty(0)) is None


def test_figures_of_a_distribution():
    """Mean, standard deviation and percentiles of the numbers themselves, by hand."""
    found = distribution_of(np.array([1.0, 3.0, 3.0, 9.0]))
    assert (found.count, found.mean) == (4, 4.0)
    assert found.standard_deviation == pytest.approx(3.0)  # (9 + 1 + 1 + 25) / 4 = 9
    assert found.percentiles["0 %"] == 1.0
    assert found.percentiles["50 %"] == 3.0
    assert found.percentiles["100 %"] == 9.0


@pytest.mark.parametrize(("dtype", "row_bytes"), [("float32", 8 * 4), ("int8", 8 + 4)])
def test_bytes_are_those_of_all_embeddings(tmp_path, dtype, row_bytes):
    """The mean size of a ragged store is taken over everything read, not over the first few."""
    generator = np.random.default_rng(0)
    embeddings = {f"{n}:x": generator.normal(size=(n + 1, 8)) for n in range(40)}
    vectors = vectors_of(tmp_path, embeddings, CONFIG.replace(dtype=dtype), ragged=True)
    assert vectors.mean_bytes == pytest.approx(row_bytes * (1 + 40) / 2)  # 1 to 40 tokens of 8


def test_coverage_by_split(tmp_path):
    """Stored and asked for each class and split; the emptiest class comes first."""
    cache = store(tmp_path / "cache", {"a:dog": [1.0], "b:drum": [1.0], "c:drum": [1.0]})
    splits = {"train": ["a:dog", "b:drum", "x:dog"], "test": ["c:drum"]}
    datasets = [DatasetSplits(name, name, splits) for name in ("vegas", "", "esc50")]
    (figures,) = collect_report(cache, datasets=datasets).stores
    found, of_any = figures.coverage  # a dataset without a namespace fits every store
    assert (found.dataset, of_any.dataset) == ("vegas", "")
    assert list(found.by_class) == ["dog", "drum"]
    assert found.by_class["dog"] == {"train": (1, 2)}
    assert found.by_class["drum"] == {"train": (1, 1), "test": (1, 1)}
    assert found.in_all == {"train": (2, 3), "test": (1, 1)}


def near_of(tmp_path, embeddings, splits=()):
    return find_neighbours(vectors_of(tmp_path, embeddings), dict(splits))


@pytest.mark.parametrize(("spread", "copied"), [(0.02, 1e-4), (0.2, 1e-3), (3.0, 1e-2)])
def test_near_duplicates_stand_out_of_their_store(tmp_path, spread, copied):
    """However alike or apart a store's embeddings are, planted copies are found and no others."""
    embeddings = clustered(100, ["dog", "drum"], hidden_size=24, spread=spread)
    generator = np.random.default_rng(5)
    for number in range(5):
        original = embeddings[f"video_{number:05d}:dog"]
        noise = copied * np.linalg.norm(original) * spread * generator.normal(size=24) / 5
        embeddings[f"copy_{number}:dog"] = (original + noise).astype(np.float32)
    found = near_of(tmp_path, embeddings, {"copy_0:dog": "train", "video_00000:dog": "test"})
    assert {tuple(pair.sample_ids) for pair in found.near} == {
        (f"copy_{number}:dog", f"video_{number:05d}:dog") for number in range(5)
    }
    assert (found.num_near_leaks, found.num_equal_leaks) == (1, 0)


def test_windows_of_a_recording_are_no_near_duplicates(tmp_path):
    """They overlap, and are alike by what they are; windows of two recordings count."""
    embeddings = clustered(30, ["dog"], hidden_size=24)
    for name in ("a@00000.000000", "a@00000.480000", "b@00000.000000"):
        noise = np.float32(1e-4 * len(embeddings))
        embeddings[f"{name}:dog"] = embeddings["video_00000:dog"] * 2 + noise
    del embeddings["video_00000:dog"]
    assert {tuple(pair.sample_ids) for pair in near_of(tmp_path, embeddings).near} == {
        ("a@00000.000000:dog", "b@00000.000000:dog"),
        ("a@00000.480000:dog", "b@00000.000000:dog"),
    }


def test_neighbors_name_classes_that_are_apart(tmp_path):
    """Clusters: all right. No structure: about chance. A file on both sides would give it away."""
    apart = near_of(tmp_path / "apart", clustered(20, ["cat", "dog", "drum"], spread=0.1))
    assert apart.separability.accuracy == 1
    assert apart.separability.chance == pytest.approx(1 / 3)
    generator = np.random.default_rng(0)
    windows = {}
    for number in range(60):
        name, file = ("dog", "drum")[number % 2], generator.normal(size=16)
        for second in range(4):  # nearly the same: neighbors of the same file would be all right
            start = f"video_{number:05d}@{second:05d}.000000:{name}"
            windows[start] = file + 0.01 * generator.normal(size=16)
    mixed = near_of(tmp_path / "mixed", windows).separability
    assert mixed.accuracy < 0.7
    assert [row.num_samples for row in mixed.classes] == [120, 120]


def test_recordings_of_windows(tmp_path):
    """Recordings and their windows are counted; a recording is what most of its windows are."""
    generator, windows = np.random.default_rng(0), {}
    clips = clustered(12, ["dog", "drum"], spread=0.05)
    for number, (name, clip) in enumerate(clips.items()):
        file_id, _, class_name = name.partition(":")
        other = clips[f"{file_id}:{'dog' if class_name == 'drum' else 'drum'}"]
        for second in range(3 + number % 2):  # the first window sounds like the other class
            window = f"{file_id}@{second:05d}.000000:{class_name}"
            windows[window] = (clip if second else other) + 0.01 * generator.normal(size=16)
    (found,) = collect_report(store(tmp_path, windows, CONFIG.replace(window=1.0))).stores
    assert found.recordings == (24, 3, 4, 4)
    assert [row.num_recordings for row in found.classes] == [12, 12]
    for row in found.neighbours.separability.classes:
        assert row.accuracy < 0.8
        assert row.of_recordings == 1


def test_each_layer_by_itself(tmp_path):
    """Of a store of all layers: one that holds the class, one that doesn't."""
    generator = np.random.default_rng(0)
    stacks = {
        name: np.stack([generator.normal(size=16), embedding])
        for name, embedding in clustered(12, ["dog", "drum"]).items()
    }
    (found,) = collect_report(store(tmp_path, stacks, CONFIG.replace(output="layers/mean"))).stores
    noise, clusters = found.layers
    assert noise.accuracy < 0.8
    assert clusters.accuracy == 1


def test_separability_of_classes_with_enough_files(tmp_path):
    """The rarer ones are counted; with one class left there is nothing to tell apart."""
    embeddings = {**clustered(9, ["dog", "drum"]), **clustered(4, ["cat"], seed=1)}
    found = near_of(tmp_path / "two", embeddings).separability
    assert ({row.name for row in found.classes}, found.num_left_out) == ({"dog", "drum"}, 1)
    assert near_of(tmp_path / "one", clustered(9, ["dog"])).separability is None
