"""CachedEncoder: what the model returns, computed once, whoever asks."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import textwrap
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_ast import save_small_ast
from storage.child_processes import in_fork, peer_process
from training.encoders import WIDTH, CountingEncoder, build, names_of, waveforms_of

from lmdbcache import CacheConfig, CachedEncoder
from lmdbcache.embedders import ASTEmbedder, ASTFrontEnd, find_checkpoint, weights_digest
from lmdbcache.errors import (
    AudioDecodeError,
    CacheFullError,
    ConfigError,
    InvalidEmbeddingError,
    InvalidSampleIdError,
    ProvenanceMismatchError,
    ReadOnlyCacheError,
)
from lmdbcache.storage.committing import Committer
from lmdbcache.training.frozen_model import state_digest

OWN = CacheConfig(model_name="own", front_end="own/1", output="embedding")


@pytest.fixture
def model():
    return CountingEncoder()


@pytest.fixture
def encoder(cache, model):
    with CachedEncoder(model, cache, OWN) as encoder:
        yield encoder


def direct(numbers):
    return CountingEncoder()(waveforms_of(numbers))


def ask(encoder, numbers):
    return encoder(waveforms_of(numbers), sample_ids=names_of(numbers))


def stored(cache, config=OWN):
    if config not in cache:
        return {}
    with cache.reader(config) as reader:
        return dict(reader)


# ---- hits and misses


def test_returns_what_the_model_returns(encoder, model):
    """In order, without grad; the misses of a batch in one pass, repeats and hits in none."""
    first = ask(encoder, [3, 1, 3, 2])
    torch.testing.assert_close(first, direct([3, 1, 3, 2]), atol=2e-7, rtol=0)
    assert model.passes == [3]
    assert not first.requires_grad
    second = ask(encoder, [5, 1, 4, 5, 2])
    assert model.passes == [3, 2]
    torch.testing.assert_close(second, direct([5, 1, 4, 5, 2]), atol=2e-7, rtol=0)
    assert torch.equal(second[[1, 4]], first[[1, 3]])
    assert torch.equal(second[[0, 2]], direct([5, 4]))  # the same misses, bit for bit
    assert torch.equal(ask(encoder, [2, 3]), first[[3, 0]])
    assert model.passes == [3, 2]
    assert (encoder.num_computed, encoder.num_hits) == (5, 4)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_same_bits_before_and_after_the_commit(cache, model, dtype):
    """Computed, waiting, and read from the store: one value, in float32 whatever is stored."""
    config = OWN.replace(dtype=dtype)
    with CachedEncoder(model, cache, config) as encoder:
        computed = ask(encoder, range(5))
        waiting = ask(encoder, range(5))
        encoder.flush()
        read = ask(encoder, range(5))
    assert torch.equal(computed, waiting)
    assert torch.equal(computed, read)
    assert computed.dtype == torch.float32
    assert torch.equal(computed, direct(range(5)).to(getattr(torch, dtype)).float())
    assert model.passes == [5]


def test_commits_are_few_and_nothing_is_computed_twice(encoder, model, cache):
    """Many small batches wait in memory; close commits them all."""
    for start in range(0, 80, 8):
        ask(encoder, range(start, start + 8))
    assert not stored(cache)
    ask(encoder, range(80))
    assert sum(model.passes) == 80
    encoder.close()
    values = stored(cache)
    assert len(values) == 80
    assert np.array_equal(values["clip_007:x"], direct(range(8))[7].numpy())
    ask(encoder, range(81))  # opens again
    assert sum(model.passes) == 81


def test_commits_by_time(cache, model):
    """What waits for long is committed at the next use, hits included."""
    with CachedEncoder(model, cache, OWN, commit_seconds=0) as encoder:
        ask(encoder, [1])
        assert len(stored(cache)) == 1
    with CachedEncoder(model, cache, OWN, commit_seconds=0.05) as encoder:
        ask(encoder, [2])
        threading.Event().wait(0.06)
        ask(encoder, [1])
        assert len(stored(cache)) == 2


@pytest.mark.parametrize("size", [40_000, 700_000])  # committed in a thread, and at once
def test_large_embeddings(cache, size):
    """Many megabytes a batch are answered in order, too, whichever way they are committed."""
    calls = []

    def model(inputs):
        calls.append(len(inputs))
        return inputs.expand(-1, size) * 1.0

    def numbers(first, last):
        return torch.arange(first, last, dtype=torch.float32)[:, None]

    with CachedEncoder(model, cache, OWN) as encoder:
        for first in range(0, 480, 40) if size < 100_000 else range(0, 8, 4):
            last = first + (40 if size < 100_000 else 4)
            found = encoder(numbers(first, last), sample_ids=names_of(range(first, last)))
            assert torch.equal(found, numbers(first, last).expand(-1, size))
            again = encoder(pytest.fail, sample_ids=names_of(range(last)))
            assert torch.equal(again[:, -1], numbers(0, last)[:, 0])
            del found, again
        assert sum(calls) == last


def test_other_processes_commits_are_hits(encoder, model, cache):
    """What another writer commits meanwhile isn't computed."""
    ask(encoder, [1])
    with cache.writer(OWN) as writer:
        writer.put("clip_002:x", np.full(WIDTH, 7, np.float32))
    assert (ask(encoder, [1, 2])[1] == 7).all()
    assert model.passes == [1]


def test_a_cleared_store_is_filled_again(encoder, model, cache):
    """Its samples are misses, not errors."""
    ask(encoder, [1, 2])
    encoder.flush()
    ask(encoder, [1])
    cache.clear(OWN)
    ask(encoder, [1, 2])  # of the snapshot that is still open
    assert model.passes == [2]
    assert torch.equal(ask(encoder, [1, 2, 3]), direct([1, 2, 3]))
    encoder.flush()
    assert len(stored(cache)) == 3
    assert model.passes == [2, 3]


def test_sample_ids_by_one_rule(encoder, model):
    """Spellings of one sample are one sample; what can't be stored is refused before computing."""
    found = encoder(waveforms_of([1, 1]), sample_ids=["a:Dog", "a:dog"])
    assert model.passes == [1]
    assert torch.equal(found[0], found[1])
    with pytest.raises(InvalidSampleIdError, match="no colon"):
        encoder(waveforms_of([1, 2]), sample_ids=["a:dog", "no colon"])
    assert model.passes == [1]


def test_an_empty_batch(encoder):
    """No samples give no embeddings, of the shape that is stored."""
    assert encoder(waveforms_of([]), sample_ids=[]).shape == (0,)
    ask(encoder, [1])
    encoder.flush()
    assert encoder(waveforms_of([]), sample_ids=[]).shape == (0, WIDTH)


# ---- inputs


def test_hits_load_nothing_and_build_nothing(cache):
    """With lazy inputs and a factory, only what is missing is loaded; the model is built for it."""
    loaded, built = [], []

    def load(number):
        loaded.append(number)
        return waveforms_of([number])[0]

    def make():
        built.append(1)
        return CountingEncoder()

    with CachedEncoder(make, cache, OWN) as encoder:
        loaders = [partial(load, n) for n in (4, 1, 4)]
        found = encoder(loaders, sample_ids=names_of([4, 1, 4]))
        assert loaded == [4, 1]
        torch.testing.assert_close(found, direct([4, 1, 4]), atol=2e-7, rtol=0)
    with CachedEncoder(make, cache, OWN) as encoder:
        encoder([pytest.fail] * 2, sample_ids=names_of([1, 4]))
        assert built == [1]
        asked = []

        def load_all(sample_ids):
            asked.append(sample_ids)
            return waveforms_of([7, 8])

        encoder(load_all, sample_ids=names_of([7, 1, 8]))
    assert asked == [names_of([7, 8])]
    assert built == [1, 1]


def test_kinds_of_inputs(cache):
    """Tensors, arrays, lists and Mappings are cut to the misses; other things are handed on."""
    seen = []

    def model(waveforms, options=None, *, attention_mask, scale):
        seen.append((waveforms.shape, attention_mask.tolist(), options, scale))
        return waveforms * scale

    with CachedEncoder(model, cache, OWN) as encoder:
        numbers = np.arange(3, dtype=np.float32)[:, None] + 1
        encoder(numbers[:1], sample_ids=["0:x"], attention_mask=torch.tensor([0]), scale=2.0)
        found = encoder(
            list(numbers), "as is", sample_ids=["0:x", "1:x", "2:x"],
            attention_mask=torch.tensor([0, 1, 2]), scale=2.0,
        )  # fmt: skip
    assert seen[1] == ((2, 1), [1, 2], "as is", 2.0)
    assert found.tolist() == [[2.0], [4.0], [6.0]]
    with CachedEncoder(lambda batch: batch["x"] + batch["y"], cache, OWN) as encoder:
        batch = {"x": numbers, "y": torch.ones(3, 1)}
        assert encoder(batch, sample_ids=["2:x", "3:x", "4:x"]).tolist() == [[6.0], [3.0], [4.0]]


def test_inputs_that_do_not_fit(encoder):
    """Another number, or other shapes, are named before anything is computed."""
    with pytest.raises(ConfigError, match="3 of them for 2 samples"):
        encoder(waveforms_of([1, 2, 3]), sample_ids=names_of([1, 2]))
    with pytest.raises(ConfigError, match="different shapes"):
        encoder([torch.ones(8), torch.ones(7)], sample_ids=names_of([1, 2]))
    with pytest.raises(ConfigError, match="1 of them for 2 samples"):
        encoder(lambda _: torch.ones(1, 8), sample_ids=names_of([1, 2]))


def test_a_loader_s_error_stores_nothing(encoder, cache):
    """A clip that can't be decoded raises; nothing stands in for it."""

    def broken():
        raise AudioDecodeError("clip.wav: broken")

    with pytest.raises(AudioDecodeError):
        encoder([lambda: torch.ones(8), broken], sample_ids=names_of([1, 2]))
    encoder.close()
    assert not stored(cache)


# ---- models


def test_our_embedder_with_its_front_end(cache, tmp_path):
    """Waveforms in, the embedder's own embeddings out; its weights are noted and compared."""
    checkpoint = find_checkpoint(save_small_ast(tmp_path / "ast", max_length=128))
    config = CacheConfig(model_name=checkpoint.identity, duration=0.5)
    front_end = ASTFrontEnd(checkpoint, 16000)
    waveforms = waveforms_of(range(3), config.num_samples)
    features = torch.from_numpy(np.stack([front_end(row) for row in waveforms.numpy()]))
    expected = ASTEmbedder(checkpoint, device="cpu").embed(features)

    def make():
        return ASTEmbedder(checkpoint, device="cpu")

    with CachedEncoder(make, cache, config, front_end=front_end) as encoder:
        assert torch.equal(encoder(waveforms, sample_ids=names_of(range(3))), expected)
    provenance = cache.info(config).provenance
    assert provenance["weights_digest"] == checkpoint.weights_digest
    assert "feature_extractor" in provenance
    other = find_checkpoint(save_small_ast(tmp_path / "other" / "ast", max_length=128, seed=1))
    with pytest.raises(ConfigError, match="model_name"):
        CachedEncoder(ASTEmbedder(other, device="cpu"), cache, config)
    with pytest.raises(ConfigError, match="output: 'pooler_output' in the config, 'mean'"):
        CachedEncoder(ASTEmbedder(checkpoint, "mean", device="cpu"), cache, config)


def test_a_transformers_model(cache, tmp_path):
    """The output named in the config is taken; the digest isn't its files', which can be told."""
    from transformers import ASTModel

    folder = save_small_ast(tmp_path / "ast", max_length=128)
    model = ASTModel.from_pretrained(folder).eval().requires_grad_(False)
    features = torch.randn(2, 128, 128)
    config = CacheConfig(model_name="own-ast")
    with CachedEncoder(model, cache, config) as encoder:
        found = encoder(input_values=features, sample_ids=names_of([0, 1]))
        assert torch.equal(found, model(features).pooler_output)
    with (
        CachedEncoder(model, cache, config.replace(output="other")) as encoder,
        pytest.raises(ConfigError, match=r"last_hidden_state.*'other'.*select_output"),
    ):
        encoder(features, sample_ids=names_of([0, 1]))
    with CachedEncoder(
        model, cache, config.replace(output="mean"),
        select_output=lambda result: result.last_hidden_state[:, 2:].mean(1),
        provenance={"weights_digest": weights_digest(folder)},
    ) as encoder:  # fmt: skip
        assert encoder(features, sample_ids=names_of([0, 1])).shape == (2, 64)
    digest = cache.info(config.replace(output="mean")).provenance["weights_digest"]
    assert digest == weights_digest(folder)


def test_other_weights_are_refused(encoder, cache):
    """A store filled by one model isn't read or extended with another: at once, or when built."""
    ask(encoder, [1])
    encoder.close()
    with pytest.raises(ProvenanceMismatchError, match="weights_digest"):
        CachedEncoder(CountingEncoder(seed=1), cache, OWN)
    with CachedEncoder(lambda: CountingEncoder(seed=1), cache, OWN) as other:
        assert torch.equal(ask(other, [1]), direct([1]))  # nothing shows it yet
        with pytest.raises(ProvenanceMismatchError, match="provenance="):
            ask(other, [1, 2])
    digest = state_digest(CountingEncoder())
    assert cache.info(OWN).provenance["weights_digest"] == digest == state_digest(build())
    believed = CachedEncoder(
        CountingEncoder(seed=1), cache, OWN, provenance={"weights_digest": digest}
    )
    ask(believed, [1])
    believed.close()
    assert list(stored(cache)) == ["clip_001:x"]


def test_only_a_frozen_model(cache, encoder):
    """Training mode or parameters that require grad are refused, at once and later."""
    trained = CountingEncoder().train()
    with pytest.raises(ConfigError, match=r"training mode.*eval\(\).requires_grad_"):
        CachedEncoder(trained, cache, OWN)
    trained.eval().layer.requires_grad_(True)
    with pytest.raises(ConfigError, match="2 parameters that require grad"):
        CachedEncoder(trained, cache, OWN)
    nested = CountingEncoder()
    nested.dropout.train()
    with pytest.raises(ConfigError, match="training mode"):
        CachedEncoder(nested, cache, OWN)
    thawed = CountingEncoder()
    with CachedEncoder(thawed, cache, OWN) as later:
        later.train()
        ask(later, [1])
        thawed.train()
        with pytest.raises(ConfigError, match="training mode"):
            ask(later, [2])
    built = torch.nn.Linear(8, WIDTH)
    with CachedEncoder(lambda: built, cache, OWN.replace(output="linear")) as from_factory:
        ask(from_factory, [1])
    assert not built.training
    assert not built.weight.requires_grad


def test_what_is_neither_model_nor_factory(cache):
    """Refused with what to write instead."""
    with pytest.raises(ConfigError, match="a str can't be called"):
        CachedEncoder("ast", cache, OWN)
    with pytest.raises(ConfigError, match="Wrap it"):
        CachedEncoder(partial(CountingEncoder, 8), cache, OWN)
    with pytest.raises(ConfigError, match="Wrap it"):
        CachedEncoder(CountingEncoder, cache, OWN)
    with CachedEncoder(lambda: "no model", cache, OWN) as encoder:
        with pytest.raises(ConfigError, match="a str can't be called"):
            ask(encoder, [1])
    layered = CountingEncoder()
    layered.embed = torch.nn.Embedding(2, 2).requires_grad_(False).eval()
    with CachedEncoder(layered, cache, OWN) as encoder:  # a module, whatever its layers are called
        assert torch.equal(ask(encoder, [1]), direct([1]))


# ---- embeddings that can't be stored


def test_nan_is_named_and_the_rest_kept(cache):
    """One sample's NaN is an error for it alone; the others aren't computed again."""
    passes = []

    def model(inputs):
        passes.append(inputs[:, 0].tolist())
        return inputs.clone().masked_fill_(inputs == 2, torch.nan)

    with CachedEncoder(model, cache, OWN) as encoder:
        numbers = torch.arange(4.0)[:, None]
        with pytest.raises(InvalidEmbeddingError, match=r"clip_002:x.*NaN.*other 3"):
            encoder(numbers, sample_ids=names_of(range(4)))
        with pytest.raises(InvalidEmbeddingError, match="clip_002:x"):
            encoder(numbers, sample_ids=names_of(range(4)))
        found = encoder(numbers[[0, 1, 3]], sample_ids=names_of([0, 1, 3]))
    assert passes == [[0.0, 1.0, 2.0, 3.0], [2.0]]
    assert found.tolist() == [[0.0], [1.0], [3.0]]
    assert list(stored(cache)) == names_of([0, 1, 3])


def test_wrong_number_or_shape(cache):
    """A model that loses samples, or changes its shape, stores nothing of that batch."""
    with CachedEncoder(lambda inputs: inputs[:1], cache, OWN) as encoder:
        with pytest.raises(InvalidEmbeddingError, match="1 embeddings for 2 samples"):
            ask(encoder, [1, 2])
    widths = iter([3, 4])
    with CachedEncoder(lambda x: x[:, : next(widths)], cache, OWN) as encoder:
        ask(encoder, [1])
        with pytest.raises(InvalidEmbeddingError, match="clip_002:x"):
            ask(encoder, [2])
    assert list(stored(cache)) == names_of([1])


def test_a_full_disk_loses_nothing(encoder, model, cache, monkeypatch):
    """It is told; what was computed stays in memory and is committed once there is room."""
    with monkeypatch.context() as patch:

        def refuse(*_):
            raise CacheFullError("the disk is full")

        patch.setattr(Committer, "commit", refuse)
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
    with CachedEncoder(model, tmp_path / "file", OWN) as encoder:
        with pytest.raises(ReadOnlyCacheError):
            ask(encoder, [1])
    assert not model.passes


# ---- a module among others


def test_in_a_training_step(encoder):
    """Only the head is trained; nothing of the encoder is in parameters or state_dict."""
    network = torch.nn.ModuleDict({"encoder": encoder, "head": torch.nn.Linear(WIDTH, 1)})
    assert set(network.state_dict()) == {"head.weight", "head.bias"}
    assert not list(encoder.parameters())
    network.train()
    loss = network["head"](ask(encoder, range(4))).square().mean()
    loss.backward()
    assert network["head"].weight.grad is not None
    assert encoder.config.slug.split("-")[0] in repr(network)


def test_autocast_around_it_changes_nothing(cache, encoder):
    """The model computes as the config says, in a training loop under bfloat16 too."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ask(encoder, range(4))
    assert torch.equal(found, direct(range(4)))
    with CachedEncoder(CountingEncoder(), cache, OWN.replace(compute_dtype="bfloat16")) as half:
        found = ask(half, range(4))
    assert not torch.equal(found, direct(range(4)))
    torch.testing.assert_close(found, direct(range(4)), atol=0.05, rtol=0)


def test_inputs_in_half_precision(cache, encoder):
    """A trainer that rounds its batches to bfloat16 is told, unless the config says so."""
    rounded = waveforms_of([1, 2]).bfloat16()
    for inputs in (rounded, list(rounded), {"waveforms": rounded}):
        with pytest.raises(ConfigError, match="bfloat16.*rounded"):
            encoder(inputs, sample_ids=names_of([1, 2]))
    loaders = [lambda: waveforms_of([1])[0]] * 2
    assert encoder.bfloat16()(loaders, sample_ids=names_of([1, 1])).dtype == torch.bfloat16
    half = CountingEncoder().bfloat16()
    with CachedEncoder(half, cache, OWN.replace(compute_dtype="bfloat16")) as other:
        found = other(rounded, sample_ids=names_of([1, 2]))
        assert torch.equal(found.float(), half(rounded).float())


def test_compiled_networks_leave_it_out(encoder, model):
    """torch.compile of a network around it works, and hits stay hits."""

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.head = encoder, torch.nn.Linear(WIDTH, 1)

        def forward(self, waveforms, sample_ids):
            return self.head(self.encoder(waveforms, sample_ids=sample_ids))

    network = Network()
    compiled = torch.compile(network, backend="eager")
    for numbers in ([1, 2], [2, 3], [1, 2]):
        args = waveforms_of(numbers), names_of(numbers)
        assert torch.equal(compiled(*args), network(*args))
    assert model.passes == [2, 1]


def test_dtype_and_device_asked_for(encoder, model):
    """to(dtype) changes what is returned, not what is computed; to(device) moves the model too."""
    encoder.to(torch.bfloat16)
    assert torch.equal(ask(encoder, [1]), direct([1]).bfloat16())
    assert model.layer.weight.dtype == torch.float32
    encoder.float().to("meta")
    assert model.layer.weight.device.type == "meta"
    assert ask(encoder, [1]).device.type == "meta"  # from memory


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(cache):
    """Hits and misses come on the GPU; the model is moved there, its inputs too."""
    with CachedEncoder(build, cache, OWN, device="cuda") as encoder:
        for _ in range(2):
            found = ask(encoder, range(3))
            assert found.is_cuda
            torch.testing.assert_close(found.cpu(), direct(range(3)), atol=1e-3, rtol=0)
    with CachedEncoder(CountingEncoder().cuda(), cache, OWN) as encoder:
        assert ask(encoder, [1]).is_cuda


# ---- threads and processes


def test_threads_compute_nothing_twice(encoder, model):
    """Four threads that ask for the same samples share one computation."""
    threads = [threading.Thread(target=ask, args=(encoder, range(20))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert model.passes == [20]


def ask_and_close(encoder, numbers):
    found = ask(encoder, numbers)
    encoder.close()
    return found.numpy(), encoder.num_computed


def test_forked_process_has_its_own_writer(encoder, model, cache):
    """A child commits what it computes; what the parent has waiting stays the parent's."""
    ask(encoder, [1])
    found, _ = in_fork(lambda: ask_and_close(encoder, [2, 3]))
    np.testing.assert_array_equal(found, direct([2, 3]).numpy())
    assert list(stored(cache)) == names_of([2, 3])
    ask(encoder, [1, 2, 3])
    assert model.passes == [1]
    encoder.close()
    assert list(stored(cache)) == names_of([1, 2, 3])


def test_pickles_as_settings_and_model(encoder, cache):
    """A copy in a spawned process, or here, has reader and writer of its own."""
    ask(encoder, [1])
    with peer_process() as peer:
        found, computed = peer.call(ask_and_close, encoder, [1, 2])
    assert computed == 2 + encoder.num_computed  # it can't know what waits here
    torch.testing.assert_close(torch.from_numpy(found), direct([1, 2]), atol=2e-7, rtol=0)
    encoder.close()
    for copied in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert torch.equal(ask(copied, [2, 1]), ask(encoder, [2, 1]))
        assert copied.num_computed == 1
        copied.close()
    lazy = pickle.loads(pickle.dumps(CachedEncoder(build, cache, OWN)))
    assert not lazy._frozen.is_built
    ask(lazy, [1])
    lazy.close()


SCRIPT = """
import multiprocessing, sys
from training.encoders import *
from lmdbcache import CachedEncoder, CacheConfig
config = CacheConfig(model_name="own", front_end="own/1", output="embedding")

def work(numbers):
    encoder = CachedEncoder(build, sys.argv[1], config)
    encoder(waveforms_of(numbers), sample_ids=names_of(numbers))

if __name__ == "__main__":
    work([1])
    for number, method in enumerate(["fork", "spawn"]):
        process = multiprocessing.get_context(method).Process(target=work, args=([10 + number],))
        process.start()
        process.join()
    encoder = CachedEncoder(build, sys.argv[1], config)
    encoder(waveforms_of([2]), sample_ids=names_of([2]))
    raise ValueError("own bug")
"""


def test_the_end_of_a_process_commits(cache, tmp_path):
    """Encoders that nobody closed, dropped ones and those of child processes lose nothing."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    tests = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", script, cache.root],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": f"{tests}:{tests.parent}"},
    )
    assert "ValueError: own bug" in done.stderr
    assert done.stderr.count("Traceback") == 1, done.stderr
    assert list(stored(cache)) == names_of([1, 2, 10, 11])


def train_rank(root, rank, folder):
    """One rank of a DDP job: 3 epochs over overlapping samples."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    encoder = CachedEncoder(build, root, OWN)

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.head = encoder, torch.nn.Linear(WIDTH, 1)

        def forward(self, waveforms, sample_ids):
            return self.head(self.encoder(waveforms, sample_ids=sample_ids))

    network = torch.nn.parallel.DistributedDataParallel(Network())
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    seen = range(5) if rank == 0 else range(3, 10)
    for _ in range(3):
        optimizer.zero_grad()
        network(waveforms_of(seen), names_of(seen)).square().mean().backward()
        optimizer.step()
    encoder.close()
    torch.distributed.destroy_process_group()
    weight = network.module.head.weight.detach().numpy()
    return SimpleNamespace(computed=encoder.num_computed, weight=weight)


def test_under_ddp(cache, tmp_path):
    """Two ranks share one store; each computes its misses once; the heads stay in step."""
    with peer_process() as first, peer_process() as second:
        first.start(train_rank, cache.root, 0, str(tmp_path))
        second.start(train_rank, cache.root, 1, str(tmp_path))
        ranks = [first.answer(), second.answer()]
    assert ranks[0].computed <= 5
    assert ranks[1].computed <= 7
    assert ranks[0].computed + ranks[1].computed >= 10
    np.testing.assert_array_equal(ranks[0].weight, ranks[1].weight)
    assert list(stored(cache)) == names_of(range(10))
