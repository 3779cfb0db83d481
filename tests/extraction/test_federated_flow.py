"""A federation's server and clients, each in a process, over one cache: what each has to compute.

The counts are those of the models' forward passes, taken by a hook in every process.
"""

from __future__ import annotations

import multiprocessing
from collections import Counter
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from extraction.processes import PATIENCE, Process
from small_ast import save_small_ast
from synthetic_vegas import make_synthetic_vegas

from lmdbcache import (
    EmbeddingCache,
    ModuleEmbedder,
    VEGASDataset,
    config_for,
    extract,
    extract_or_load_ast_embeddings,
    to_clips,
)
from lmdbcache.datasets import create_vegas_dataloader
from lmdbcache.errors import ProvenanceMismatchError

CLIPS = 3  # of each class
SECONDS = 0.5


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The clips, a checkpoint, and an empty cache directory."""
    folder = tmp_path_factory.mktemp("federation")
    make_synthetic_vegas(folder / "VEGAS", clips_per_class=CLIPS, duration=SECONDS, broken=False)
    save_small_ast(folder / "small-ast", max_length=128)
    return folder


@contextmanager
def forward_passes(kind):
    """Counts the clips that a model of this kind computes in this process."""
    computed = Counter()

    def count(module, inputs, output):
        if type(module).__name__ == kind:
            computed["clips"] += len(output[0])

    handle = torch.nn.modules.module.register_module_forward_hook(count)
    yield computed
    handle.remove()


class Party:
    """A function that runs in a process of its own."""

    def __init__(self, function, *arguments):
        self.connection, theirs = multiprocessing.Pipe()
        self.process = Process(target=_tell, args=(theirs, function, arguments))
        self.process.start()
        theirs.close()

    def result(self):
        """What it returned, when it has ended."""
        assert self.connection.poll(PATIENCE)
        result = self.connection.recv()
        self.process.join(PATIENCE)
        assert self.process.exitcode == 0
        return result


def _tell(connection, function, arguments):
    torch.set_num_threads(1)
    connection.send(function(*arguments))


def dataset_of(world, classes, root="cache", **options):
    return VEGASDataset(
        world / "VEGAS",
        selected_classes=classes,
        split="all",
        ast_cache_dir=world / root,
        audio_duration=SECONDS,
        **options,
    )


def embeddings_of(dataset):
    """Class → the embeddings of its items, in their order."""
    found = {}
    for item in dataset:
        found.setdefault(item["class_name"], []).append(item["audio_emb"].numpy())
    return {name: np.stack(values) for name, values in found.items()}


# ---- the calls by sample id


def extracting(world, *clients):
    """A server, or a client by itself: has each dataset loaded, and what isn't stored computed."""
    datasets = [dataset_of(world, classes) for classes in clients]
    with forward_passes("ASTModel") as computed:
        summaries = [
            extract_or_load_ast_embeddings(
                dataset, model_name=str(world / "small-ast"), num_workers=0
            )
            for dataset in datasets
        ]
    stored = [(summary.num_extracted, summary.num_cached) for summary in summaries]
    return computed["clips"], stored, [embeddings_of(dataset) for dataset in datasets]


def loading(world, classes):
    """A client that only loads: whether something is stored, and its embeddings of each class."""
    dataset = dataset_of(world, classes, load_audio=False)
    with forward_passes("ASTModel") as computed:
        loaded = dataset.load_ast_embeddings_from_cache(16000, SECONDS, str(world / "small-ast"))
        dataset.filter_audio_embeddings_from_file()
        missing = [name for name in dataset.sample_ids if name not in dataset.audio_embs]
        return computed["clips"], loaded, missing, {} if missing else embeddings_of(dataset)


def test_rounds_of_a_server_and_its_clients(world):
    """Each clip is computed once, by whoever needs it first; later rounds compute nothing."""
    clients = [["dog", "drum"], ["drum", "snoring"]]
    computed, stored, first = Party(extracting, world, *clients).result()
    assert computed > 3 * CLIPS  # some of the first batch come again, to be compared
    assert stored == [(2 * CLIPS, 0), (CLIPS, CLIPS)]
    assert np.array_equal(first[0]["drum"], first[1]["drum"])

    parties = [Party(loading, world, classes) for classes in clients]
    for party, theirs in zip(parties, first, strict=True):
        computed, loaded, missing, embeddings = party.result()
        assert (computed, loaded, missing) == (0, True, [])
        assert all(np.array_equal(embeddings[name], theirs[name]) for name in theirs)

    # One has a class that the server lacks: it computes that one alone, beside another that hits.
    newcomer = ["dog", "chainsaw"]
    assert Party(loading, world, newcomer).result()[1:3] == (
        True,
        [f"video_{number:05d}:chainsaw" for number in range(CLIPS)],
    )
    parties = [Party(extracting, world, newcomer), Party(loading, world, clients[1])]
    computed, stored, (newcomers,) = parties[0].result()
    assert computed > 0
    assert stored == [(CLIPS, CLIPS)]
    assert parties[1].result()[:3] == (0, True, [])

    computed, stored, second = Party(extracting, world, *clients, newcomer).result()
    assert computed == 0
    assert stored == [(0, 2 * CLIPS)] * 3
    for theirs, mine in zip([*first, newcomers], second, strict=True):
        assert all(np.array_equal(mine[name], theirs[name]) for name in theirs)


# ---- the calls by class


def training(world, classes, num_rounds=2):
    """A client: each round computes the batches without embeddings, keeps, saves and loads them."""
    from transformers import ASTFeatureExtractor, ASTModel

    extractor = ASTFeatureExtractor.from_pretrained(world / "small-ast")
    model = ASTModel.from_pretrained(world / "small-ast").eval()
    dataset = dataset_of(world, classes, root="by class")
    place = {"cache_dir": dataset.ast_cache_dir, "classes": dataset.get_class_names()}
    dataset.load_ast_embeddings_from_cache(**place)
    rounds = []
    for _ in range(num_rounds):
        with forward_passes("ASTModel") as computed, torch.no_grad():
            for batch in create_vegas_dataloader(dataset, CLIPS, shuffle=False, num_workers=0):
                if batch.get("audio_emb") is None:
                    clips = list(batch["audio"].numpy())
                    inputs = extractor(clips, sampling_rate=16000, return_tensors="pt")
                    hidden = model(inputs.input_values).last_hidden_state
                    for file_id, name, one in zip(
                        batch["file_id"], batch["class_name"], hidden, strict=True
                    ):
                        dataset.audio_embs[f"{file_id}:{name}"] = one
        by_class = {}
        for sample_id, embedding in dataset.audio_embs.items():
            file_id, name = sample_id.split(":", 1)
            by_class.setdefault(name, {})[file_id] = embedding
        saved = dataset.save_ast_embeddings_to_cache(
            ast_outputs_dict=by_class, cache_dir=dataset.ast_cache_dir
        )
        dataset.load_ast_embeddings_from_cache(**place)
        rounds.append((computed["clips"], saved))
    assert all(
        np.array_equal(
            dataset.get_cached_ast_embedding(item["class_name"], item["file_id"]),
            item["audio_emb"].numpy(),
        )
        for item in dataset
    )
    return rounds, embeddings_of(dataset)


def serving(world, classes):
    """The server: what is stored of each class, and its items' embeddings."""
    dataset = dataset_of(world, classes, root="by class", load_audio=False, auto_load_cache=True)
    at_once = list(dataset._ast_cache)
    found = dataset.load_ast_embeddings_from_cache(cache_dir=dataset.ast_cache_dir)
    totals = {name: info["manifest"]["total_samples"] for name, info in found.items()}
    assert at_once == list(found)
    complete = set(totals) == set(classes)
    return totals, embeddings_of(dataset) if complete else {}


def test_rounds_of_scripts_that_store_by_class(world):
    """What is computed in the first round is stored once; every later round computes nothing."""
    assert Party(serving, world, ["dog", "drum", "snoring"]).result() == ({}, {})
    parties = [
        Party(training, world, classes) for classes in (["dog", "drum"], ["drum", "snoring"])
    ]
    (first, second), embeddings = zip(*(party.result() for party in parties), strict=True)
    # What both have, one or both compute, and one stores.
    assert {first[0][0], second[0][0]} <= {CLIPS, 2 * CLIPS}
    assert (first[0][1]["dog"], second[0][1]["snoring"]) == (CLIPS, CLIPS)
    for computed, saved in (first[1], second[1]):
        assert computed == 0
        assert not any(saved.values())

    totals, served = Party(serving, world, ["dog", "drum", "snoring"]).result()
    assert totals == dict.fromkeys(["dog", "drum", "snoring"], CLIPS)
    assert np.array_equal(served["dog"], embeddings[0]["dog"])
    assert np.array_equal(served["snoring"], embeddings[1]["snoring"])

    # One has a class that the server lacks; the server has it in the next round.
    rounds, newcomers = Party(training, world, ["dog", "chainsaw"]).result()
    assert rounds == [(CLIPS, {"chainsaw": CLIPS}), (0, {"chainsaw": 0})]
    totals, served = Party(serving, world, ["dog", "chainsaw"]).result()
    assert totals == {"chainsaw": CLIPS, "dog": CLIPS}
    assert all(np.array_equal(served[name], newcomers[name]) for name in served)


# ---- knowledge distillation


class Teacher(torch.nn.Module):
    """Waveforms (batch, samples) → what a transformers model returns, more or less."""

    def __init__(self, seed):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = torch.nn.Linear(100, 10)

    def forward(self, waveforms):
        features = waveforms.unflatten(1, (-1, 100)).abs().mean(1)
        return self.head(features), features


def teacher_of_round(number, name):
    teacher = ModuleEmbedder(
        Teacher(number), name=name, sample_rate=16000, outputs={"logits": lambda pair: pair[0]}
    )
    config = config_for(teacher, output="logits", duration=SECONDS, namespace="vegas")
    return teacher, config


def teaching(world, number, name):
    """The server: stores the teacher's outputs for all clips; how many it computed."""
    teacher, config = teacher_of_round(number, name)
    clips = to_clips(dataset_of(world, ["dog", "drum", "chainsaw"]).samples)
    with forward_passes("Teacher") as computed:
        try:
            summary = extract(
                EmbeddingCache(world / "cache"), config, clips, model=teacher, num_workers=0
            )
        except ProvenanceMismatchError:
            return "refused", computed["clips"]
    return summary.num_extracted, computed["clips"]


def learning(world, number, name, classes):
    """A client: its items' embeddings and the teacher's logits of the same rows; no teacher."""
    _, config = teacher_of_round(number, name)
    dataset = dataset_of(world, classes, load_audio=False)
    with forward_passes("Teacher") as computed, forward_passes("ASTModel") as embedded:
        assert dataset.load_ast_embeddings_from_cache(16000, SECONDS, str(world / "small-ast"))
        batch = dataset.get_collate_fn()(dataset.__getitems__(range(len(dataset))))
        with EmbeddingCache(world / "cache").reader(config) as reader:
            logits = reader.get_batch(dataset.sample_ids)
    assert len(batch["audio_emb"]) == len(batch["labels"]) == len(logits)
    return computed["clips"] + embedded["clips"], dict(zip(dataset.sample_ids, logits, strict=True))


def test_a_teacher_s_outputs_are_stored_and_shared(world):
    """Each round's teacher has a store; other weights under its name are refused, untouched."""
    extracted = Party(extracting, world, ["dog", "drum", "chainsaw"]).result()
    assert all(sum(found) == 3 * CLIPS for found in extracted[1])
    assert Party(teaching, world, 1, "teacher/round-1").result()[0] == 3 * CLIPS
    parties = [
        Party(learning, world, 1, "teacher/round-1", classes)
        for classes in (["dog", "drum"], ["drum", "chainsaw"])
    ]
    first, second = (party.result() for party in parties)
    assert first[0] == second[0] == 0
    shared = first[1].keys() & second[1].keys()
    assert len(shared) == CLIPS
    assert all(np.array_equal(first[1][name], second[1][name]) for name in shared)
    waveforms = dataset_of(world, ["dog", "drum"])
    for item, (name, logits) in zip(waveforms, first[1].items(), strict=True):
        expected = Teacher(1)(item["audio"][None])[0][0]
        assert np.allclose(logits, expected.detach().numpy(), atol=1e-6), name

    assert Party(teaching, world, 1, "teacher/round-1").result() == (0, 0)
    assert Party(teaching, world, 2, "teacher/round-1").result()[0] == "refused"
    assert Party(teaching, world, 2, "teacher/round-2").result()[0] == 3 * CLIPS
    again = Party(learning, world, 1, "teacher/round-1", ["dog", "drum"]).result()
    assert all(np.array_equal(again[1][name], first[1][name]) for name in first[1])
    later = Party(learning, world, 2, "teacher/round-2", ["dog", "drum"]).result()
    assert not any(np.array_equal(later[1][name], first[1][name]) for name in first[1])
