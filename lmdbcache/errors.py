"""Every error that lmdbcache raises on purpose.

    CacheError
    ├── ConfigError (ValueError)             a field of a CacheConfig is invalid
    ├── CacheNotFoundError (FileNotFoundError)   nothing is stored for this config
    ├── SampleNotFoundError (KeyError)       the newest commit doesn't hold this sample
    ├── MissingLabelError (KeyError)         a sample used in training has no label
    ├── InvalidSampleIdError (ValueError)    not a usable `file_id:class`
    ├── InvalidEmbeddingError (ValueError)   NaN, Inf, wrong shape or dtype; not reproducible
    ├── DuplicateSampleError                 the sample is stored already and may not be replaced
    ├── StorageError                         LMDB or the file system refused an operation
    │   ├── CacheFullError                   the disk or the map is full
    │   ├── NotRegularFileError (OSError)    a link, pipe or device in place of a store's file
    │   ├── ReadOnlyCacheError               this process has no permission to write here
    │   ├── RemoteError                      a shared place is unreachable, refuses, or lacks a file
    │   └── WriterClosedError                a writer used after close, or in another process
    ├── CoverageError                        too little of a dataset is stored
    ├── IntegrityError                       what is on disk isn't what was written
    │   ├── FormatVersionError               written by a newer lmdbcache
    │   └── ProvenanceMismatchError          other weights or another front end filled this store
    ├── DatasetError (ValueError)            a dataset's folder or arguments are invalid
    ├── TransferError (ValueError)           a file can't be imported or exported
    ├── MissingDependencyError (ImportError) an optional package is needed for this call
    └── ExtractionError                      the run as a whole can't continue
        ├── ModelLoadError                   a checkpoint or its front end can't be loaded
        ├── AudioDecodeError                 one clip gives no usable waveform
        │   └── FrontEndError                the front end gives no usable features of one clip
        └── ModuleError (RuntimeError)       a module fails on a batch of features

Each is built from one message (what, where, what to do next), because torch's DataLoader rebuilds
errors from their message when they cross from a worker to the main process.
"""

from __future__ import annotations

__all__ = [
    "AudioDecodeError",
    "CacheError",
    "CacheFullError",
    "CacheNotFoundError",
    "ConfigError",
    "CoverageError",
    "DatasetError",
    "DuplicateSampleError",
    "ExtractionError",
    "FormatVersionError",
    "FrontEndError",
    "IntegrityError",
    "InvalidEmbeddingError",
    "InvalidSampleIdError",
    "MissingDependencyError",
    "MissingLabelError",
    "ModelLoadError",
    "ModuleError",
    "NotRegularFileError",
    "ProvenanceMismatchError",
    "ReadOnlyCacheError",
    "RemoteError",
    "SampleNotFoundError",
    "StorageError",
    "TransferError",
    "WriterClosedError",
]


class CacheError(Exception):
    """Base class of every error raised by lmdbcache."""


class ConfigError(CacheError, ValueError):
    """A field of a `CacheConfig` has a value that can't identify a cache."""


class CacheNotFoundError(CacheError, FileNotFoundError):
    """Nothing is stored for this config under this root."""


class SampleNotFoundError(CacheError, KeyError):
    """The newest commit of the store doesn't hold this sample."""

    def __str__(self) -> str:
        # KeyError would show the message's repr.
        return str(self.args[0]) if self.args else ""


class MissingLabelError(CacheError, KeyError):
    """A sample used in training has no label."""

    __str__ = SampleNotFoundError.__str__


class InvalidSampleIdError(CacheError, ValueError):
    """A sample id isn't a usable `file_id:class`."""


class InvalidEmbeddingError(CacheError, ValueError):
    """An embedding can't be stored: NaN or Inf, another shape or dtype, or not reproducible."""


class DuplicateSampleError(CacheError):
    """The sample is stored already and `on_duplicate="error"` refuses it."""


class StorageError(CacheError):
    """LMDB or the file system refused an operation."""


class CacheFullError(StorageError):
    """The disk, or the memory map of the store, has no room for this commit."""


class NotRegularFileError(StorageError, OSError):
    """A link, named pipe, device or folder is in place of a file of a store, or the reverse."""


class ReadOnlyCacheError(StorageError):
    """This process has no permission to write to the store."""


class RemoteError(StorageError):
    """A place that embeddings are shared through is unreachable, refuses, or lacks a file."""


class WriterClosedError(StorageError):
    """A writer was used after `close`, or in another process than the one that made it."""


class CoverageError(CacheError):
    """Too little of a dataset is stored; the message has a table by class."""


class IntegrityError(CacheError):
    """What is on disk isn't what was written."""


class FormatVersionError(IntegrityError):
    """The store was written in a format version that this release doesn't know."""


class ProvenanceMismatchError(IntegrityError):
    """The store was filled with other weights or another front end."""


class DatasetError(CacheError, ValueError):
    """A dataset's folder or arguments can't be used."""


class TransferError(CacheError, ValueError):
    """A file or folder can't be imported, or can't be written by an export."""


class ExtractionError(CacheError):
    """An extraction as a whole can't go on."""


class ModelLoadError(ExtractionError):
    """A checkpoint or its feature extractor can't be loaded."""


class AudioDecodeError(ExtractionError):
    """One clip gives no usable waveform."""


class FrontEndError(AudioDecodeError):
    """A front end fails on one clip, or gives no array of numbers."""


class ModuleError(ExtractionError, RuntimeError):
    """A module fails on a batch of features."""


class MissingDependencyError(CacheError, ImportError):
    """An optional package is needed for this call."""
