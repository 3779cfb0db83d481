"""AST, wav2vec 2.0 and relatives, Whisper and CLAP give what transformers gives."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import transformers
from embedders.small_folders import VARIANTS, folder_of

from lmdbcache import config_for
from lmdbcache.embedders import FrontEnd, compute_features, find_model
from lmdbcache.embedders.families import FAMILIES
from lmdbcache.errors import ConfigError

DURATION = 1.0


def clip_of(seed: int, num_samples: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, num_samples).astype(np.float32)


def padded(clip: np.ndarray, num_samples: int) -> np.ndarray:
    return np.pad(clip, (0, num_samples - len(clip)))


def inputs_by_hand(folder, clip: np.ndarray, num_samples: int):
    """What the model's own extractor gives for one clip."""
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    if isinstance(extractor, transformers.ASTFeatureExtractor):
        clip = padded(clip, num_samples)  # its stores hold clips that are padded before it
    options = {"sampling_rate": extractor.sampling_rate, "return_tensors": "pt"}
    if isinstance(extractor, transformers.Wav2Vec2FeatureExtractor):
        options |= {"padding": "max_length", "max_length": num_samples}
    return extractor(clip, **options)


def outputs_by_hand(folder, clip: np.ndarray, num_samples: int) -> dict[str, torch.Tensor]:
    inputs = inputs_by_hand(folder, clip, num_samples)
    kind = transformers.AutoConfig.from_pretrained(folder).model_type
    with torch.no_grad():
        if kind == "clap":
            model = transformers.ClapAudioModelWithProjection.from_pretrained(folder)
            pooled = model.audio_model(**inputs)
            hidden = pooled.last_hidden_state[0]
            repeated = len(clip) * (96000 // len(clip)) / 96000  # 2 s instead of 10
            steps = math.ceil(hidden.shape[-1] * repeated)
            return {
                "pooler_output": pooled.pooler_output[0],
                "audio_embeds": model(**inputs).audio_embeds[0],
                "last_hidden_state": hidden,
                "valid_mean": hidden[:, :, :steps].mean(dim=(1, 2)),
            }
        model = transformers.AutoModel.from_pretrained(folder)
        if kind == "audio-spectrogram-transformer":
            result = model(**inputs)
            hidden = result.last_hidden_state[0]
            pooled = {"pooler_output": result.pooler_output[0], "last_hidden_state": hidden}
            frames = 1 + (len(clip) - 400) // 160
            steps = (frames - 16) // 10 + 1
            patches = hidden[2:].reshape(12, -1, hidden.shape[-1])
            valid = patches[:, :steps].mean(dim=(0, 1))
            return {**pooled, "mean": hidden[2:].mean(dim=0), "valid_mean": valid}
        model = model.encoder if kind == "whisper" else model
        hidden = model(**inputs).last_hidden_state[0]
        if kind == "whisper":
            valid = model._get_feat_extract_output_lengths(-(-len(clip) // 160))
        else:
            valid = model._get_feat_extract_output_lengths(torch.tensor(len(clip)))
        frames = valid if "attention_mask" in inputs else len(hidden)
    return {
        "last_hidden_state": hidden,
        "mean": hidden[:frames].mean(dim=0),
        "valid_mean": hidden[:valid].mean(dim=0),
    }


# CLAP repeats the short one four times and leaves the rest empty.
@pytest.mark.parametrize("share", [1.0, 0.41], ids=["full", "short"])
@pytest.mark.parametrize("variant", ["ast", *VARIANTS])
def test_equals_transformers_by_hand(variant, share):
    """Every output of a clip that fills the duration, and of one that doesn't."""
    folder = folder_of(variant)
    model = find_model(folder)
    num_samples = round(model.sample_rate * DURATION)
    clip = clip_of(0, round(num_samples * share))
    expected = outputs_by_hand(folder, clip, num_samples)
    assert set(expected) == set(model.outputs)
    for output in model.outputs:
        config = config_for(folder, output=output, duration=DURATION)
        front_end, embedder = model.make_front_end(config), model.make_embedder(config, "cpu")
        assert isinstance(front_end, FrontEnd)
        features = compute_features(front_end, padded(clip, num_samples), len(clip))
        embedding = embedder.embed(torch.from_numpy(features)[None], [len(clip)])[0]
        assert tuple(embedding.shape) == embedder.embedding_shape == model.embedding_shape(config)
        torch.testing.assert_close(embedding, expected[output], atol=2e-6, rtol=2e-6)


def hidden_states(embedder, features: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What transformers gives with `output_hidden_states`, for a batch of features."""
    family, model = embedder.family, embedder._model
    options = {"output_hidden_states": True}
    with torch.no_grad():
        if family.name == "CLAP":
            options["is_longer"] = torch.full((len(features), 1), model.config.enable_fusion)
            return model.audio_model(features, **options).hidden_states
        lengths = family.told_valid(features)
        if lengths is not None:
            features = features[:, :-1]
            positions = torch.arange(features.shape[1])
            options["attention_mask"] = (positions < torch.tensor(lengths)[:, None]).long()
        return model(features, **options).hidden_states


def own_frames(embedder, layer: torch.Tensor, num_valid: int) -> torch.Tensor:
    """The vectors (n, width) of a layer that the clip's sound fills, one by one."""
    family, model = embedder.family, embedder._model
    if family.name == "CLAP":
        _, rows, columns = layer.shape
        bins, steps = rows // 4, 4 * columns
        filled = num_valid * (96000 // num_valid) / 96000
        return torch.stack(
            [
                layer[:, row, column]
                for row in range(rows)
                for column in range(columns)
                if row // bins * columns + column < steps * filled
            ]
        )
    if family.name == "AST":
        steps = (1 + (num_valid - 400) // 160 - 16) // 10 + 1
        return layer[2:].reshape(12, -1, layer.shape[-1])[:, : max(1, steps)].flatten(0, 1)
    if family.name == "Whisper":
        return layer[: model._get_feat_extract_output_lengths(-(-num_valid // 160))]
    before = {"add_adapter": False} if getattr(model.config, "add_adapter", False) else {}
    return layer[: model._get_feat_extract_output_lengths(torch.tensor(num_valid), **before)]


@pytest.mark.parametrize("variant", ["ast", *VARIANTS])
def test_layers_are_those_of_transformers(variant):
    """Bit for bit its `output_hidden_states`, though the pass ends early; means of own frames."""
    model = find_model(folder_of(variant))
    config = config_for(folder_of(variant), duration=DURATION)
    front_end, size = model.make_front_end(config), config.num_samples
    valid = [size, round(size * 0.36)]
    clips = [compute_features(front_end, padded(clip_of(n, n), size), n) for n in valid]
    features = torch.from_numpy(np.stack(clips))

    def embedded(output: str) -> torch.Tensor:
        chosen = config.replace(output=output)
        embedder = model.make_embedder(chosen, "cpu")
        found = embedder.embed(features, valid)
        assert tuple(found.shape[1:]) == embedder.embedding_shape == model.embedding_shape(chosen)
        return found

    embedder = model.make_embedder(config, "cpu")
    expected = hidden_states(embedder, features)
    with pytest.raises(ConfigError):
        model.check(config.replace(output=f"layer:{len(expected)}/mean"))
    for number, layer in enumerate(expected):
        assert torch.equal(embedded(f"layer:{number}"), layer)
        of_valid = embedded(f"layer:{number}/valid_mean")
        for row, count in enumerate(valid):
            own = own_frames(embedder, layer[row], count).mean(dim=0)
            torch.testing.assert_close(of_valid[row], own, atol=1e-6, rtol=1e-5)
    if variant.startswith("clap"):
        with pytest.raises(ConfigError):
            model.check(config.replace(output="layers/mean"))
        return
    assert torch.equal(embedded("layers"), torch.stack(expected, dim=1))
    means = embedded("layers/mean")
    for number, mean in enumerate(means.unbind(dim=1)):
        assert torch.equal(embedded(f"layer:{number}/mean"), mean)
        frames = expected[number][0][2 if variant == "ast" else 0 :]
        torch.testing.assert_close(mean[0], frames.mean(dim=0), atol=1e-6, rtol=1e-5)


def test_a_pass_ends_at_the_last_layer_that_is_asked_for():
    """The blocks behind it aren't called."""
    model = find_model(folder_of("wav2vec2"))
    config = config_for(folder_of("wav2vec2"), duration=DURATION, output="layer:1/mean")
    embedder = model.make_embedder(config, "cpu")
    embedder._model.encoder.layers[1].register_forward_hook(lambda *_: pytest.fail("called"))
    embedder.embed(torch.zeros(1, config.num_samples))


@pytest.mark.parametrize(
    "variant", ["ast", "wav2vec2", "wav2vec2-masked", "whisper", "clap", "clap-fused"]
)
def test_features_are_those_of_the_extractor(variant):
    """To the last bit; what is random about an extractor has no part in it."""
    folder = folder_of(variant)
    model = find_model(folder)
    num_samples = round(model.sample_rate * DURATION)
    front_end = model.make_front_end(config_for(folder, duration=DURATION))
    for length in (num_samples, num_samples // 3):
        clip = clip_of(length, length)
        inputs = inputs_by_hand(folder, clip, num_samples)
        expected = inputs["input_values" if "input_values" in inputs else "input_features"]
        features = compute_features(front_end, padded(clip, num_samples), length)
        if variant == "wav2vec2-masked":
            features, frames = features[:-1], features[-1]
            assert frames == {16000: 49, 5333: 16}[length]
        np.testing.assert_array_equal(features, expected[0].numpy())


@pytest.mark.parametrize("variant", ["wav2vec2-masked", "wavlm-masked", "data2vec-audio"])
def test_a_mask_makes_the_duration_irrelevant(variant):
    """A short clip's mean is the same, however many zeros follow it."""
    folder, clip = folder_of(variant), clip_of(1, 9000)
    means = []
    for duration in (0.75, 1.5):
        config = config_for(folder, duration=duration)
        model = find_model(folder)
        features = model.make_front_end(config)(padded(clip, config.num_samples), num_valid=9000)
        embedder = model.make_embedder(config, "cpu")
        means.append(embedder.embed(torch.from_numpy(features)[None]))
    torch.testing.assert_close(*means, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("variant", ["ast", "wav2vec2-masked", "whisper", "clap"])
def test_lower_compute_dtype(variant):
    """Close to float32, not equal to it."""
    model = find_model(folder_of(variant))
    config = config_for(folder_of(variant), duration=DURATION)
    clip = clip_of(2, config.num_samples)
    features = torch.from_numpy(model.make_front_end(config)(clip))[None]
    exact, lower = (
        model.make_embedder(config.replace(compute_dtype=dtype), "cpu").embed(features)
        for dtype in ("float32", "bfloat16")
    )
    assert lower.dtype == torch.float32
    assert 0 < (exact - lower).norm() / exact.norm() < 0.3


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["ast", *VARIANTS])
def test_a_gpu_agrees_with_the_cpu(variant):
    """float32 means float32 on a GPU too, a padded clip in the batch included."""
    model = find_model(folder_of(variant))
    config = config_for(folder_of(variant), duration=DURATION)
    front_end, size = model.make_front_end(config), config.num_samples
    clips = [(clip_of(1, size), size), (padded(clip_of(2, size // 2), size), size // 2)]
    features = torch.from_numpy(np.stack([front_end(*clip) for clip in clips]))
    on_cpu, on_gpu = (model.make_embedder(config, d).embed(features) for d in ("cpu", "cuda"))
    torch.testing.assert_close(on_gpu, on_cpu, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", ["ast", "wav2vec2"])
def test_half_precision_weights_compute_in_float32(variant, tmp_path):
    """transformers 5 would otherwise run the model in the checkpoint's own dtype."""
    source = folder_of(variant)
    transformers.AutoModel.from_pretrained(source).half().save_pretrained(tmp_path)
    transformers.AutoFeatureExtractor.from_pretrained(source).save_pretrained(tmp_path)
    config = config_for(tmp_path, duration=DURATION)
    embedder = find_model(tmp_path).make_embedder(config, "cpu")
    assert {p.dtype for p in embedder._model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("family", "model_type", "config", "output", "shape"),
    [
        ("AST", "audio-spectrogram-transformer", {}, "last_hidden_state", (1214, 768)),
        ("wav2vec 2.0", "wav2vec2", {}, "last_hidden_state", (249, 768)),
        ("wav2vec 2.0", "hubert", {"hidden_size": 1024}, "mean", (1024,)),
        ("Whisper", "whisper", {"d_model": 1280}, "last_hidden_state", (1500, 1280)),
        ("Whisper", "whisper", {"d_model": 512}, "mean", (512,)),
        ("CLAP", "clap", {}, "pooler_output", (768,)),
        ("CLAP", "clap", {}, "audio_embeds", (512,)),
        ("CLAP", "clap", {}, "last_hidden_state", (768, 2, 32)),
    ],
)
def test_shapes_of_the_published_models(family, model_type, config, output, shape, tmp_path):
    """Known from config.json, of which old ones leave out what is the default."""
    (found,) = [known for known in FAMILIES if known.name == family]
    model = found(tmp_path, {"model_type": model_type, **config}, {}, 16000)
    assert model.embedding_shape(output, 80000) == shape


def test_the_default_settings_are_those_of_transformers(tmp_path):
    """A config.json without sizes means transformers' defaults, here as there."""
    classes = {
        "wav2vec2": transformers.Wav2Vec2Config,
        "hubert": transformers.HubertConfig,
        "wavlm": transformers.WavLMConfig,
        "data2vec-audio": transformers.Data2VecAudioConfig,
        "unispeech": transformers.UniSpeechConfig,
        "unispeech-sat": transformers.UniSpeechSatConfig,
        "wav2vec2-conformer": transformers.Wav2Vec2ConformerConfig,
        "whisper": transformers.WhisperConfig,
        "clap": transformers.ClapConfig,
    }
    for model_type, kind in classes.items():
        (family,) = [known for known in FAMILIES if model_type in known.model_types]
        short = family(tmp_path, {"model_type": model_type}, {}, 16000)
        full = family(tmp_path, kind().to_dict(), {"truncation": "rand_trunc"}, 16000)
        full.check_settings()
        for output in family.outputs:
            shapes = [one.embedding_shape(output, 80000) for one in (short, full)]
            assert shapes[0] == shapes[1]
