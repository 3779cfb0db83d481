"""The checkpoint that a name or a folder means, and where it lies.

This module imports neither torch nor transformers: a run that has nothing to compute asks for an
identity only.
"""

from __future__ import annotations

import contextlib
import os
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from lmdbcache.audio import shown
from lmdbcache.config import DEFAULT_FRONT_END, CacheConfig, ModelName
from lmdbcache.embedders.checkpoint_files import (
    CONFIG_FILES,
    SAFETENSORS,
    TORCH_BIN,
    read_json,
    weight_files,
    weights_digest,
)
from lmdbcache.errors import CacheError, ConfigError, ModelLoadError
from lmdbcache.files import expand_user
from lmdbcache.machine import needing

# Names of AST folders have always stood for AST's front end, in configs that don't state one.
_AST_MODEL_TYPE: Final = "audio-spectrogram-transformer"
_HUB_TIMEOUT_SECONDS: Final = 10.0


@dataclass(frozen=True)
class Checkpoint:
    """A model's weights and settings.

    Args:
        identity: The name for `CacheConfig.model_name`: the same on every machine.
        location: The folder that holds the files, or the Hub name until they are on this machine.
        revision: Commit on the Hub, where known.
        weights_digest: 16 hex digits of `weights_digest(location)`; None until then.
    """

    identity: str
    location: str
    revision: str | None = None
    weights_digest: str | None = None

    @property
    def is_local(self) -> bool:
        """Whether `location` is a folder with every file that is needed."""
        return self.weights_digest is not None

    def provenance(self) -> dict[str, str]:
        """Return the weights' digest and the Hub's revision, as far as they are known."""
        known = {"weights_digest": self.weights_digest, "revision": self.revision}
        return {name: value for name, value in known.items() if value}


def model_identity(name_or_folder: str | os.PathLike[str]) -> str:
    """Return the name by which caches know a model: the value for `CacheConfig.model_name`.

    A Hub name or alias comes back in its canonical form. A checkpoint folder becomes
    `<folder name>@<first 12 digits of its digest>`: the same on every machine, another one as soon
    as the weights change. The network is never asked.

    Args:
        name_or_folder: `"ast"`, a Hub name, or a folder.

    Raises:
        ModelLoadError: A path that isn't a checkpoint folder.
        ConfigError: A name that can't be a model's.
    """
    return identify(name_or_folder).identity


def identify(name_or_folder: str | os.PathLike[str]) -> Checkpoint:
    """Return a checkpoint by its identity, see `model_identity`: a Hub name isn't looked up."""
    folder = _local_folder(name_or_folder)
    if folder is None:
        name = _canonical(os.fspath(name_or_folder))
        return Checkpoint(name, name)
    digest = weights_digest(folder)
    return Checkpoint(_folder_identity(folder, digest), str(folder), weights_digest=digest)


def find_checkpoint(name_or_folder: str | os.PathLike[str]) -> Checkpoint:
    """Look a checkpoint up on this machine: a folder, or the Hub's local cache.

    The network is never asked; `fetch_checkpoint` downloads what this doesn't find. A model that
    is in the Hub's cache is used at the cached revision.

    Args:
        name_or_folder: `"ast"`, a Hub name, or a folder.

    Returns:
        The checkpoint; for a Hub name that isn't on this machine `location` is that name.

    Raises:
        ModelLoadError: A path that isn't a checkpoint folder, or a name that can't be on the Hub.
        ConfigError: A name that can't be a model's.
        MissingDependencyError: A Hub name, and huggingface_hub isn't installed.
    """
    checkpoint = identify(name_or_folder)
    return checkpoint if checkpoint.is_local else _complete(checkpoint)


def fetch_checkpoint(checkpoint: Checkpoint) -> Checkpoint:
    """Return the same checkpoint with its files on this machine, downloaded if need be.

    Args:
        checkpoint: As `find_checkpoint` gives it.

    Returns:
        A checkpoint whose `location` is a folder.

    Raises:
        ModelLoadError: It isn't on this machine and can't be downloaded; says what to do.
        MissingDependencyError: huggingface_hub isn't installed.
    """
    if checkpoint.is_local:
        return checkpoint
    found = _complete(checkpoint)
    if found.is_local:
        return found
    _download(checkpoint.location)
    found = _complete(checkpoint)
    if not found.is_local:
        raise _unusable(checkpoint.location)
    return found


def settings_folder(checkpoint: Checkpoint, *, download: bool = False) -> Path | None:
    """Return the folder with a checkpoint's JSON files; its weights needn't be here.

    Args:
        checkpoint: As `find_checkpoint` gives it.
        download: Download the two files if they aren't on this machine; otherwise the network is
            never asked, and None is returned.

    Raises:
        ModelLoadError: They can't be downloaded; says what to do.
        MissingDependencyError: huggingface_hub isn't installed.
    """
    if checkpoint.is_local:
        return Path(checkpoint.location)
    folder = _cached(checkpoint.location)
    if folder is None and download:
        _download(checkpoint.location, CONFIG_FILES)
        folder = _cached(checkpoint.location)
        if folder is None:
            raise _unusable(checkpoint.location)
    return folder


def folder_provenance(model: str | os.PathLike[str]) -> dict[str, str]:
    """Return where a model's folder lies, for a store's provenance: an audit finds it again."""
    folder = expand_user(model)
    return {"checkpoint": str(folder.absolute())} if (folder / "config.json").is_file() else {}


def moved_weights(
    model: str | os.PathLike[str], provenance: Mapping[str, str], store: object
) -> str:
    """Describe how a Hub name means other weights here than those that filled a store.

    The Hub's cache on this machine is looked at; the network is never asked.

    Args:
        model: What `find_checkpoint` takes.
        provenance: The store's.
        store: For the message.

    Returns:
        Empty where the name means the same weights, or nothing is known.
    """
    before, digest = provenance.get("revision"), provenance.get("weights_digest")
    if before is None:
        return ""
    try:
        import huggingface_hub.constants as hub

        if _local_folder(model) is not None:
            return ""
        name = _canonical(os.fspath(model))
        repository = Path(hub.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
        now = (repository / "refs" / "main").read_text("utf-8").strip()
    except (ImportError, CacheError, OSError, ValueError):
        return ""  # not on this machine
    if now == before:
        return ""
    with contextlib.suppress(ModelLoadError):
        if weights_digest(repository / "snapshots" / now) == digest:
            return ""
    return (
        f"{store} was filled with revision {before[:12]} of {name}, and the Hub's cache on this "
        f"machine has revision {now[:12]}, with other weights or settings. What is stored stays "
        "that of the earlier revision, and nothing of the other is added. Clear the store to "
        "extract with the new revision, or give that another `model_name`"
    )


def _local_folder(name_or_folder: str | os.PathLike[str]) -> Path | None:
    """Return the folder meant, or None for a Hub name or alias.

    Raises:
        ModelLoadError: A path that isn't a checkpoint folder.
        ConfigError: Neither text nor a path.
    """
    if not isinstance(name_or_folder, (str, os.PathLike)):
        raise ConfigError(
            f"model: a {type(name_or_folder).__name__}; give a Hub name or a checkpoint folder"
        )
    text = os.fspath(name_or_folder)
    try:
        path = expand_user(text) if text.startswith("~") else Path(text)
        is_path = (
            isinstance(name_or_folder, os.PathLike)
            or text.startswith((".", os.sep, "~"))
            or (os.sep in text and path.exists())
        )
        if not is_path:
            # A bare word: an alias means the same model in every working directory.
            is_alias = _canonical(text) != unicodedata.normalize("NFC", text).strip()
            is_path = not is_alias and os.sep not in text and (path / "config.json").is_file()
        if not is_path:
            return None
        if (path / "config.json").is_file():
            return Path(os.path.abspath(path))  # noqa: PTH100 - a link keeps its given name
        found = "no config.json in it" if path.is_dir() else "not a folder"
        if not path.exists():
            found = "no such folder"
    except OSError as error:  # a name longer than the file system's
        path, found = Path(f"{text[:80]}…"), str(error.strerror)
    raise ModelLoadError(
        f"{shown(path)}: {found}; expected a checkpoint folder as save_pretrained writes it "
        "(config.json, preprocessor_config.json, model.safetensors), or a Hub name such as "
        "'ast-finetuned'"
    )


def _canonical(name: str) -> str:
    return CacheConfig(model_name=name).model_name


def _folder_identity(folder: Path, digest: str) -> str:
    name = _canonical(f"{folder.name or 'root'}@{digest[:12]}")
    with contextlib.suppress(ModelLoadError):  # `find_model` tells what is wrong with it
        if read_json(folder / "config.json").get("model_type") == _AST_MODEL_TYPE:
            return ModelName(name, DEFAULT_FRONT_END)
    return name


def _complete(checkpoint: Checkpoint) -> Checkpoint:
    """Fill in folder, revision and digest if the Hub's local cache has every file needed."""
    folder = _cached(checkpoint.location)
    if folder is None or not weight_files(folder):
        return checkpoint
    return replace(
        checkpoint,
        location=str(folder),
        revision=folder.name,
        weights_digest=weights_digest(folder),
    )


def _cached(name: str) -> Path | None:
    """Return the folder in the Hub's local cache that has both JSON files."""
    hub = _hub()
    if "@" in name:
        raise ModelLoadError(
            f"{name}: the identity of a local checkpoint folder, which can't be looked up by name; "
            "give the folder itself"
        )
    try:
        folder = Path(
            hub.snapshot_download(name, allow_patterns=list(CONFIG_FILES), local_files_only=True)
        )
    except hub.errors.HFValidationError as error:
        raise ModelLoadError(
            f"{name}: no such folder here, and not a name that the Hub can have "
            "('owner/model'); give a checkpoint folder, a Hub name, or 'ast-finetuned'"
        ) from error
    except hub.errors.LocalEntryNotFoundError:
        return None
    return folder if all((folder / file).is_file() for file in CONFIG_FILES) else None


def _download(name: str, wanted: Sequence[str] = ()) -> None:
    """Bring a repository into the Hub's local cache: the files wanted, else all that is needed.

    One request without retries goes first: huggingface_hub's own downloads retry for 23 s where
    the network is missing.
    """
    hub = _hub()
    try:
        info = hub.HfApi().model_info(name, timeout=_HUB_TIMEOUT_SECONDS)
        if not wanted:
            files = [sibling.rfilename for sibling in info.siblings or ()]
            has_safetensors = any(file.endswith(".safetensors") for file in files)
            weights = SAFETENSORS if has_safetensors else TORCH_BIN
            # Large models come in parts, and an index says which part holds what.
            wanted = (*CONFIG_FILES, weights, f"{weights}.index.json")
        hub.snapshot_download(name, allow_patterns=list(wanted))
    except hub.errors.RepositoryNotFoundError as error:
        raise ModelLoadError(
            f"{name}: the Hub has no such model, or it is private or gated; check the spelling, "
            "or log in (hf auth login)"
        ) from error
    except Exception as error:
        reason = f"can't be downloaded ({type(error).__name__}: {error})"
        remedy = "try again when the network is back"
        if isinstance(error, hub.errors.OfflineModeIsEnabled):
            reason, remedy = "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE"
        here = " (the folder of that name has no config.json)" if Path(name).is_dir() else ""
        raise ModelLoadError(
            f"{name}: not on this machine{here}, and {reason}. Give a local checkpoint folder "
            f"(`model`); or download {name} on a machine with network (hf download) and set "
            f"HF_HOME to a copy of its cache; or {remedy}"
        ) from error


def _unusable(name: str) -> ModelLoadError:
    return ModelLoadError(
        f"{name}: this repository on the Hub isn't a usable checkpoint: "
        f"expected {', '.join(CONFIG_FILES)} and model.safetensors (or pytorch_model.bin)"
    )


def _hub() -> Any:
    with needing("looking up a model by its Hub name", "audio"):
        import huggingface_hub
        import huggingface_hub.errors
    return huggingface_hub
