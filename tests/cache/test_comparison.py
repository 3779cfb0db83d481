"""What differs between two stores."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from lmdbcache import EmbeddingCache
from lmdbcache.cache import compare_stores, difference_of


@pytest.fixture
def make(tmp_path, config):
    """A store of these embeddings in a root of its own; gives its folder."""

    def make(name, items, *, ragged=False, provenance=None, **changes):
        chosen = config.replace(**changes)
        cache = EmbeddingCache(tmp_path / name)
        with cache.writer(chosen, ragged=ragged, provenance=provenance) as writer:
            for sample_id, value in items.items():
                writer.put(sample_id, value)
        return cache.path(chosen)

    return make


def test_equal_stores(make, embeddings):
    """The same samples, whatever the order and time of writing: equal, bit for bit."""
    found = compare_stores(
        make("a", embeddings), make("b", dict(reversed(list(embeddings.items()))))
    )
    assert found.is_equal
    assert (found.num_common, found.num_equal, found.worst) == (20, 20, [])


def test_every_kind_of_difference(make, embeddings):
    """Samples of one side, bits within the tolerance and beyond, the worst named with figures."""
    names = sorted(embeddings)
    changed = dict(embeddings)
    changed["new:dog"] = np.ones(8)
    del changed[names[0]], changed[names[1]]
    changed[names[2]] = np.nextafter(embeddings[names[2]], 9)
    changed[names[3]] = embeddings[names[3]] + np.float32(0.5)
    changed[names[4]] = -embeddings[names[4]]
    found = compare_stores(make("a", embeddings), make("b", changed))
    assert not found.is_equal
    assert (found.num_only_a, found.only_a) == (2, names[:2])
    assert (found.num_only_b, found.only_b) == (1, ["new:dog"])
    assert (found.num_common, found.num_equal, found.num_close, found.num_different) == (
        18,
        15,
        1,
        2,
    )
    worst = {one.sample_id: one for one in found.worst}
    assert worst.keys() == set(names[2:5])
    assert worst[names[3]].max_abs == pytest.approx(0.5, abs=1e-5)
    assert worst[names[4]].max_abs == pytest.approx(2 * np.abs(embeddings[names[4]]).max())
    assert worst[names[4]].cosine == pytest.approx(2)
    assert [one.max_abs for one in found.worst] == sorted(
        (one.max_abs for one in found.worst), reverse=True
    )


ROW = np.full((1, 4), 9.0)


@pytest.mark.parametrize(
    ("in_a", "in_b", "options"),
    [
        ({"new:x": ROW}, {}, {}),
        ({}, {"new:x": ROW}, {}),
        ({}, {"1:x": ROW}, {}),
        ({}, {"1:x": np.ones((2, 4))}, {}),
        ({}, {}, {"provenance": {"torch": "0.1"}}),
        ({}, {}, {"duration": 9.0}),
    ],
    ids=["only in a", "only in b", "value", "shape", "provenance", "config"],
)
def test_any_one_difference_makes_stores_unequal(make, in_a, in_b, options):
    """Of everything compared, a single thing that differs is enough; nothing else is counted."""
    items = {f"{number}:x": np.full((1, 4), number) for number in range(3)}
    a = make("a", {**items, **in_a}, ragged=True)
    found = compare_stores(a, make("b", {**items, **in_b}, ragged=True, **options))
    assert not found.is_equal
    counts = (found.num_only_a, found.num_only_b, found.num_different, found.num_other_shape)
    assert sum(counts) == (not options)


def test_tolerance_decides_what_is_equal(make, embeddings):
    """Last-bit differences are equal by default and different with a tolerance of 0."""
    a = make("a", embeddings)
    b = make("b", {name: np.nextafter(value, 9) for name, value in embeddings.items()})
    assert compare_stores(a, b).is_equal
    found = compare_stores(a, b, tolerance=0.0)
    assert (found.is_equal, found.num_different, len(found.worst)) == (False, 20, 10)


def test_difference_of_just_the_tolerance_is_close(make):
    """The tolerance is the largest difference that counts as none."""
    a, b = make("a", {"1:x": np.zeros(4)}), make("b", {"1:x": np.full(4, 0.5)})
    assert compare_stores(a, b, tolerance=0.5).num_close == 1
    assert compare_stores(a, b, tolerance=0.4999).num_different == 1


def test_the_ten_furthest_are_named(make):
    """Of many that differ, and of many on one side, ten are named: the furthest, and the first."""
    apart = [3, 14, 1, 15, 9, 2, 6, 5, 13, 8, 7, 12, 4, 11, 10]
    items = {f"{number:02d}:x": np.zeros(4) for number in range(15)}
    changed = {f"{number:02d}:x": np.full(4, far) for number, far in enumerate(apart)}
    found = compare_stores(make("a", items), make("b", changed))
    assert [one.max_abs for one in found.worst] == list(range(15, 5, -1))
    more = {f"{number:02d}:y": np.zeros(4) for number in range(12)}
    found = compare_stores(make("c", {**items, **more}), make("d", items))
    assert (found.num_only_a, found.only_a) == (12, sorted(more)[:10])


def test_equal_bytes_of_other_dtypes_are_other_values(make):
    """The two bytes of 1.0 in float16 are 2^-7 in bfloat16: equal checksums say nothing then."""
    a = make("a", {"1:x": np.ones(8)}, dtype="float16")
    b = make("b", {"1:x": np.full(8, 2.0**-7)}, dtype="bfloat16")
    found = compare_stores(a, b)
    assert (found.num_equal, found.num_different) == (0, 1)
    assert found.worst[0].max_abs == 1 - 2.0**-7


def test_cosine_of_nearly_equal_vectors_is_no_less_than_0():
    """Rounding doesn't bring two vectors closer than the same direction."""
    generator = np.random.default_rng(0)
    for _ in range(200):
        vector = generator.normal(size=8).astype(np.float32)
        max_abs, cosine, _ = difference_of(vector, vector * np.float32(1 + 1e-6))
        assert 0 < max_abs < 1e-5
        assert 0 <= cosine < 1e-9


def test_without_values_checksums_tell(make, embeddings):
    """--no-values: equal and unequal bits, no figures; of other dtypes nothing."""
    a = make("a", embeddings)
    b = make("b", {**embeddings, "video_00001:dog": np.zeros(8)})
    found = compare_stores(a, b, values=False)
    assert (found.num_equal, found.num_different, found.worst) == (19, 1, [])
    other = compare_stores(a, make("c", embeddings, dtype="float16"), values=False)
    assert (other.num_common, other.num_equal, other.num_different) == (20, 0, 0)


def test_other_dtypes_are_compared_as_float32(make, embeddings):
    """float32 against float16 and bfloat16: apart by the rounding, and the config says why."""
    a = make("a", embeddings)
    for dtype, rounding in (("float16", 2e-3), ("bfloat16", 2e-2)):
        found = compare_stores(a, make(dtype, embeddings, dtype=dtype), tolerance=rounding)
        assert found.config == {"dtype": ("float32", dtype)}
        assert (found.num_common, found.num_different) == (20, 0)
        assert 0 < found.worst[0].max_abs < rounding


def test_provenance_is_compared(make, embeddings):
    """Other versions are a difference; each is named with both values."""
    a = make(
        "a", embeddings, provenance={"torch": "2.13", "weights_digest": "x", "checkpoint": "/x"}
    )
    b = make("b", embeddings, provenance={"torch": "2.14", "weights_digest": "x"})
    found = compare_stores(a, b)
    assert found.provenance == {"torch": ("2.13", "2.14")}
    provenance = {"imported_at": "2026", "imported_from_2": "x.npz", "imported_from_tool": "x"}
    c = make("c", embeddings, provenance={"torch": "2.13", **provenance})
    d = make("d", embeddings, provenance={"torch": "2.13"})
    assert compare_stores(c, d).provenance == {"imported_from_tool": ("x", None)}
    assert not compare_stores(a, b).is_equal
    assert compare_stores(a, b).num_equal == 20


def test_shapes(make):
    """Free first dimensions are compared one by one; other shapes are counted, equal bytes too."""
    generator = np.random.default_rng(0)
    items = {f"{n}:x": generator.normal(size=(n + 1, 4)) for n in range(6)}
    a = make("a", items, ragged=True)
    b = make("b", {**items, "3:x": items["3:x"][:2], "4:x": items["4:x"] + 1}, ragged=True)
    found = compare_stores(a, b)
    assert (found.num_equal, found.num_other_shape, found.num_different) == (4, 1, 1)
    flat = make("flat", {"1:x": items["1:x"].reshape(-1)})
    folded = make("folded", {"1:x": items["1:x"]})
    assert compare_stores(flat, folded).num_other_shape == 1


def test_zeros_have_a_cosine(make):
    """Two zero vectors don't differ, one zero vector is as far as a right angle."""
    a = make("a", {"1:x": np.zeros(4), "2:x": np.zeros(4)})
    b = make("b", {"1:x": -np.zeros(4), "2:x": np.ones(4)})
    worst = {one.sample_id: one.cosine for one in compare_stores(a, b).worst}
    assert worst == {"1:x": 0.0, "2:x": 1.0}


def test_memory_is_bounded(make):
    """Comparing 64 MiB on each side takes a part of that."""
    values = np.random.default_rng(0).normal(size=(64, 1 << 18)).astype(np.float32)
    a = make("a", {f"{n}:x": value for n, value in enumerate(values)})
    b = make("b", {f"{n}:x": value + 1 for n, value in enumerate(values)})
    done = []
    tracemalloc.start()
    found = compare_stores(a, b, progress=lambda *figures: done.append(figures))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.num_different == 64
    assert peak < 48 << 20
    assert done[-1] == (64, 64)
