"""Pictures and video frames of a clip, as float tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lmdbcache.errors import DatasetError
from lmdbcache.machine import needing

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL.Image import Image

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ImageToTensor:
    """Resize a picture and normalize it with ImageNet's mean and deviation.

    Args:
        size: Height and width, in pixels.
    """

    size: tuple[int, int] = (224, 224)

    def __call__(self, image: Image) -> torch.Tensor:
        """Return the picture as float32 (3, height, width)."""
        from PIL.Image import Resampling

        height, width = self.size
        resized = image.convert("RGB").resize((width, height), Resampling.BILINEAR)
        pixels = _to_unit_range(np.array(resized))
        mean, std = torch.tensor(_IMAGENET_MEAN), torch.tensor(_IMAGENET_STD)
        return (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def load_image(path: str, transform: Callable[[Image], Any]) -> Any:
    """Open a picture as RGB and transform it.

    Raises:
        DatasetError: The file isn't a picture that Pillow reads.
        MissingDependencyError: Pillow isn't installed.
    """
    with needing("a picture", "visual"):
        from PIL import Image
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DatasetError(
            f"{path}: can't be read as a picture: {error}. Replace or remove the file"
        ) from error
    return transform(image)


def load_video(path: str, num_frames: int, size: tuple[int, int]) -> torch.Tensor:
    """Return frames at even distances over the whole video.

    Args:
        path: Video file.
        num_frames: How many frames; a shorter video repeats some.
        size: Height and width of a frame, in pixels.

    Returns:
        float32 (num_frames, 3, height, width), RGB between 0 and 1.

    Raises:
        DatasetError: The file gives no frames.
        MissingDependencyError: OpenCV isn't installed.
    """
    with needing("a video", "visual"):
        import cv2
    capture = cv2.VideoCapture(path)
    try:
        announced = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        wanted = np.linspace(0, max(announced - 1, 0), num_frames).astype(int)
        frames = _decode_frames(capture, wanted, size)
    finally:
        capture.release()
    if not frames:
        raise DatasetError(f"{path}: gives no video frames. Replace or remove the file")
    # The count in a header is an estimate: a frame that never came is the one before it.
    shown, clip = frames[min(frames)], []
    for number in wanted.tolist():
        shown = frames.get(number, shown)
        clip.append(shown)
    return torch.stack(clip)


def _decode_frames(
    capture: Any, wanted: np.ndarray[Any, Any], size: tuple[int, int]
) -> dict[int, torch.Tensor]:
    """Frame number → tensor, for the wanted frames that exist."""
    import cv2

    numbers, (height, width) = set(wanted.tolist()), size
    frames: dict[int, torch.Tensor] = {}
    for number in range(max(numbers) + 1):
        # Decoding onward is several times faster than seeking to each frame.
        if not capture.grab():
            break
        if number in numbers:
            arrived, frame = capture.retrieve()
            if arrived:
                rgb = cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
                resized = cv2.resize(rgb, (width, height), interpolation=cv2.INTER_AREA)
                frames[number] = _to_unit_range(resized)
    return frames


def _to_unit_range(pixels: np.ndarray[Any, Any]) -> torch.Tensor:
    """uint8 (height, width, 3) → float32 (3, height, width) between 0 and 1."""
    return torch.from_numpy(pixels).permute(2, 0, 1).float().div_(255)
