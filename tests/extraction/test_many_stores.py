"""Several stores filled by one extraction: the bits and the resuming of one run for each."""

from __future__ import annotations

import json
import signal
from functools import partial

import numpy as np
import pytest
import torch
from extraction.clips import write, write_tones
from extraction.processes import hold_after_puts
from small_modules import Seeded

from lmdbcache import EmbeddingCache, ModuleEmbedder, RankShare, config_for, extract
from lmdbcache.errors import CacheFullError, ConfigError, InvalidEmbeddingError
from lmdbcache.exchange import merge_stores
from lmdbcache.extraction import estimate, plan_extraction, space


class Net(Seeded):
    """Waveforms → frames and their mean. Counts clips; its last bits show the size of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.num_clips = 0

    def forward(self, waveforms):
        self.num_clips += len(waveforms)
        frames = self.layer(waveforms.unflatten(1, (-1, 80))) + 1e-6 * len(waveforms)
        return {"frames": frames, "mean": frames.mean(dim=1)}


def module(**outputs):
    outputs = outputs or {
        "mean": lambda found: found["mean"],
        "frames": lambda found: found["frames"],
    }
    return ModuleEmbedder(Net(), name="net/1", sample_rate=16000, outputs=outputs)


def configs_of(model, *pairs, **options):
    return [
        config_for(model, duration=0.5, output=output, dtype=dtype, **options)
        for output, dtype in pairs
    ]


MODULE_PAIRS = [("mean", "float32"), ("frames", "float16"), ("frames", "float32")]
AST_PAIRS = [
    ("pooler_output", "float32"),
    ("mean", "float16"),
    ("valid_mean", "float32"),
    ("layer:1/mean", "float32"),
    ("last_hidden_state", "float32"),
    ("last_hidden_state", "float16"),
]


def alone(root, model, configs, clips, before=(), **options):
    """What a run for each config reports and stores, after one of the clips in `before`."""
    found = []
    for number, config in enumerate(configs):
        cache = EmbeddingCache(root / f"alone-{number}")
        if before and before[number]:
            extract(cache, config, before[number], model=model, **OPTIONS)
        summary = extract(cache, config, clips, model=model, **{**OPTIONS, **options})
        found.append((summary, values(cache, config)))
    return found


def values(cache, config):
    if config not in cache:
        return {}
    with cache.reader(config) as reader:
        return {sample_id: value.tobytes() for sample_id, value in reader.items()}


def told(summary):
    return {**summary.to_dict(), "store": None, "seconds": 0.0, "compute_seconds": 0.0}


OPTIONS = {"batch_size": 4, "num_workers": 0}


@pytest.mark.parametrize("kind", ["module", "transformers"])
def test_bits_and_passes_of_one_run(kind, cache, clips, bad_clips, ast_folder, tmp_path):
    """Each store has the bits and failures of a separate run, and the model runs once."""
    model = module() if kind == "module" else ast_folder
    configs = configs_of(model, *(MODULE_PAIRS if kind == "module" else AST_PAIRS))
    everything = {**clips, **bad_clips}
    summaries = extract(cache, configs, everything, model=model, **OPTIONS)
    if kind == "module":
        passed = model.module.num_clips
        extract(EmbeddingCache(tmp_path / "one"), configs[0], everything, model=model, **OPTIONS)
        # More are a clip of noise, for the shape of the second output, and two repeats of a clip:
        # so few show enough of an embedding of 800 numbers, and are another batch than eight.
        assert passed == (model.module.num_clips - passed) + 1 + 2
    expected = alone(tmp_path, model, configs, everything)
    for config, summary, (one, bits) in zip(configs, summaries, expected, strict=True):
        assert values(cache, config) == bits
        assert told(summary) == told(one)
        assert summary.store == cache.path(config)
        failed = {failure.sample_id for failure in summary.failures}
        assert set(cache.coverage(config, everything).failed) == failed >= {"text:dog"}
    again = extract(cache, configs, clips, model=model, **OPTIONS)
    assert [(one.num_extracted, one.built_model) for one in again] == [(0, False)] * len(configs)


def test_each_store_gets_what_it_lacks(cache, clips, tmp_path):
    """One lacks parts of units, one everything, one nothing: the bits are those of runs alone."""
    model = module()
    configs = configs_of(model, *MODULE_PAIRS)
    names = sorted(clips)
    before = [{name: clips[name] for name in part} for part in (names[:1] + names[5:8], [], names)]
    for config, part in zip(configs, before, strict=True):
        extract(cache, config, part, model=model, **OPTIONS)
    seen = []
    summaries = extract(
        cache, configs, clips, model=model, progress=lambda *done: seen.append(done), **OPTIONS
    )
    assert [one.num_extracted for one in summaries] == [6, 10, 0]
    assert seen[-1] == (10, 10)
    expected = alone(tmp_path, model, configs, clips, before)
    assert [values(cache, config) for config in configs] == [bits for _, bits in expected]


class Losing(Net):
    """Fails on loud clips in one output, and gives NaN in another."""

    def forward(self, waveforms):
        found = super().forward(waveforms)
        return {**found, "peak": waveforms.abs().amax(dim=1)}


def refused(found):
    if (found["peak"] > 0.8).any():
        raise ValueError("too loud")
    return found["mean"]


def test_killed_between_the_commits_of_two_stores(start, ast_folder, tmp_path):
    """Each store has whole units; run again, both have the bits of separate runs."""
    data = tmp_path / "data"
    write_tones(data, 24)
    outputs = ("pooler_output", "last_hidden_state")
    configs = configs_of(ast_folder, *[(name, "float32") for name in outputs], namespace="vegas")

    def extracted(root, *outputs, prepare=None):
        fixed = ("--model", ast_folder, "--duration", 0.5, "--dataset", "vegas", "--json")
        often = ("--batch-size", 4, "--commit-seconds", 0, "--num-workers", 1)
        named = [part for name in outputs for part in ("--output", name)]
        return start("extract", data, "--root", root, *fixed, *often, *named, prepare=prepare)

    cache, apart = EmbeddingCache(tmp_path / "cache"), EmbeddingCache(tmp_path / "apart")
    killed = extracted(cache.root, *outputs, prepare=partial(hold_after_puts, 5))
    killed.wait_until(killed.is_held)
    killed.signal(signal.SIGKILL)
    killed.wait()
    for config, number in zip(configs, (12, 8), strict=True):
        with cache.reader(config) as reader:
            assert len(reader) == number
    last = extracted(cache.root, *outputs)
    runs = [last, *[extracted(apart.root, name) for name in outputs]]
    for command in runs:
        assert command.wait() == 0, command.err
    assert [one["num_extracted"] for one in json.loads(last.out)] == [12, 16]
    for config in configs:
        assert cache.verify(config).is_sound
        assert values(cache, config) == values(apart, config)


def test_a_clip_that_one_output_fails_on(cache, clips, tmp_path):
    """It is a failure of that store only; the others have it."""
    loud = np.random.default_rng(0).uniform(-0.9, 0.9, 8000).astype(np.float32)
    clips = {**clips, "zz:loud": str(write(tmp_path / "loud.wav", loud))}
    model = ModuleEmbedder(
        Losing(),
        name="net/1",
        sample_rate=16000,
        outputs={
            "mean": lambda found: found["mean"],
            "refused": refused,
            "nan": lambda found: found["mean"].where(found["peak"][:, None] < 0.8, torch.nan),
        },
    )
    configs = configs_of(model, *[(name, "float32") for name in model.outputs])
    summaries = extract(cache, configs, clips, model=model, **OPTIONS)
    expected = alone(tmp_path, model, configs, clips)
    assert [len(one.failures) for one in summaries] == [0, 1, 1]
    assert [told(one) for one in summaries] == [told(one) for one, _ in expected]
    assert [values(cache, config) for config in configs] == [bits for _, bits in expected]


def test_an_output_that_ignores_its_input(cache, clips):
    """Nothing of the model is stored, not even its other output."""
    model = module(
        mean=lambda found: found["mean"], constant=lambda found: torch.ones_like(found["mean"])
    )
    configs = configs_of(model, ("mean", "float32"), ("constant", "float32"))
    with pytest.raises(InvalidEmbeddingError):
        extract(cache, configs, clips, model=model, **OPTIONS)
    assert [values(cache, config) for config in configs] == [{}, {}]


def test_ranks_with_staging(cache, clips, tmp_path):
    """Two ranks stage both stores; merged they are those of one process."""
    model = module()
    configs = configs_of(model, *MODULE_PAIRS)
    for rank in range(2):
        options = {"share": RankShare(rank, 2), "staging": tmp_path / "staging", **OPTIONS}
        summaries = extract(cache, configs, clips, model=model, **options)
        assert len({one.num_extracted for one in summaries}) == 1
    merge_stores(cache, [tmp_path / "staging"])
    expected = alone(tmp_path, model, configs, clips)
    assert [values(cache, config) for config in configs] == [bits for _, bits in expected]


def test_changed_clips_are_replaced_in_every_store(cache, tmp_path):
    model = module()
    configs = configs_of(model, *MODULE_PAIRS)
    clips = write_tones(tmp_path / "data", 5)
    extract(cache, configs, clips, model=model, **OPTIONS)
    write(tmp_path / "data" / "dog" / "audios" / "video_00001.wav", np.full(8000, 0.1, np.float32))
    summaries = extract(cache, configs, clips, model=model, recompute_changed=True, **OPTIONS)
    assert [one.num_extracted for one in summaries] == [1, 1, 1]
    (row,) = {values(cache, configs[0])["video_00001:dog"]}
    with cache.reader(configs[2]) as reader:
        frames = torch.from_numpy(reader["video_00001:dog"].copy())
    np.testing.assert_allclose(frames.mean(dim=0), np.frombuffer(row, np.float32), rtol=1e-5)


def test_the_space_of_all_stores_is_looked_at(cache, clips, monkeypatch):
    """Room for each, and not for all of them, is found out before the model is loaded."""
    model = module()
    configs = configs_of(model, *MODULE_PAIRS)
    most = max(
        space.needed_bytes(clips, shape, config.dtype)
        for config, shape in zip(configs, [(8,), (100, 8), (100, 8)], strict=True)
    )
    monkeypatch.setattr(space, "free_bytes", lambda _: 2 * most)
    monkeypatch.setattr(estimate, "free_bytes", lambda _: 2 * most)
    plans = plan_extraction(cache, configs, clips, model=model, batch_size=4)
    assert not any(plan.fits for plan in plans)
    assert all(plan.bytes_needed <= plan.bytes_free for plan in plans)
    with pytest.raises(CacheFullError):
        extract(cache, configs, clips, model=model, **OPTIONS)
    assert not any(config in cache for config in configs)
    extract(cache, configs[:2], clips, model=model, **OPTIONS)


class OneOutput:
    """An embedder without `embed_outputs`."""

    outputs = ("mean", "frames")
    embedding_shape = (8,)

    def embed(self, features):
        return features[:, :8]

    def provenance(self):
        return {"weights_digest": "0"}


@pytest.mark.parametrize(
    ("change", "named", "options"),
    [
        (lambda _: [], "config", {}),
        (lambda configs: configs * 2, "config", {}),
        (lambda configs: [configs[0], configs[1].replace(duration=1.0)], "duration", {}),
        (lambda configs: [configs[0], configs[1].replace(namespace="x")], "namespace", {}),
        (lambda configs: [configs[0], configs[1].replace(output="x")], "output", {}),
        (lambda configs: configs, "output", {"make_embedder": OneOutput}),
    ],
)
def test_configs_that_no_pass_can_fill(cache, clips, change, named, options):
    """The error names the field; nothing is stored."""
    model = module()
    configs = change(configs_of(model, *MODULE_PAIRS))
    with pytest.raises(ConfigError, match=f"^{named}:"):
        extract(cache, configs, clips, model=model, **OPTIONS, **options)
    assert not cache.root.exists()
