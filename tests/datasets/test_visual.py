"""Pictures and videos beside the audio."""

from __future__ import annotations

import sys

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from lmdbcache.datasets import VEGASDataset, vegas_collate_fn
from lmdbcache.datasets.ast_cached import visual
from lmdbcache.errors import DatasetError, MissingDependencyError

OPTIONS = {
    "split": "all",
    "selected_classes": ["dog"],
    "load_audio": False,
    "image_size": (24, 48),
    "video_fps": 4,
    "audio_duration": 2.0,
}


def write_image(path, colour):
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (100, 60), colour).save(path)


def write_video(path, num_frames=30):
    """Frames that go from black to blue."""
    path.parent.mkdir(exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 10, (64, 32))
    assert writer.isOpened()
    for index in range(num_frames):
        frame = np.zeros((32, 64, 3), np.uint8)
        frame[..., 0] = 255 * index // max(num_frames - 1, 1)
        writer.write(frame)
    writer.release()


def test_images(root):
    """A picture comes resized and normalised; items without one lack the key, batches mask them."""
    write_image(root / "dog" / "img" / "video_00001.jpg", (255, 0, 0))
    write_image(root / "dog" / "img" / "video_00002.png", (0, 0, 0))
    dataset = VEGASDataset(root, load_image=True, **OPTIONS)
    assert "image" not in dataset[0]
    image = dataset[1]["image"]
    assert image.shape == (3, 24, 48)
    assert image.dtype == torch.float32
    assert image[0].mean().item() == pytest.approx((1 - 0.485) / 0.229, abs=0.05)
    assert image[1].mean().item() == pytest.approx(-0.456 / 0.224, abs=0.05)
    batch = vegas_collate_fn([dataset[i] for i in range(3)])
    assert batch["image"].shape == (3, 3, 24, 48)
    assert torch.equal(batch["image"][1], image)
    assert not batch["image"][0].any()
    assert batch["image_mask"].tolist() == [False, True, True]
    sized = VEGASDataset(root, load_image=True, transform_image=lambda i: i.size, **OPTIONS)
    assert sized[1]["image"] == (100, 60)


def test_videos(root):
    """Frames at even distances, (T, 3, H, W) in [0, 1] as RGB; a batch masks absent ones."""
    write_video(root / "dog" / "videos" / "video_00000.mp4")
    write_video(root / "dog" / "videos" / "video_00002.mp4", num_frames=3)
    dataset = VEGASDataset(root, load_video=True, **OPTIONS)
    video = dataset[0]["video"]
    assert video.shape == (8, 3, 24, 48)
    blue = video[:, 2].mean((1, 2))
    assert blue[0] < 0.1
    assert blue[-1] > 0.8
    assert (blue.diff() > 0.05).all()
    assert video[:, 0].max() < 0.2
    assert dataset[1]["video"] is None
    assert dataset[2]["video"].shape == (8, 3, 24, 48)
    batch = vegas_collate_fn([dataset[i] for i in (1, 0, 2)])
    assert batch["video"].shape == (3, 8, 3, 24, 48)
    assert batch["video_mask"].tolist() == [False, True, True]
    assert torch.equal(batch["video"][1], video)
    assert vegas_collate_fn([dataset[1]])["video"] is None


def test_shorter_videos_are_padded_in_a_batch(root):
    """A video cut short by a transform repeats its last frame."""
    for index in range(2):
        write_video(root / "dog" / "videos" / f"video_{index:05d}.mp4")
    lengths = iter((2, 5))
    dataset = VEGASDataset(
        root, load_video=True, transform_video=lambda v: v[: next(lengths)], **OPTIONS
    )
    batch = vegas_collate_fn([dataset[0], dataset[1]])
    assert batch["video"].shape == (2, 5, 3, 24, 48)
    assert torch.equal(batch["video"][0, 4], batch["video"][0, 1])


def test_broken_files_raise(root):
    """A picture or video that can't be decoded is an error with its path, not a black frame."""
    for folder, name in (("img", "video_00000.jpg"), ("videos", "video_00000.mp4")):
        path = root / "dog" / folder / name
        path.parent.mkdir()
        path.write_text("neither", encoding="utf-8")
    with pytest.raises(DatasetError, match=r"video_00000\.jpg"):
        VEGASDataset(root, load_image=True, **OPTIONS)[0]
    with pytest.raises(DatasetError, match=r"video_00000\.mp4"):
        VEGASDataset(root, load_video=True, **OPTIONS)[0]


@pytest.mark.parametrize(
    ("package", "load"),
    [
        ("PIL", lambda: visual.load_image("x", None)),
        ("cv2", lambda: visual.load_video("x", 1, (2, 2))),
    ],
)
def test_a_missing_package_is_named_with_its_remedy(package, load, monkeypatch):
    """Without Pillow or OpenCV the error says what to install."""
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=r"lmdbcache\[visual\]"):
        load()
