"""A checkpoint's kind, identity and config follow from its files, or from its name on the Hub."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from embedders.small_folders import folder_of
from safetensors.torch import load_file, save_file
from small_ast import save_small_ast

from lmdbcache import CacheConfig, config_for, model_identity
from lmdbcache.embedders import find_model, ready_model
from lmdbcache.embedders.families import FAMILIES
from lmdbcache.errors import ConfigError, ModelLoadError

ALL = ["ast", "wav2vec2", "whisper", "clap"]


@pytest.fixture
def own(tmp_path):
    """A copy of a checkpoint that a test may change."""
    return lambda variant: shutil.copytree(folder_of(variant), tmp_path / variant)


@pytest.fixture
def empty_hub(tmp_path, monkeypatch):
    """No model of the Hub is on this machine, and it can't be asked."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_identities_differ():
    """Between families, outputs and front ends; nothing of it changes from call to call."""
    prints = set()
    configs = []
    for variant in ALL:
        for output in find_model(folder_of(variant)).outputs:
            config = config_for(folder_of(variant), output=output)
            assert config == config_for(folder_of(variant), output=output)
            # The front end alone tells the families apart, too.
            prints |= {config.fingerprint, config.replace(model_name="same").fingerprint}
            configs.append(config)
    # The same name and output of two families is two entries each.
    assert len(prints) == 2 * len(configs)
    assert len({family.front_end_id for family in FAMILIES}) == len(FAMILIES)


def test_asts_configs_stay(empty_hub):
    """The fingerprints of stores that exist are for ever."""
    assert config_for() == config_for("ast") == CacheConfig()
    assert config_for().fingerprint == "d9ec284310aafd0a"
    folder = folder_of("ast")
    assert config_for(folder, namespace="vegas") == CacheConfig(
        model_name=model_identity(folder), namespace="vegas"
    )


@pytest.mark.parametrize("variant", ["ast", "wav2vec2", "whisper", "clap"])
def test_an_unstated_front_end_is_stated_before_an_extraction(variant):
    """A known model's config says what was done; `config_for` makes it."""
    model = find_model(folder_of(variant))
    config = config_for(folder_of(variant), model_name="mine", duration=0.5)
    model.check(config)
    with pytest.raises(ConfigError, match="front_end"):
        model.check(config.replace(front_end="unstated"))


@pytest.mark.parametrize(
    ("variant", "sample_rate", "output"),
    [
        ("ast", 16000, "pooler_output"),
        ("wav2vec2", 16000, "mean"),
        ("whisper", 16000, "mean"),
        ("clap", 48000, "pooler_output"),
    ],
)
def test_what_isnt_said_is_the_models_own(variant, sample_rate, output):
    """Sample rate and output; what is said is kept."""
    config = config_for(folder_of(variant))
    assert (config.sample_rate, config.output) == (sample_rate, output)
    said = config_for(
        folder_of(variant),
        output="last_hidden_state",
        duration=2,
        namespace="d",
        sample_rate=8000,
        dtype="float16",
        compute_dtype="bfloat16",
        model_name="mine",
        front_end="mine/1",
    )
    assert said == CacheConfig(
        8000, 2.0, "mine", "last_hidden_state", "float16", "d", "mine/1", "bfloat16"
    )


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("MIT/ast-finetuned-speech-commands-v2", "AST"),
        ("facebook/wav2vec2-base-960h", "wav2vec 2.0"),
        ("facebook/hubert-large-ls960-ft", "wav2vec 2.0"),
        ("microsoft/wavlm-base-plus", "wav2vec 2.0"),
        ("openai/whisper-large-v3", "Whisper"),
        ("laion/clap-htsat-unfused", "CLAP"),
        ("laion/larger_clap_general", "CLAP"),
    ],
)
def test_published_names_need_no_network(name, family, empty_hub):
    """A store of a well-known model is found where the model isn't."""
    (known,) = [known for known in FAMILIES if known.name == family]
    config = config_for(name)
    assert config.model_name == name
    assert config.front_end == known.front_end_id
    assert config.sample_rate == known.sample_rate
    assert config.output == known.outputs[0]
    assert find_model(name).embedding_shape(config) is None


def test_an_unknown_name_that_cant_be_looked_up(empty_hub):
    """Is an error and not a guess."""
    with pytest.raises(ModelLoadError, match="owner/mystery"):
        config_for("owner/mystery")


def hub_copy(hub, name, folder, *, weights):
    """A model as the Hub's local cache keeps it."""
    repository = hub / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    for file in folder.iterdir():
        if weights or file.suffix == ".json":
            shutil.copy(file, snapshot)


@pytest.mark.parametrize("weights", [True, False])
def test_the_hubs_local_copy_is_believed_before_the_name(empty_hub, weights):
    """config.json says what it is, whether the weights are there or not."""
    hub_copy(empty_hub, "owner/whisper-like-clap", folder_of("clap"), weights=weights)
    model = find_model("owner/whisper-like-clap")
    assert model.family.name == "CLAP"
    config = config_for("owner/whisper-like-clap", duration=1.0)
    assert config.sample_rate == 48000
    assert model.embedding_shape(config) == (64,)
    if weights:
        assert ready_model("owner/whisper-like-clap", config).checkpoint.is_local
    else:
        with pytest.raises(ModelLoadError, match="owner/whisper-like-clap"):
            ready_model("owner/whisper-like-clap", config)


def test_an_unknown_kind_names_the_known_ones_and_the_way_out(own):
    """As a ModelLoadError of one line."""
    folder = own("wav2vec2")
    edit(folder / "config.json", model_type="bert")
    with pytest.raises(ModelLoadError) as caught:
        config_for(folder)
    message = str(caught.value)
    assert "model_type 'bert'" in message
    assert all(family.name in message for family in FAMILIES)
    assert "ModuleEmbedder" in message
    assert "\n" not in message


@pytest.mark.parametrize("variant", ALL)
def test_an_output_that_isnt_there(variant):
    """The error names those that are."""
    model = find_model(folder_of(variant))
    with pytest.raises(ConfigError) as caught:
        model.check(config_for(folder_of(variant), output="logits", duration=0.5))
    assert str(caught.value).startswith("output: 'logits'; ")
    assert all(output in str(caught.value) for output in model.outputs)


@pytest.mark.parametrize("variant", ALL[1:])
def test_the_front_end_of_another_family_is_refused(variant):
    """A default config would store these embeddings as AST's."""
    config = CacheConfig(output=find_model(folder_of(variant)).outputs[0], duration=0.5)
    with pytest.raises(ConfigError, match="front_end"):
        ready_model(folder_of(variant), config)
    ready_model(folder_of(variant), config.replace(front_end="my-own-name/1"))


@pytest.mark.parametrize(("variant", "limit"), [("ast", 1.28), ("whisper", 2), ("clap", 2)])
def test_clips_longer_than_the_model_takes(variant, limit):
    """Are refused: AST and Whisper would drop the end, CLAP take a random part."""
    model = find_model(folder_of(variant))
    model.check(config_for(folder_of(variant), duration=limit))
    with pytest.raises(ConfigError, match=f"{limit} s"):
        model.check(config_for(folder_of(variant), duration=2.5))


def test_the_window_of_the_published_ast(tmp_path):
    """1024 frames are 10.24 s, and no frame of so long a clip is dropped."""
    folder = save_small_ast(tmp_path / "ast", hidden_size=16, num_hidden_layers=1)
    model, config = find_model(folder), config_for(folder, duration=10.24)
    model.check(config)
    with pytest.raises(ConfigError, match="10.24 s"):
        ready_model(folder, config.replace(duration=10.25))
    front_end, clip = model.make_front_end(config), np.zeros(config.num_samples, np.float32)
    silence = front_end(clip)
    clip[-300:] = 0.5
    assert not np.array_equal(front_end(clip), silence)


def test_a_wrong_sample_rate():
    """Names the right one."""
    config = config_for(folder_of("clap"), sample_rate=16000)
    with pytest.raises(ConfigError, match="48000"):
        find_model(folder_of("clap")).make_front_end(config)


@pytest.mark.parametrize(
    ("variant", "file", "changes", "reason"),
    [
        ("ast", "config.json", {"max_length": 1024}, "max_length"),
        ("ast", "preprocessor_config.json", {"num_mel_bins": 64}, "num_mel_bins"),
        ("whisper", "preprocessor_config.json", {"dither": 0.1}, "dither"),
        ("whisper", "preprocessor_config.json", {"feature_size": 128}, "feature_size"),
        ("whisper", "preprocessor_config.json", {"chunk_length": 30}, "number of frames"),
        ("clap", "preprocessor_config.json", {"truncation": "fusion"}, "truncation"),
        ("clap", "preprocessor_config.json", {"feature_size": 64}, "feature_size"),
        ("wav2vec2", "config.json", {"conv_kernel": [10, 3]}, "conv_kernel"),
        (
            "wav2vec2",
            "preprocessor_config.json",
            {"feature_extractor_type": "WhisperFeatureExtractor"},
            "WhisperFeatureExtractor",
        ),
    ],
)
def test_settings_that_dont_fit(variant, file, changes, reason, own):
    """Are refused before anything is loaded."""
    folder = own(variant)
    edit(folder / file, **changes)
    with pytest.raises(ModelLoadError, match=reason):
        find_model(folder)


@pytest.mark.parametrize("value", [None, 0, -1, 2.5, "x", [], {}, [0], 1 << 70])
@pytest.mark.parametrize("variant", ALL)
def test_damaged_settings(variant, value, own):
    """Any value of any setting: one of our errors, or a config; never another exception."""
    folder = own(variant)
    for file in ("config.json", "preprocessor_config.json"):
        intact = (folder / file).read_text()
        for key in json.loads(intact):
            edit(folder / file, **{key: value})
            try:
                model = find_model(folder)
                config = config_for(folder, duration=0.5)
                model.check(config)
                model.embedding_shape(config)
                assert model.make_front_end(config).min_samples
            except (ConfigError, ModelLoadError):
                pass
            (folder / file).write_text(intact)


def load(folder):
    model = find_model(folder)
    return model.make_embedder(config_for(folder, duration=0.5), "cpu")


@pytest.mark.parametrize(
    ("variant", "key"),
    [
        ("ast", "layernorm.weight"),
        ("wav2vec2", "encoder.layers.0.attention.k_proj.weight"),
        ("whisper", "encoder.conv1.weight"),
        ("clap", "audio_projection.linear1.weight"),
    ],
)
def test_missing_weights_are_refused(variant, key, own):
    """transformers would fill them with random numbers and go on."""
    folder = own(variant)
    weights = load_file(folder / "model.safetensors")
    (name,) = [name for name in weights if name == key or name.endswith(f".{key}")]
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=key):
        load(folder)


@pytest.mark.parametrize(
    ("variant", "prefix"),
    [("wav2vec2", "masked_spec_embed"), ("whisper", "decoder."), ("clap", "text_")],
)
def test_weights_that_inference_doesnt_touch_may_be_missing(variant, prefix, own):
    """Published checkpoints lack them, or have another head instead."""
    folder = own(variant)
    before = load(folder)
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.startswith(prefix)}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    after = load(folder)
    for one, two in zip(before._model.parameters(), after._model.parameters(), strict=True):
        if prefix != "masked_spec_embed" or one.ndim > 1:
            assert torch.equal(one, two)


def test_checkpoints_with_a_head(tmp_path):
    """The encoder inside them is what is run."""
    source = transformers.Wav2Vec2Model.from_pretrained(folder_of("wav2vec2"))
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder_of("wav2vec2"))
    with_head = transformers.Wav2Vec2ForSequenceClassification(source.config)
    with_head.wav2vec2.load_state_dict(source.state_dict())
    for part in (with_head, extractor):
        part.save_pretrained(tmp_path)
    loaded = load(tmp_path)._model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in source.state_dict().items())


def test_pickled_code_never_runs(own, tmp_path):
    """A pytorch_model.bin that is a malicious pickle is refused, not executed."""
    victim = tmp_path / "executed"

    class Malicious:
        def __reduce__(self):
            return (open, (str(victim), "w"))

    folder = own("wav2vec2")
    (folder / "model.safetensors").unlink()
    torch.save({"x": Malicious()}, folder / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match=str(folder)):
        load(folder)
    assert not victim.exists()


def test_provenance():
    """Weights and implementation are told, so that two of them never meet in one store."""
    for variant in ALL:
        config = config_for(folder_of(variant), duration=0.5)
        model = find_model(folder_of(variant))
        embedder = model.make_embedder(config, "cpu").provenance()
        front_end = model.make_front_end(config).provenance()
        assert embedder["weights_digest"] == model.checkpoint.weights_digest
        known = ("torchaudio", "numpy") if variant == "ast" else (model.family.extractor_type,)
        assert front_end["feature_extractor"].startswith(known)
        assert front_end["soxr"] != "not installed"
        assert {"torch", "transformers", "device", "compute_dtype"} <= set(embedder)


def test_nothing_heavy_is_imported_for_a_config():
    """Listing commands ask for it."""
    folders = [str(folder_of(variant)) for variant in ALL]
    code = (
        "import sys; from lmdbcache import config_for\n"
        f"for folder in {folders!r}: config_for(folder)\n"
        "assert not {'torch', 'transformers', 'soundfile'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_something_else_than_a_model():
    """A module by itself says neither its name nor its front end."""
    with pytest.raises(ConfigError, match=r"model: a Linear; .*ModuleEmbedder"):
        find_model(torch.nn.Linear(2, 2))
