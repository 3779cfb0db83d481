"""The files of a checkpoint in one form, however their JSON is laid out.

The form is the one that `save_pretrained` and safetensors write, so that what they wrote is
digested as it is.
"""

from __future__ import annotations

import json
from typing import IO, Any, Final

__all__ = ["canonical_head"]

# Where a checkpoint was loaded from before it was saved.
_PLACE: Final = "_name_or_path"
_MAX_HEADER_BYTES: Final = 100 << 20  # safetensors' own limit
_ALIGNMENT: Final = 8


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
