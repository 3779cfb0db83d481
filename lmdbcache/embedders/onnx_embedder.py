"""A model file in ONNX as a model whose embeddings can be cached, run by onnxruntime."""

from __future__ import annotations

import mmap
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import xxhash

from lmdbcache.embedders.base import library_versions
from lmdbcache.embedders.stated_model import StatedEmbedder, StatedModel
from lmdbcache.errors import ConfigError, ModelLoadError, ModuleError
from lmdbcache.files import first_line
from lmdbcache.machine import available_cores, needing

if TYPE_CHECKING:
    import os

    import torch
    from numpy.typing import NDArray

    from lmdbcache.config import CacheConfig
    from lmdbcache.embedders.base import Embedder

_CHUNK_BYTES: Final = 1 << 20
_DTYPES: Final = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int16)": np.int16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}
# An entry of `external_data` in a tensor: key "location", then the length of its value.
_LOCATION: Final = re.compile(rb"\x0a\x08location\x12([\x80-\xff]?[\x01-\x7f])")


class ONNXEmbedder(StatedModel):
    """An ONNX file and the front end that it needs.

        model = ONNXEmbedder("cnn14.onnx", name="cnn14/1", sample_rate=32000)
        config = config_for(model, duration=2.0, namespace="esc50")
        extract(cache, config, clips, model=model)

    The model has one input, of features (batch, ...), and outputs (batch, ...). A file whose batch
    is fixed to one clip is run clip by clip. Features are cast to the type of its input.

    It computes in the file's own precision, on the CPU or a CUDA GPU, with a thread for each core
    that this process may use. Needs `pip install "lmdbcache[onnx]"`, or onnxruntime-gpu.

    A store's identity has `name` and the front end's id. A digest of the file, and of the files
    that hold its weights, is kept in the provenance; a store that another one filled is refused.

    Args:
        path: The file.
        name: The model's name in caches.
        sample_rate: Of the waveforms that it takes, in Hz.
        front_end: As for `ModuleEmbedder`; None gives the model waveforms (batch, num_samples).
        front_end_id: Names the front end and its version; wanted with `front_end`.
        outputs: Name of each output → its name in the file; None takes all by those names.
        min_samples: The shortest clip that makes sense, in samples; shorter ones are reported.

    Raises:
        ConfigError: Something here can't identify a model, or the file has several inputs.
        ModelLoadError: The file can't be loaded.
        MissingDependencyError: onnxruntime isn't installed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        name: str,
        sample_rate: int,
        front_end: Callable[[NDArray[np.float32]], Any] | None = None,
        front_end_id: str | None = None,
        outputs: Mapping[str, str] | None = None,
        min_samples: int = 1,
    ) -> None:
        self.path: Final = Path(path).absolute()
        session = _load(self.path, "cpu")
        if len(inputs := session.get_inputs()) != 1:
            raise ConfigError(
                f"{self.path}: it has {len(inputs)} inputs "
                f"({', '.join(one.name for one in inputs)}); one is needed: export the model with "
                "the others as constants"
            )
        known = [one.name for one in session.get_outputs()]
        outputs = outputs or {name: name for name in known}
        if unknown := sorted(set(outputs.values()).difference(known)):
            raise ConfigError(
                f"outputs: {self.path} has no {', '.join(unknown)}, but {', '.join(known)}"
            )
        super().__init__(
            name=name,
            sample_rate=sample_rate,
            front_end=front_end,
            front_end_id=front_end_id,
            outputs=outputs,
            min_samples=min_samples,
        )

    def check(self, config: CacheConfig) -> None:
        """Check that this model can fill a store of this config.

        Raises:
            ConfigError: The config is another model's, or of a lower `compute_dtype`.
        """
        super().check(config)
        if config.compute_dtype != "float32":
            raise ConfigError(
                f"compute_dtype: {config.compute_dtype!r}; an ONNX file computes in its own "
                "precision: leave it 'float32', and give another file another name"
            )

    def make_embedder(self, config: CacheConfig, device: str | None = None) -> Embedder:
        """Load the model.

        Args:
            config: Says which output.
            device: `"cpu"`, `"cuda"`, `"cuda:1"`; None takes a CUDA GPU if onnxruntime has one.

        Raises:
            ConfigError: The config is another model's, or the device doesn't exist.
            ModelLoadError: The file can't be loaded.
        """
        self.check(config)
        return _ONNXOutput(self, config, device)


class _ONNXOutput(StatedEmbedder):
    """An `Embedder`: one output of an `ONNXEmbedder`."""

    def __init__(self, source: ONNXEmbedder, config: CacheConfig, device: str | None) -> None:
        super().__init__(source, config)
        self._path, self._digest = source.path, _digest(source.path)
        self._session = _load(source.path, device)
        self._input = self._session.get_inputs()[0]
        batch = self._input.shape[0] if self._input.shape else None
        if isinstance(batch, int) and batch != 1:
            raise ConfigError(
                f"{source.path}: its batch is fixed to {batch} clips; export it with a batch of "
                "any size, or of 1"
            )
        self._is_single = batch == 1

    def embed(self, features: torch.Tensor) -> torch.Tensor:
        output = self._config.output
        return self.embed_outputs(features, [output])[output]

    def embed_outputs(
        self, features: torch.Tensor, outputs: Collection[str]
    ) -> dict[str, torch.Tensor]:
        import torch

        rows: NDArray[Any] = (
            features.cpu().numpy().astype(_DTYPES.get(self._input.type, np.float32), copy=False)
        )
        names = [self._source._taken_by[output] for output in outputs]  # noqa: SLF001
        batches = [rows[row : row + 1] for row in range(len(rows))] if self._is_single else [rows]
        try:
            runs = [self._session.run(names, {self._input.name: batch}) for batch in batches]
        except Exception as error:
            raise ModuleError(
                f"{self._source.identity} fails on features of {rows.dtype} {rows.shape}; the file "
                f"takes {self._input.type} {self._input.shape} ({first_line(error)})"
            ) from error
        found = {}
        for name, parts in zip(outputs, zip(*runs, strict=True), strict=True):
            for part, batch in zip(parts, batches, strict=True):
                if getattr(part, "shape", ())[:1] != (len(batch),) or part.dtype.kind not in "fiu":
                    kind = getattr(part, "shape", type(part).__name__)
                    raise ConfigError(
                        f"output: {name!r} of {self._source.identity} is {kind} for {len(batch)} "
                        "clips; expected numbers (batch, ...): take another output"
                    )
            found[name] = torch.from_numpy(np.concatenate(parts).astype(np.float32, copy=False))
        return found

    def provenance(self) -> dict[str, str]:
        is_cpu = self._session.get_providers()[0] == "CPUExecutionProvider"
        return {
            "weights_digest": self._digest,
            "module": self._path.name,
            **library_versions("onnxruntime"),
            "device": "cpu" if is_cpu else "cuda",
            "compute_dtype": self._config.compute_dtype,
        }


def _load(path: Path, device: str | None) -> Any:
    with needing("running an ONNX file", "onnx"):
        import onnxruntime
    kind, _, number = (device or "").partition(":")
    has_gpu = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    if kind not in ("", "cpu", "cuda") or (kind == "cuda" and not has_gpu):
        raise ConfigError(
            f"device: {device!r} can't be used by this onnxruntime; use 'cpu', or install "
            "onnxruntime-gpu for 'cuda'"
        )
    providers: list[Any] = ["CPUExecutionProvider"]
    if has_gpu and kind != "cpu":
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": int(number or 0)}))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = available_cores()  # by itself it counts the machine's
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:
        raise ModelLoadError(
            f"{path}: onnxruntime can't load it ({first_line(error)}); export the model again"
        ) from error


def _digest(path: Path) -> str:
    """Return 16 hex digits (xxh3-64) over the file and those that hold its weights.

    Raises:
        ModelLoadError: One can't be read.
    """
    digest = xxhash.xxh3_64()
    try:
        for one in (path, *(path.parent / name for name in _weight_files(path))):
            digest.update(f"{one.stat().st_size}\n".encode())
            with one.open("rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    digest.update(chunk)
    except OSError as error:
        raise ModelLoadError(f"{path}: a file of the model can't be read ({error})") from error
    return str(digest.hexdigest())


def _weight_files(path: Path) -> list[str]:
    """Return the names of the other files that hold an ONNX file's tensors, sorted."""
    names = set()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for match in _LOCATION.finditer(content):
            *low, last = match[1]  # a varint, of up to 16383
            length = last if not low else (low[0] & 0x7F) | last << 7
            name = content[match.end() : match.end() + length]
            names.add(name.decode("utf-8", "replace"))
    return sorted(name for name in names if (path.parent / name).is_file())
