"""Keys: one for each sample id, and the same one for equal ids."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, strategies as st

from lmdbcache.errors import InvalidSampleIdError
from lmdbcache.storage import (
    canonical_sample_id,
    join_sample_id,
    sample_id_of_key,
    sample_key,
    split_sample_id,
)
from lmdbcache.storage.layout import CHECKSUMS_NAME, METADATA_KEY, sample_keys

text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)
file_ids = text.map(lambda value: value[:60])
class_names = text.map(lambda value: value.replace(":", "_")[:40])
pairs = st.tuples(file_ids, class_names)


def canonical(pair):
    lower = unicodedata.normalize("NFC", pair[1]).lower()
    return unicodedata.normalize("NFC", pair[0]), unicodedata.normalize("NFC", lower)


@given(pairs, pairs)
def test_keys_are_injective(first, second):
    """Two samples share a key only if file id and class are equal in canonical form."""
    same_key = sample_key(":".join(first)) == sample_key(":".join(second))
    assert same_key == (canonical(first) == canonical(second))


@given(pairs)
def test_key_gives_back_the_sample_id(pair):
    """The stored key is the canonical sample id; storing that changes nothing."""
    stored = sample_id_of_key(sample_key(":".join(pair)))
    assert stored == join_sample_id(*pair) == canonical_sample_id(stored)
    assert sample_key(stored) == sample_key(":".join(pair))
    assert split_sample_id(stored) == canonical(pair)


@given(pairs)
def test_no_key_is_a_reserved_name(pair):
    """An embedding can't overwrite the metadata or the checksums."""
    key = sample_key(":".join(pair))
    assert b":" in key
    assert key not in (METADATA_KEY, CHECKSUMS_NAME)


@given(st.lists(st.one_of(pairs.map(":".join), st.from_regex(r"[ -~\n]{0,4}:[a-zB:]{0,3}"))))
def test_keys_of_several_ids_are_those_of_each(sample_ids):
    """However many ids are looked at together, and whichever of them isn't canonical."""
    try:
        expected = list(map(sample_key, sample_ids))
    except InvalidSampleIdError:
        with pytest.raises(InvalidSampleIdError):
            sample_keys(sample_ids)
    else:
        assert sample_keys(sample_ids) == expected


def test_two_forms_of_an_accent_are_one_key():
    """NFD, as macOS lists file names, meets NFC."""
    assert sample_key("cafe\u0301:dog") == sample_key("caf\u00e9:dog") == "café:dog".encode()


def test_the_last_colon_splits():
    """A file id may hold colons, a class may not."""
    assert split_sample_id("a:b:c") == ("a:b", "c")
    assert join_sample_id("a:b", "C") == "a:b:c"
    with pytest.raises(InvalidSampleIdError):
        join_sample_id("a", "b:c")


def test_lower_case_of_a_class_is_canonical_too():
    """A capital whose small letter composes with the accent behind it is that one letter."""
    assert sample_key("a:\u03aa\u0301") == sample_key("a:\u0390")


def test_class_is_lower_case_and_file_id_is_not():
    """`Dog` and `dog` are one class, `A` and `a` two files."""
    assert sample_key("A:Dog") == sample_key("A:dog") != sample_key("a:dog")
    assert sample_keys(["a:Dog", "A:dog"]) == [b"a:dog", b"A:dog"]


@pytest.mark.parametrize(
    "sample_id",
    [
        *("", "no colon", ":dog", "a:", ":", "a\0b:dog", "a:d\0g", "\udcff:dog"),
        *("x" * 508 + ":dog", "é" * 254 + ":dog", 5, None, b"a:dog", ("a", "dog")),
    ],
)
def test_unusable_sample_ids_are_refused(sample_id):
    """No colon, an empty part, NUL, lone surrogates, over 511 bytes, not text."""
    with pytest.raises(InvalidSampleIdError):
        sample_key(sample_id)
    with pytest.raises(InvalidSampleIdError):
        sample_keys(["a:dog", sample_id])


def test_the_longest_key_is_511_bytes():
    """511 bytes of UTF-8 fit."""
    assert len(sample_key("x" * 507 + ":dog")) == 511
