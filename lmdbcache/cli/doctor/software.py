"""The packages: which versions, and whether they can be imported together."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, Final

from lmdbcache.cli.doctor.findings import Finding, note, ok, problem
from lmdbcache.machine import install_line

_CORE: Final = ("lmdb", "numpy", "msgpack", "xxhash", "ml_dtypes")
_AUDIO: Final = ("torch", "torchaudio", "transformers", "soundfile", "soxr")
_SECONDS: Final = 180
_AUDIO_REMEDY: Final = install_line("audio")
_TORCHAUDIO_REMEDY: Final = (
    'torchaudio\'s wheel fits torch up to 2.14: pip install "torch>=2.11,<2.15" "torchaudio>=2.11"'
)

# In a process of its own: torch takes seconds and hundreds of megabytes, and a pair of packages
# that don't fit may end the process.
_PROBE: Final = """
import importlib, json, sys
found = {}
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except BaseException as error:
        found[name] = f"{type(error).__name__}: {error}"
if "torch" in sys.modules and "torch" not in found:
    torch = sys.modules["torch"]
    found["cuda"] = {"built": torch.version.cuda, "devices": []}
    if torch.cuda.is_available():
        found["cuda"]["devices"] = [
            torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())
        ]
print("\\n" + json.dumps(found))
"""


def check_software() -> Iterator[Finding]:
    """Versions of Python and the packages; imports of torch and the audio packages together."""
    python = ".".join(platform.python_version_tuple())
    yield ok("python", f"{python}, {platform.platform()}")
    for package in _CORE:
        yield ok(package, _version(package) or "version unknown")
    yield from _check_audio()


def _check_audio() -> Iterator[Finding]:
    versions = {package: _version(package) for package in _AUDIO}
    installed = [package for package in _AUDIO if versions[package]]
    found = _probed(installed) if installed else {}
    for package in _AUDIO:
        version = versions[package]
        if version is None:
            yield note(package, "not installed: extraction isn't possible", _AUDIO_REMEDY)
        elif package in found:
            remedy = _TORCHAUDIO_REMEDY if package == "torchaudio" else _AUDIO_REMEDY
            text = f"{version} is installed and can't be imported ({found[package]})"
            yield problem(package, text, remedy)
        else:
            yield ok(package, f"{version}, imports")
    if "cuda" in found:
        yield _cuda(found["cuda"])


def _cuda(found: dict[str, Any]) -> Finding:
    if found["devices"]:
        return ok("cuda", f"{found['built']}: {', '.join(found['devices'])}")
    if found["built"] is None:
        return note("cuda", "torch is built without CUDA; models run on the CPU")
    return note(
        "cuda",
        f"no GPU is visible to torch (built for CUDA {found['built']}); models run on the CPU",
        "with a GPU in this machine: check nvidia-smi, the driver, and $CUDA_VISIBLE_DEVICES",
    )


def _probed(packages: list[str]) -> dict[str, Any]:
    """Package → why it can't be imported; and what torch says of CUDA."""
    try:
        result = subprocess.run(
            [sys.executable, "-c", _PROBE, *packages],
            check=False,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=_SECONDS,
        )
        found = json.loads(result.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return dict.fromkeys(packages, f"importing took more than {_SECONDS} s")
    except (OSError, ValueError, IndexError):
        return dict.fromkeys(packages, f"importing them ended the process, {_ending(result)}")
    return dict(found)


def _ending(result: subprocess.CompletedProcess[str]) -> str:
    lines = result.stderr.strip().splitlines()
    return f"exit code {result.returncode}{f': {lines[-1]}' if lines else ''}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
