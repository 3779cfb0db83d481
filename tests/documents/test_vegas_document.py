"""docs/vegas.md: its tables against the commands and the datasets. Each row of them is run."""

from __future__ import annotations

import json
import logging
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from documents.pages import DOCS
from small_ast import save_small_ast
from synthetic_layouts import make_esc50, make_vggsound
from synthetic_vegas import make_synthetic_vegas

from lmdbcache import EmbeddingCache, ESC50Dataset, VEGASDataset, VGGSoundDataset
from lmdbcache.datasets import create_vegas_dataloader, vegas_collate_fn

TEXT = (DOCS / "vegas.md").read_text("utf-8")
CLIPS = 4
TEN = "sorted(VEGASDataset.CLASS_LABELS)"

# Call → what holds of its `result` (None if it is a statement), and of the names in `names_of`.
CHECKS = {
    "VEGASDataset()": "len(result) == 40",
    'VEGASDataset("VEGAS", embedding_file="none.pt")': (
        "'none.pt' in log and 'text_emb' not in result[0]"
    ),
    'VEGASDataset("VEGAS", ast_cache_dir=dataset.ast_cache_dir, auto_load_cache=True)': (
        "torch.equal(result[0]['audio_emb'], hit['audio_emb'])"
        f" and sorted(result.train._ast_cache) == {TEN}"
    ),
    'VEGASDataset("VEGAS", parent_ast_cache=dataset._ast_cache, '
    "parent_audio_embs=dataset.audio_embs)": (
        "result._ast_cache is dataset._ast_cache and 'audio_emb' in result[0]"
        " and not result.audio_embs.update({hit_id: torch.ones(8)})"
        " and hit_id in dataset.audio_embs"
    ),
    'ESC50Dataset("ESC-50", text_embedding_file="texts.pt", selected_classes=["dog"], node_id=1, '
    'split_method="sklearn")': (
        "result.active_classes == {'dog': 0} and 'text_emb' in result[0] and len(result) == 20"
    ),
    'ESC50Dataset("ESC-50", use_folds=True, train_folds=[0, 1, 2], val_folds=[3], '
    "test_folds=[4])": (
        "[sorted({one['fold'] for one in part.samples}) for part in"
        " (result.train, result.val, result.test)] == [[0, 1, 2], [3], [4]]"
    ),
    'ESC50Dataset("ESC-50", use_folds=True, train_folds=[0, 1, 2, 3], test_folds=[4])': (
        "not set(result.train.sample_ids) & set(result.val.sample_ids) and len(result.val) > 0"
    ),
    'ESC50Dataset("ESC-50", split="all")[0]["fold"]': "result == 0",
    'VGGSoundDataset("VGGSound", text_embedding_file=None, selected_classes=["people_marching"], '
    "use_official_split=True)": (
        "len(result.test) == 1 and len(result.train) + len(result.val) == 3"
        " and list(result.active_classes) == ['people marching']"
    ),
    'VGGSoundDataset("VGGSound", use_official_split=False, audio_duration=10.0, node_id=0)': (
        "len(result) == 12 and result.audio_duration == 10"
    ),
    'VEGASDataset(root_dir="VEGAS", selected_classes=["dog", 3], excluded_classes=["drum"])': (
        "result.active_classes == {'dog': 2}"
    ),
    'VEGASDataset("VEGAS", split="train", train_ratio=0.7, val_ratio=0.1, test_ratio=0.2, '
    "stratify=True)": "20 <= len(result) < 40 and result.split == 'train'",
    'VEGASDataset("VEGAS", split=None)': (
        "len(result) == 40 == sum(map(len, (result.train, result.val, result.test)))"
        " and result.train.audio_embs is result.audio_embs"
    ),
    'VEGASDataset("VEGAS", splits_to_load=["train", "test"])': (
        "len(result) == len(dataset.train) + len(dataset.test)"
    ),
    'VEGASDataset("VEGAS", split_ratio=0.8)': "'deprecated' in log and len(result.test) > 0",
    'VEGASDataset("VEGAS", train_ratio=0.9, val_ratio=0.1, test_ratio=1 - 0.9 - 0.1)': (
        "len(result.test) == 0 and len(result.train) + len(result.val) == 40"
    ),
    'VEGASDataset("VEGAS", split_method="sklearn", train_ratio=0.5, val_ratio=0.25, '
    "test_ratio=0.25)": "list(map(len, (result.train, result.val, result.test))) == [20, 10, 10]",
    'VEGASDataset("VEGAS", num_samples_per_class=2)': "len(result) == 20",
    'VEGASDataset("VEGAS", node_split_id=0, num_nodes=2, node_split_seed=42)': "len(result) == 20",
    'VEGASDataset("VEGAS", node_split_id=0, samples_per_node=2)': "len(result) == 20",
    'VEGASDataset("VEGAS", use_folds=True, train_folds=[0], val_folds=None, test_folds=[1])': (
        "'use_folds' in log and 'test_folds' in log and len(result) == 40"
    ),
    'VEGASDataset("VEGAS", enable_cache=True, cache_dir="list")': (
        "'enable_cache' in log and not Path('list').exists()"
    ),
    'VEGASDataset("VEGAS", embedding_file="texts.pt")': (
        "torch.equal(result.get_text_embeddings('dog')['sd'], torch.ones(2))"
    ),
    'VEGASDataset("VEGAS", audio_embedding_file="old.pt", use_saved_audio_embeddings=True)': (
        "torch.equal(result[0]['audio_emb'], embeddings[result.sample_ids[0]])"
    ),
    'VEGASDataset("VEGAS", audio_sample_rate=8000, audio_duration=0.1, transform_audio=None)': (
        "result[0]['audio'].shape == (800,) and result[0]['audio_num_valid'] == 400"
    ),
    'VEGASDataset("VEGAS", image_size=(8, 8), video_fps=25, transform_image=None, '
    "transform_video=None, load_image=True, load_video=True)": (
        "result[0]['video'] is None and 'image' not in result[0]"
    ),
    'VEGASDataset("VEGAS", load_audio=False)': "'audio' not in result[0]",
    'VEGASDataset("VEGAS", ast_cache_dir="cache", enable_ast_cache=False)': (
        "not result.load_ast_embeddings_from_cache(16000, 5.0, 'ast')"
        " and not result.save_ast_embeddings_to_cache(embeddings) and not Path('cache').exists()"
    ),
    "len(dataset)": "result == 40",
    "dataset[0]": (
        "{'label', 'audio', 'audio_emb', 'audio_filename', 'image_filename', 'video_filename',"
        " 'class_name', 'video_id', 'file_id', 'sample_idx', 'ytid', 'start_second', 'end_second',"
        " 'caption'} <= result.keys()"
    ),
    "dataset.get_class_names()": f"result == {TEN}",
    "dataset.get_class_labels()": "result == list(range(10))",
    "dataset.get_num_classes()": "result == 10",
    "dataset.get_max_class_label()": "result == 9",
    "dataset.get_samples_per_class()": f"result == dict.fromkeys({TEN}, 4)",
    "dataset.get_class_distribution()": f"result == dict.fromkeys({TEN}, 10.0)",
    "dataset.print_split_statistics()": "'40 samples' in log",
    "dataset.verify_stratification(dataset.train, tolerance=0.05)": "result is True",
    'dataset.get_text_embeddings("dog")': "result is None",
    'dataset.selected_classes = ["dog"]': (
        "len(dataset) == 4 and dataset.train.active_classes == {'dog': 2}"
    ),
    'dataset.load_audio_embeddings_from_file("old.pt")': (
        "result is True and set(dataset.audio_embs_from_file) == set(embeddings)"
    ),
    "dataset.filter_audio_embeddings_from_file()": (
        "set(dataset.audio_embs) == set(embeddings) == set(dataset.train.audio_embs)"
    ),
    "dataset.audio_embs_from_file": "torch.equal(result[hit_id], embeddings[hit_id])",
    'dataset.audio_embs[f"{file_id}:dog"] = torch.ones(8)': (
        "all(torch.equal(item['audio_emb'], torch.ones(8)) for part in (dataset, dataset.train,"
        " dataset.val, dataset.test) for item in part"
        " if (item['file_id'], item['class_name']) == (file_id, 'dog'))"
        " and not torch.equal(dataset.audio_embs_from_file[f'{file_id}:dog'], torch.ones(8))"
    ),
    'dataset.to("cpu")': "result is dataset and result.train.device == torch.device('cpu')",
    "dataset.clear_cache()": "dataset.load_ast_embeddings_from_cache(16000, 5.0, 'ast')",
    "dataset._load_samples()": (
        "[one['audio_path'] for one in result] == [one['audio_path'] for one in dataset.samples]"
    ),
    'dataset._load_audio(dataset.samples[0]["audio_path"])': (
        "result.shape == (80000,) and result.dtype == torch.float32"
    ),
    'dataset.save_ast_embeddings_to_cache(embeddings, 16000, 5.0, "ast")': "result is True",
    "dataset.save_ast_embeddings_to_cache(embeddings=embeddings, sample_rate=16000, duration=5.0, "
    'model_name="mine", embedding_shape=(8,))': (
        "result is True and dataset.cache_config(model_name='mine') in cache"
        " and not dataset.save_ast_embeddings_to_cache(embeddings, embedding_shape=(9,))"
    ),
    'dataset.load_ast_embeddings_from_cache(16000, 5.0, "ast-finetuned")': "result is True",
    'dataset.load_ast_embeddings_from_cache(sample_rate=44100, duration=5.0, model_name="ast")': (
        "result is False and '44100' in log"
    ),
    'dataset._get_ast_cache_filepath(16000, 5.0, "ast")': "result == path",
    'dataset._verify_ast_cache_compatibility(path, 16000, 5.0, "ast")': (
        "result is True and not dataset._verify_ast_cache_compatibility(path, 16000, 10.0, 'ast')"
    ),
    'dataset.clear_ast_cache(sample_rate=16000, duration=5.0, model_name="ast")': (
        "not cache.stores() and 'audio_emb' not in dataset[0]"
    ),
    "dataset.clear_ast_cache()": "not cache.stores()",
    'dataset.save_ast_embeddings_to_cache(ast_outputs_dict=by_class, cache_dir="cache")': (
        "result == {name: 4 for name in by_class} and Path('cache').is_dir() and"
        " set(dataset.save_ast_embeddings_to_cache(ast_outputs_dict=by_class).values()) == {0}"
    ),
    "dataset.load_ast_embeddings_from_cache(cache_dir=dataset.ast_cache_dir, "
    'classes=["dog", "drum"], close_previous=True)': (
        "list(result) == ['dog', 'drum'] and result['dog']['manifest']['total_samples'] == 4"
        " and len(result['dog']['chunks']) == 1 and all(np.array_equal("
        "result['dog']['chunks'][chunk][offset], by_class['dog'][name])"
        " for name, (chunk, offset) in result['dog']['index_map'].items())"
    ),
    "dataset.load_ast_embeddings_from_cache()": f"sorted(result) == {TEN}",
    'dataset.get_cached_ast_embedding("dog", file_id)': (
        "np.array_equal(result, by_class['dog'][file_id]) and not result.flags.writeable"
        " and dataset.get_cached_ast_embedding('dog', 'none') is None"
    ),
    "dataset._ast_cache": (
        "dataset.load_ast_embeddings_from_cache(classes=['dog']) and list(dataset._ast_cache)"
        " == ['dog'] and dataset.train._ast_cache is dataset._ast_cache"
    ),
    "dataset._log_cache_coverage()": "'40 of 40' in log",
    "dataset.close_ast_cache()": "dataset._ast_cache == {} and 'audio_emb' not in dataset[0]",
    "create_vegas_dataloader(dataset, batch_size=4, shuffle=False, num_workers=0, "
    "pin_memory=False)": "next(iter(result))['labels'].tolist() == [0] * 4",
    "dataset.get_collate_fn()([hit, hit])": (
        "{'labels', 'audio', 'audio_emb', 'metadata', 'class_name', 'file_id', 'audio_filename'}"
        " <= result.keys() and result['audio_emb'].shape == (2, 8)"
    ),
    "vegas_collate_fn([hit, miss])": "'audio_emb' not in result and len(result['audio']) == 2",
    'vegas_collate_fn([hit, miss], partial="mask")': (
        "result['audio_emb_mask'].tolist() == [True, False]"
        " and torch.equal(result['audio_emb'], torch.stack([hit['audio_emb'], torch.zeros(8)]))"
        " and VEGASDataset('VEGAS', partial='mask').get_collate_fn()([hit, miss]).keys()"
        " == result.keys()"
    ),
    'vegas_collate_fn([{**hit, "text_emb": {"sd": 1}}, miss])': "result['text_emb'] == {'sd': 1}",
}


def rows(heading: str) -> list[list[str]]:
    """The cells of all tables whose top begins so, without their two lines at the top."""
    tables = [part.partition("\n\n")[0] for part in TEXT.split(f"\n| {heading}")[1:]]
    return [row.strip("| ").split(" | ") for table in tables for row in table.splitlines()[2:]]


def test_options_of_a_pregenerating_script(tmp_path, monkeypatch):
    """All options of the table, in one command, which takes the clips that they name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LMDBCACHE_ROOT", raising=False)
    make_synthetic_vegas("VEGAS", clips_per_class=CLIPS, duration=0.1, broken=False)
    save_small_ast("my-ast", max_length=512)
    here = [" ".join(re.findall(r"`([^`]*)`", cell)) for _, cell in rows("option of a")]
    assert here[-1] == "lmdbcache coverage"
    arguments = shlex.split(
        " ".join(here[:-1]).replace("MIT/ast-finetuned-audioset-10-10-0.4593", "./my-ast")
    )
    # Not here: a command sets the levels of loggers.
    command = [sys.executable, "-m", "lmdbcache", "extract", *arguments, "--dry-run", "--json"]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    assert json.loads(result.stdout)["num_samples"] == 2 * CLIPS


@pytest.fixture(scope="module")
def trees(tmp_path_factory) -> Path:
    """The datasets that the rows name; not to be changed."""
    folder = tmp_path_factory.mktemp("trees")
    make_synthetic_vegas(folder / "VEGAS", clips_per_class=CLIPS, duration=0.05, broken=False)
    make_esc50(folder / "ESC-50", clips_per_fold=4)
    make_vggsound(folder / "VGGSound", missing=0)
    return folder


@pytest.fixture
def names(trees, tmp_path, monkeypatch) -> Iterator[dict]:
    """What the calls use. Everything is stored and loaded, but for `miss`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LMDBCACHE_VEGAS_ROOT", "VEGAS")
    for name in ("VEGAS", "ESC-50", "VGGSound"):
        Path(name).symlink_to(trees / name)
    dataset = VEGASDataset("VEGAS", ast_cache_dir=tmp_path / "stored")
    by_class: dict = {}
    for number, sample in enumerate(dataset.samples):
        embedding = torch.arange(8.0) + number
        by_class.setdefault(sample["class_name"], {})[sample["file_id"]] = embedding
    embeddings = {f"{f}:{name}": e for name, group in by_class.items() for f, e in group.items()}
    torch.save(embeddings, "old.pt")
    torch.save({"Dog": {"sd": torch.ones(2)}}, "texts.pt")
    dataset.save_ast_embeddings_to_cache(embeddings)
    dataset.load_ast_embeddings_from_cache()
    found = {
        "VEGASDataset": VEGASDataset,
        "ESC50Dataset": ESC50Dataset,
        "VGGSoundDataset": VGGSoundDataset,
        "create_vegas_dataloader": create_vegas_dataloader,
        "vegas_collate_fn": vegas_collate_fn,
        "np": np,
        "torch": torch,
        "Path": Path,
        "dataset": dataset,
        "embeddings": embeddings,
        "by_class": by_class,
        "file_id": "video_00001",
        "hit_id": "video_00001:dog",
        "hit": dataset[0],
        "miss": VEGASDataset("VEGAS", split="all")[1],
        "path": dataset.get_ast_cache_filepath(16000, 5.0),
        "cache": EmbeddingCache(tmp_path / "stored"),
    }
    yield found
    found.clear()  # and with it what is open


# What the scripts' own classes have: arguments and methods.
NAMES = """
    root_dir embedding_file text_embedding_file audio_embedding_file selected_classes
    excluded_classes num_samples_per_class split splits_to_load train_ratio val_ratio test_ratio
    split_ratio use_folds train_folds val_folds test_folds use_official_split stratify
    use_saved_audio_embeddings node_split_id num_nodes samples_per_node node_split_seed node_id
    enable_cache cache_dir audio_sample_rate audio_duration image_size video_fps transform_audio
    transform_image transform_video load_audio load_image load_video ast_cache_dir enable_ast_cache
    parent_ast_cache parent_audio_embs

    audio_embs audio_embs_from_file load_audio_embeddings_from_file
    filter_audio_embeddings_from_file get_class_names get_class_labels get_num_classes
    get_max_class_label get_collate_fn get_samples_per_class get_text_embeddings
    get_class_distribution print_split_statistics verify_stratification clear_cache to
    save_ast_embeddings_to_cache load_ast_embeddings_from_cache get_cached_ast_embedding
    close_ast_cache clear_ast_cache create_vegas_dataloader vegas_collate_fn _ast_cache
    _log_cache_coverage _get_ast_cache_filepath _verify_ast_cache_compatibility _load_audio
    _load_samples
""".split()


def test_every_name_has_a_row():
    """Each argument and method of the scripts' classes stands in a call of the tables."""
    calls = " ".join(call for call, _ in rows("call"))
    assert not [name for name in NAMES if not re.search(rf"\b{name}\b", calls)]


def test_every_row_has_a_check():
    """And every check a row."""
    calls = [re.fullmatch("`(.*)`", call)[1] for call, _ in rows("call")]
    assert len(calls) == len(set(calls))
    assert set(calls) == CHECKS.keys()


@pytest.mark.parametrize("call", CHECKS)
def test_a_call_of_a_script(call, names, caplog):
    """It runs as it stands in the table, and does what is said there."""
    caplog.set_level(logging.INFO, logger="lmdbcache")
    names["result"] = None
    try:
        names["result"] = eval(call, names)
    except SyntaxError:
        exec(call, names)
    names["log"] = caplog.text
    assert eval(CHECKS[call], names), names["result"]
