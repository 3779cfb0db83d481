"""The Audio Spectrogram Transformer (AST): a fixed number of log-mel frames in, tokens out."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np

from lmdbcache.config import DEFAULT_FRONT_END
from lmdbcache.embedders.base import library_versions
from lmdbcache.embedders.transformers_family import (
    ModelFamily,
    TransformersEmbedder,
    TransformersFrontEnd,
)
from lmdbcache.errors import MissingDependencyError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from numpy.typing import NDArray

    from lmdbcache.embedders.checkpoints import Checkpoint
    from lmdbcache.embedders.output_names import OutputName

_WINDOW_MILLISECONDS: Final = 25.0
_HOP_MILLISECONDS: Final = 10
_NUM_SPECIAL_TOKENS: Final = 2  # CLS and distillation
# What decides the number of tokens, with ASTConfig's defaults.
_SIZES: Final = {
    "hidden_size": 768,
    "patch_size": 16,
    "frequency_stride": 10,
    "time_stride": 10,
    "num_mel_bins": 128,
    "max_length": 1024,
}


class AST(ModelFamily):
    """AST's outputs, for hidden_size H and T tokens (768 and 1214 as published).

    - `pooler_output`, (H,): the mean of the CLS and the distillation token, after the last norm.
    - `last_hidden_state`, (T, H): every token, CLS and distillation first.
    - `mean`, (H,): the mean over all tokens except CLS and distillation. Tokens of padded frames
      count like any other.
    - `valid_mean`, (H,): over those whose frames all lie within the clip.
    """

    name = "AST"
    model_types = ("audio-spectrogram-transformer",)
    hub_prefixes = ("ast-",)
    extractor_type = "ASTFeatureExtractor"
    features_name = "input_values"
    model_class = "ASTModel"
    front_end_id = DEFAULT_FRONT_END
    sample_rate = 16000
    outputs = ("pooler_output", "last_hidden_state", "mean", "valid_mean")
    takes_num_valid = False  # stores hold embeddings of clips padded before the front end

    def check_settings(self) -> None:
        for name in ("max_length", "num_mel_bins"):
            self.require(
                name,
                found=self.preprocessor.get(name, _SIZES[name]),
                expected=self.config.get(name, _SIZES[name]),
            )

    def min_samples(self) -> int:
        """Return one analysis window of 25 ms: 400 samples at 16 kHz."""
        return int(self.sample_rate * _WINDOW_MILLISECONDS / 1000)

    def max_samples(self) -> int:
        """Return `max_length` frames of 10 ms: its extractor drops the frames beyond them."""
        num_frames = int(self.preprocessor.get("max_length", _SIZES["max_length"]))
        return num_frames * self.sample_rate * _HOP_MILLISECONDS // 1000

    def state_shape(self, wanted: OutputName, num_samples: int) -> tuple[int, ...] | None:
        sizes = [self.config.get(name, default) for name, default in _SIZES.items()]
        if not all(type(size) is int and size > 0 for size in sizes):
            return None  # loading the model will say what is wrong
        hidden_size, patch, bin_step, _, num_bins, num_frames = sizes
        if wanted.state == "pooler_output":
            return (hidden_size,)
        patches = ((num_bins - patch) // bin_step + 1) * self._num_steps(num_frames)
        return (patches + _NUM_SPECIAL_TOKENS, hidden_size)

    @classmethod
    def import_transformers(cls) -> Any:
        transformers = super().import_transformers()
        if _uses_torchaudio():
            # transformers looks only whether torchaudio is installed, and imports it much later.
            try:
                import torchaudio.compliance.kaldi  # noqa: F401
            except (ImportError, OSError, RuntimeError) as error:
                raise MissingDependencyError(
                    f"torchaudio is installed but can't be imported ({error}). Its wheel fits "
                    'torch up to 2.14: pip install "torch>=2.11,<2.15" "torchaudio>=2.11"'
                ) from error
        return transformers

    @classmethod
    def extractor_provenance(cls) -> dict[str, str]:
        """Return which fbank is in use, and the versions it depends on.

        transformers takes torchaudio's kaldi fbank where torchaudio is installed and its own in
        numpy otherwise; the two differ by up to 8e-3.
        """
        return {
            "feature_extractor": "torchaudio" if _uses_torchaudio() else "numpy",
            **library_versions("transformers", "torchaudio", "soundfile", "soxr"),
        }

    def features(
        self, extract: Callable[..., Any], clip: NDArray[np.float32], num_samples: int
    ) -> NDArray[np.float32]:
        """Compute what the extractor returns, to the bit, with less work per clip."""
        if not _uses_torchaudio():
            return super().features(extract, clip, num_samples)
        import torch

        extractor = extract.func  # type: ignore[attr-defined]
        fbank = _make_fbank(self.sample_rate, extractor.num_mel_bins)
        frames = fbank(torch.from_numpy(clip))[: extractor.max_length].numpy()
        padded = np.zeros((extractor.max_length, extractor.num_mel_bins), np.float32)
        padded[: len(frames)] = frames
        return extractor.normalize(padded) if extractor.do_normalize else padded

    def feature_shape(self, model: Any, num_samples: int) -> tuple[int, ...]:
        return (model.config.max_length, model.config.num_mel_bins)

    def blocks(self, model: Any) -> Sequence[Any]:
        blocks: Sequence[Any] = model.layers if hasattr(model, "layers") else model.encoder.layer
        return blocks

    def run(self, model: Any, features: torch.Tensor) -> dict[str, torch.Tensor]:
        result = model(features)
        return {name: result[name] for name in ("pooler_output", "last_hidden_state")}

    def frames(self, state: torch.Tensor, wanted: OutputName) -> tuple[torch.Tensor, int]:
        """Return the patches without the special tokens: all steps of the first band first."""
        num_frames = self.config.get("max_length", _SIZES["max_length"])
        return state[:, _NUM_SPECIAL_TOKENS:], self._num_steps(num_frames)

    def num_valid_steps(self, wanted: OutputName, num_valid: int, num_steps: int) -> int:
        """Count the steps whose frames all lie within the clip."""
        hop = self.sample_rate * _HOP_MILLISECONDS // 1000
        return self._num_steps(1 + (num_valid - self.min_samples()) // hop)

    def _num_steps(self, num_frames: int) -> int:
        """Return how many patches, one after the other, lie within so many frames."""
        patch, step = (self.config.get(one, _SIZES[one]) for one in ("patch_size", "time_stride"))
        return int((num_frames - patch) // step + 1)


class ASTFrontEnd(TransformersFrontEnd):
    """AST's front end, built by hand; `find_model` builds that of every family.

    Args:
        checkpoint: As `find_checkpoint` gives it.
        sample_rate: Sample rate of the waveforms to come, in Hz.
    """

    def __init__(self, checkpoint: Checkpoint, sample_rate: int) -> None:
        super().__init__(AST, checkpoint, sample_rate)


class ASTEmbedder(TransformersEmbedder):
    """AST's embedder, built by hand; `find_model` builds that of every family.

    Args:
        checkpoint: As `find_checkpoint` gives it.
        output: One of `outputs`.
        device: Where the model runs; None means a CUDA GPU if there is one, else the CPU.
        compute_dtype: `"float32"`, `"bfloat16"` or `"float16"`.
    """

    outputs: ClassVar[tuple[str, ...]] = AST.outputs  # known without an instance

    def __init__(
        self,
        checkpoint: Checkpoint,
        output: str = "pooler_output",
        device: str | torch.device | None = None,
        compute_dtype: str = "float32",
    ) -> None:
        super().__init__(AST, checkpoint, output, device, compute_dtype)


@functools.cache
def _make_fbank(sample_rate: int, num_mel_bins: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Make torchaudio's `kaldi.fbank` with the extractor's settings, to the bit.

    That one computes window and mel banks anew for each clip, copies the frames to pad them, and
    takes the log of energies that are never used: half of its time.

    Returns:
        float32 waveform (num_samples,) → float32 log-mel (num_frames, num_mel_bins).
    """
    import torch
    from torchaudio.compliance import kaldi

    size = int(sample_rate * _WINDOW_MILLISECONDS / 1000)
    hop = int(sample_rate * _HOP_MILLISECONDS / 1000)
    padded_size = 1 << (size - 1).bit_length()
    window = torch.hann_window(size, periodic=False)
    banks, _ = kaldi.get_mel_banks(
        num_mel_bins, padded_size, float(sample_rate), 20.0, 0.0, 100.0, -500.0, 1.0
    )
    banks = torch.nn.functional.pad(banks, (0, 1)).T
    smallest = torch.tensor(torch.finfo(torch.float32).eps)

    def fbank(waveform: torch.Tensor) -> torch.Tensor:
        frames = waveform.unfold(0, size, hop)
        frames = frames - frames.mean(dim=1, keepdim=True)
        padded = frames.new_zeros(len(frames), padded_size)
        emphasized = padded[:, :size]
        # The first sample stands for the one before it.
        torch.mul(frames[:, :1], 0.97, out=emphasized[:, :1])
        torch.mul(frames[:, :-1], 0.97, out=emphasized[:, 1:])
        torch.sub(frames, emphasized, out=emphasized)
        emphasized *= window
        power = torch.fft.rfft(padded).abs().pow_(2.0)
        return torch.maximum(power @ banks, smallest).log_()

    return fbank


def _uses_torchaudio() -> bool:
    """Ask what transformers itself asks when it is imported."""
    from transformers.utils.import_utils import is_speech_available

    return bool(is_speech_available())
