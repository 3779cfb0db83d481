"""The files of a checkpoint, and one digest for them, however their JSON is laid out.

The form that is digested is the one that `save_pretrained` and safetensors write, so that what
they wrote is digested as it is.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, Any, Final

import xxhash

from lmdbcache.audio import shown
from lmdbcache.errors import ModelLoadError

CONFIG_FILES: Final = ("config.json", "preprocessor_config.json")
SAFETENSORS: Final = "*.safetensors"
TORCH_BIN: Final = "pytorch_model*.bin"

# Where a checkpoint was loaded from before it was saved.
_PLACE: Final = "_name_or_path"
_CHUNK_BYTES: Final = 4 << 20
_MAX_HEADER_BYTES: Final = 100 << 20  # safetensors' own limit
_ALIGNMENT: Final = 8


def read_json(path: Path) -> dict[str, Any]:
    """Read one of a checkpoint's settings files.

    Raises:
        ModelLoadError: It is missing or isn't a JSON object.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelLoadError(
            f"{path}: missing; expected with the weights, as save_pretrained of the model and of "
            "its feature extractor write it (without it the features would be a guess)"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ModelLoadError(f"{path}: not a JSON object; save or download the checkpoint again")
    return settings


def weights_digest(folder: str | os.PathLike[str]) -> str:
    """Return a digest of everything in a checkpoint that decides an embedding.

    Taken over name, length and bytes of config.json, preprocessor_config.json and the weights
    (*.safetensors, else pytorch_model*.bin), sorted by name; the folder's own name and place have
    no part. JSON and the header of safetensors files are taken in one form: white space, the order
    of keys, `_name_or_path`, and a header's metadata have no part either.

    Args:
        folder: A checkpoint as `save_pretrained` writes it.

    Returns:
        16 hex digits (xxh3-64).

    Raises:
        ModelLoadError: The folder holds no weights, or a file can't be read.
    """
    folder = Path(folder)
    weights = weight_files(folder)
    if not weights:
        raise ModelLoadError(
            f"{shown(folder)}: no weights in this folder; expected model.safetensors "
            "(or pytorch_model.bin), as save_pretrained writes it"
        )
    configs = [folder / name for name in CONFIG_FILES if (folder / name).is_file()]
    digest = xxhash.xxh3_64()
    for path in sorted([*configs, *weights], key=lambda path: path.name):
        _update(digest, path)
    return str(digest.hexdigest())


def weight_files(folder: Path) -> list[Path]:
    """List the files with a checkpoint's weights: safetensors, else PyTorch's."""
    # A pipe in the place of a file would be waited for.
    kinds = (SAFETENSORS, TORCH_BIN)
    found = [[path for path in folder.glob(kind) if path.is_file()] for kind in kinds]
    return found[0] or found[1]


def canonical_head(name: str, file: IO[bytes]) -> bytes:
    """Read the part of a file that can be laid out in several ways, in one form.

    Args:
        name: The file's name.
        file: Opened at its begin; left where what was read ends.

    Returns:
        A JSON file as a whole, the header of a safetensors file, and nothing of any other. What
        isn't such a file after all comes back as it is.
    """
    if name.endswith(".json"):
        return _settings(file.read())
    if name.endswith(".safetensors"):
        return _header(file)
    return b""


def _settings(raw: bytes) -> bytes:
    try:
        values = json.loads(raw)
    except (ValueError, RecursionError):
        return raw
    if not isinstance(values, dict) or not values:
        return raw
    values.pop(_PLACE, None)
    return f"{json.dumps(_ordered(values), indent=2)}\n".encode()


def _ordered(value: Any) -> Any:
    if isinstance(value, list):
        return [_ordered(item) for item in value]
    if not isinstance(value, dict):
        return value
    # transformers has numbers for keys, as in id2label, and sorts them as such.
    are_numbers = all(key.isdecimal() for key in value)
    return {key: _ordered(value[key]) for key in sorted(value, key=int if are_numbers else None)}


def _header(file: IO[bytes]) -> bytes:
    prefix = file.read(_ALIGNMENT)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < _ALIGNMENT or length > _MAX_HEADER_BYTES:
        return prefix
    raw = file.read(length)
    try:
        tensors = {name: one for name, one in json.loads(raw).items() if name != "__metadata__"}
        entries = sorted((*one["data_offsets"], name) for name, one in tensors.items())
        ordered = {
            name: {key: tensors[name][key] for key in ("dtype", "shape", "data_offsets")}
            for *_, name in entries
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return prefix + raw
    text = json.dumps(
        {"__metadata__": {"format": "pt"}, **ordered}, separators=(",", ":"), ensure_ascii=False
    )
    header = text.encode("utf-8", "surrogatepass")
    header += b" " * (-len(header) % _ALIGNMENT)
    return len(header).to_bytes(_ALIGNMENT, "little") + header


def _update(digest: Any, path: Path) -> None:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = canonical_head(path.name, file)
            rest = size - file.tell()
            # The length frames the bytes, so that no two lists of files look the same.
            digest.update(os.fsencode(path.name) + f"\0{len(head) + rest}\0".encode() + head)
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise ModelLoadError(
            f"{shown(path)}: can't be read: {error.strerror or error}; check its permissions"
        ) from error
