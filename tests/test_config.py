"""A config's identity: equal meanings are one fingerprint, everywhere and for ever."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

import lmdbcache
from lmdbcache import CacheConfig
from lmdbcache.config import DEFAULT_FRONT_END, DEFAULT_MODEL_NAME, UNSTATED_FRONT_END, ModelName
from lmdbcache.errors import ConfigError

PYTHONS = [sys.executable, *map(str, Path.home().glob(".pyenv/versions/3.1?.*/bin/python"))]

# Stores that exist are found under these names: never change a line.
GOLDEN = [
    (
        {},
        "d9ec284310aafd0a",
        "ast-finetuned-audioset-10-10-0.4593-pooler-output-16000hz-5s-float32",
    ),
    (
        {"model_name": "ast", "output": "last_hidden_state", "dtype": "float16"},
        "61b5ba5237202aaf",
        "ast-finetuned-audioset-10-10-0.4593-last-hidden-state-16000hz-5s-float16",
    ),
    (
        {"sample_rate": 44100, "duration": 10.24, "dataset": "VEGAS"},
        "2b5463ff50555938",
        "vegas-ast-finetuned-audioset-10-10-0.4593-pooler-output-44100hz-10.24s-float32",
    ),
    (
        {"model_name": "schöner/名前", "dtype": "bfloat16", "front_end": DEFAULT_FRONT_END},
        "a326d87dd211d34b",
        "pooler-output-16000hz-5s-bfloat16",
    ),
    (
        {
            "model_name": "facebook/wav2vec2-base",
            "duration": 0.1,
            "front_end": "soundfile/2",
            "compute_dtype": "bfloat16",
            "output": "mean",
        },
        "31033d3ebecbf9cd",
        "wav2vec2-base-mean-16000hz-0.1s-float32",
    ),
    (
        {"window": 10, "hop": 2.5},
        "58f0e22bf0573dc6",
        "ast-finetuned-audioset-10-10-0.4593-pooler-output-16000hz-10s-every-2.5s-float32",
    ),
]

# Only the standard library below: config.py and errors.py without the package around them.
PRINT_FINGERPRINTS = """
import ast, importlib.util, sys, types
folder, golden = sys.argv[1], ast.literal_eval(sys.argv[2])
sys.modules["lmdbcache"] = package = types.ModuleType("lmdbcache")
package.__path__ = [folder]
from lmdbcache.config import CacheConfig
print(*[CacheConfig(**fields).fingerprint for fields in golden])
"""


@pytest.mark.parametrize(("fields", "fingerprint", "slug"), GOLDEN)
def test_fingerprint_and_slug_never_change(fields, fingerprint, slug):
    """A release reads the stores of every earlier one."""
    assert CacheConfig(**fields).fingerprint == fingerprint
    assert CacheConfig(**fields).slug == slug


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("hash_seed", ["1", "4242"])
def test_fingerprint_is_the_same_in_every_process(python, hash_seed):
    """Neither the hash seed nor the Python version is part of the fingerprint."""
    folder = Path(lmdbcache.__file__).parent
    printed = subprocess.run(
        [python, "-c", PRINT_FINGERPRINTS, folder, repr([fields for fields, _, _ in GOLDEN])],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert printed.split() == [fingerprint for _, fingerprint, _ in GOLDEN]


@pytest.mark.parametrize("name", ["ast", "AST", " ast-finetuned ", DEFAULT_MODEL_NAME.upper()])
def test_aliases_of_the_model_are_one_model(name):
    """The short names stand for the full one, in any case."""
    assert CacheConfig(model_name=name) == CacheConfig()
    assert CacheConfig(model_name=name).model_name == DEFAULT_MODEL_NAME


@pytest.mark.parametrize(
    "five",
    [
        5,
        np.int64(5),
        np.float32(5),
        np.float64(5),
        np.array(5),
        Fraction(5),
        torch.tensor(5),
        torch.tensor(5.0),
    ],
)
def test_equal_numbers_are_one_duration(five):
    """5 and 5.0 of any library are the same config, with a plain float inside."""
    config = CacheConfig(duration=five)
    assert (config, hash(config), config.fingerprint) == (
        CacheConfig(),
        hash(CacheConfig()),
        CacheConfig().fingerprint,
    )
    assert type(config.duration) is float


@pytest.mark.parametrize(
    "rate",
    [
        16000.0,
        np.int32(16000),
        np.float32(16000),
        np.float64(16000),
        np.array(16000),
        torch.tensor(16000),
        torch.tensor(16000.0),
    ],
)
def test_equal_numbers_are_one_sample_rate(rate):
    """A whole number of Hz of any type is a plain int inside."""
    config = CacheConfig(sample_rate=rate)
    assert config == CacheConfig()
    assert type(config.sample_rate) is int


@pytest.mark.parametrize("dtype", ["float16", torch.float16, np.float16, np.dtype("<f2")])
def test_equal_dtypes_are_one_dtype(dtype):
    """torch's, numpy's and the plain name are the same dtype."""
    assert CacheConfig(dtype=dtype).dtype == "float16"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sample_rate", 0),
        ("sample_rate", -1),
        ("sample_rate", 16000.5),
        ("sample_rate", True),
        ("sample_rate", np.bool_(True)),
        ("sample_rate", "16000"),
        ("sample_rate", None),
        ("sample_rate", 10**30),
        ("sample_rate", np.array([16000, 16000])),
        ("duration", 0),
        ("duration", -5.0),
        ("duration", float("nan")),
        ("duration", float("inf")),
        ("duration", 10**400),
        ("duration", True),
        ("duration", "5"),
        ("duration", 1e-9),
        ("model_name", ""),
        ("model_name", "  "),
        ("model_name", None),
        ("model_name", "a\0b"),
        ("model_name", "\ud800"),
        ("output", ""),
        ("output", "a b"),
        ("output", "../x"),
        ("output", "x" * 129),
        ("dtype", "float64"),
        ("dtype", None),
        ("dtype", torch.int16),
        ("namespace", "a:b"),
        ("namespace", None),
        ("front_end", ""),
        ("compute_dtype", "int8"),
    ],
)
def test_refused_value_names_its_field(field, value):
    """A value that can't identify a cache is refused, with the field's name in front."""
    with pytest.raises(ConfigError, match=rf"^{field}: "):
        CacheConfig(**{field: value})


def test_every_field_is_identity():
    """Configs that differ in any field have different fingerprints."""
    changes = {
        "sample_rate": 8000,
        "duration": 4.0,
        "model_name": "other/model",
        "output": "mean",
        "dtype": "float16",
        "dataset": "vegas",
        "front_end": "other/1",
        "compute_dtype": "float16",
    }
    configs = [CacheConfig(), *(CacheConfig().replace(**{k: v}) for k, v in changes.items())]
    assert set(changes) == set(CacheConfig().to_dict())
    assert len({config.fingerprint for config in configs}) == len(configs)
    assert len(set(configs)) == len(configs)


WINDOWED = {"window": 2, "hop": 0.5, "last_window": "align"}


def test_windows_are_identity_and_their_absence_is_none():
    """Each field of windows makes another store; what is left out has one default."""
    config = CacheConfig(**WINDOWED)
    others = [config.replace(window=3), config.replace(hop=1), config.replace(last_window="drop")]
    plain = CacheConfig(duration=2)
    assert len({each.fingerprint for each in (config, *others, plain)}) == 5
    assert (config.duration, config.num_samples, config.hop_samples) == (2.0, 32000, 8000)
    assert CacheConfig(window=2) == CacheConfig(window=2, hop=2.0, duration=2, last_window="pad")
    assert set(config.to_dict()) - set(plain.to_dict()) == set(WINDOWED)
    assert config.replace(window=None) == plain == CacheConfig(window=None, duration=2)
    assert config.replace(duration=1).window == config.replace(window=1).duration == 1.0
    assert plain.replace(window=4) == CacheConfig(window=4)
    assert CacheConfig.from_dict(config.to_dict()) == pickle.loads(pickle.dumps(config)) == config
    assert config.differences(plain) == {
        "window": (2.0, None),
        "hop": (0.5, None),
        "last_window": ("align", "pad"),
    }


@pytest.mark.parametrize(
    "fields",
    [
        {"duration": 5.0, "window": 2.0},
        {"hop": 1.0},
        {"last_window": "drop"},
        {"window": 1, "last_window": "cut"},
        {"window": 0},
        {"window": 1, "hop": 0.0009},
        {"window": 1, "hop": 0.004, "sample_rate": 100},
        {"window": 1, "sample_rate": 1_000_001},
    ],
)
def test_windows_that_contradict_each_other_are_refused(fields):
    """The first field given is the one that the message names, but for the sample rate."""
    with pytest.raises(ConfigError, match=r"^(duration|hop|last_window|window): "):
        CacheConfig(**fields)


def test_config_survives_pickle_and_dict():
    """A config comes back equal from pickle and from its dict."""
    config = CacheConfig(duration=2.5, namespace="Vegas", dtype=torch.bfloat16)
    assert pickle.loads(pickle.dumps(config)) == config
    assert CacheConfig.from_dict(config.to_dict()) == config


def test_a_namespace_is_read_under_its_name_on_disk():
    """`dataset`, as stores and JSON call it, is the same field everywhere."""
    config = CacheConfig(namespace="vegas")
    assert CacheConfig(dataset="VEGAS") == CacheConfig().replace(dataset="vegas") == config
    assert CacheConfig.from_dict({"namespace": "vegas"}) == config
    assert CacheConfig.from_dict(config.to_dict()) == config
    assert config.dataset == config.to_dict()["dataset"] == "vegas"
    assert config.replace(dtype="float16").namespace == "vegas"
    assert config.differences(CacheConfig()) == {"namespace": ("vegas", "")}


def test_from_dict_names_unknown_keys():
    """A misspelt key is refused by name, not dropped."""
    with pytest.raises(ConfigError, match="sample_rat"):
        CacheConfig.from_dict({"sample_rat": 1})


def test_config_is_immutable():
    """A field can't be changed after construction."""
    with pytest.raises(AttributeError):
        CacheConfig().duration = 3.0


def test_differences_are_the_differing_fields():
    """`differences` gives own value and the other's, for these fields only."""
    mine, theirs = CacheConfig(duration=5), CacheConfig(duration=10, dtype="float16")
    assert mine.differences(theirs) == {"duration": (5.0, 10.0), "dtype": ("float32", "float16")}
    assert mine.differences(mine) == {}


@pytest.mark.parametrize(
    ("rate", "duration", "expected"),
    [
        (44100, 0.33, 14553),
        (44100, 0.57, 25137),  # 25136.999999999996 as floats multiply
        (22050, 0.03, 662),  # 661.5, to the even number
        (3, 0.9, 3),
    ],
)
def test_num_samples_is_the_length_of_the_waveform(rate, duration, expected):
    """Sample rate times duration, to the nearest whole number."""
    assert CacheConfig(sample_rate=rate, duration=duration).num_samples == expected


def test_composed_and_decomposed_letters_are_one_name():
    """A name typed on a Mac (a letter, then its accent) is the same text as anywhere else."""
    composed, decomposed = "sch\u00f6ner/model", "scho\u0308ner/model"
    assert composed != decomposed
    assert CacheConfig(model_name=decomposed) == CacheConfig(model_name=composed)
    assert CacheConfig(model_name=decomposed).model_name == composed


@pytest.mark.parametrize("name", ["ast", "mit/AST-finetuned-audioset-10-10-0.4593"])
def test_asts_front_end_is_assumed_for_ast(name):
    """Its configs have always meant it."""
    assert CacheConfig(model_name=name).front_end == DEFAULT_FRONT_END


def test_any_of_the_published_asts():
    """Other checkpoints of the same authors, under their own names."""
    config = CacheConfig(model_name="MIT/ast-finetuned-speech-commands-v2")
    assert config.front_end == DEFAULT_FRONT_END


@pytest.mark.parametrize(
    "name", ["my-encoder/1", "openai/whisper-tiny", "ast-like/2", "own@0123abcd"]
)
def test_a_front_end_that_isnt_stated_is_recorded_so(name):
    """For any other model, however the config is made."""
    config = CacheConfig(model_name=name)
    assert config.front_end == UNSTATED_FRONT_END
    assert (
        config == CacheConfig.from_dict({"model_name": name}) == pickle.loads(pickle.dumps(config))
    )
    assert CacheConfig.from_dict(config.to_dict()) == config
    assert config.replace(front_end="own/1") == CacheConfig(model_name=name, front_end="own/1")
    assert CacheConfig(front_end="unstated").fingerprint != CacheConfig().fingerprint


def test_a_name_that_knows_its_front_end():
    """It equals the plain name, survives copies, and gives way to what is stated."""
    name = pickle.loads(pickle.dumps(ModelName("own@0123abcd", "own/1")))
    config = CacheConfig(model_name=name)
    assert name == "own@0123abcd"
    assert config == CacheConfig(model_name="own@0123abcd", front_end="own/1")
    assert type(config.model_name) is str
    assert CacheConfig(model_name=name, front_end="other/2").front_end == "other/2"


def test_a_title_names_what_distinguishes_stores():
    """Namespace, model and output; length, windows and dtype where they aren't the default."""
    config = CacheConfig(model_name="m", namespace="v")
    assert config.title == "v m pooler_output"
    assert config.replace(duration=3, dtype="int8").title == "v m pooler_output 3 s int8"
    windows = config.replace(window=2.0, hop=0.5)
    assert windows.title == "v m pooler_output 2 s every 0.5 s"
    assert windows.replace(last_window="align").title.endswith("every 0.5 s align")
