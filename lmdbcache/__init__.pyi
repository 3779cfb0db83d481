from .cache import (
    Coverage as Coverage,
    EmbeddingCache as EmbeddingCache,
    EmbeddingReader as EmbeddingReader,
    Explanation as Explanation,
    HiddenStateView as HiddenStateView,
    Nearest as Nearest,
    RecordingView as RecordingView,
    StoreInfo as StoreInfo,
    TokenLayout as TokenLayout,
    clip_lengths as clip_lengths,
    nearest as nearest,
)
from .cli import progress_bar as progress_bar
from .config import CacheConfig as CacheConfig
from .datasets import (
    CachedAudioDataset as CachedAudioDataset,
    ESC50Dataset as ESC50Dataset,
    VEGASDataset as VEGASDataset,
    VGGSoundDataset as VGGSoundDataset,
    collate_mixed as collate_mixed,
    open_dataset as open_dataset,
)
from .embedders import (
    ModuleEmbedder as ModuleEmbedder,
    ONNXEmbedder as ONNXEmbedder,
    config_for as config_for,
    model_identity as model_identity,
)
from .errors import (
    AudioDecodeError as AudioDecodeError,
    CacheError as CacheError,
    CacheFullError as CacheFullError,
    CacheNotFoundError as CacheNotFoundError,
    ConfigError as ConfigError,
    CoverageError as CoverageError,
    DatasetError as DatasetError,
    DuplicateSampleError as DuplicateSampleError,
    ExtractionError as ExtractionError,
    FormatVersionError as FormatVersionError,
    FrontEndError as FrontEndError,
    IntegrityError as IntegrityError,
    InvalidEmbeddingError as InvalidEmbeddingError,
    InvalidSampleIdError as InvalidSampleIdError,
    MissingDependencyError as MissingDependencyError,
    MissingLabelError as MissingLabelError,
    ModelLoadError as ModelLoadError,
    ModuleError as ModuleError,
    NotRegularFileError as NotRegularFileError,
    ProvenanceMismatchError as ProvenanceMismatchError,
    ReadOnlyCacheError as ReadOnlyCacheError,
    RemoteError as RemoteError,
    SampleNotFoundError as SampleNotFoundError,
    StorageError as StorageError,
    TransferError as TransferError,
    WriterClosedError as WriterClosedError,
)
from .exchange import export_embeddings as export_embeddings, import_embeddings as import_embeddings
from .extraction import (
    RankShare as RankShare,
    extract as extract,
    extract_on_ray as extract_on_ray,
    extract_or_load_ast_embeddings as extract_or_load_ast_embeddings,
    share_from_environment as share_from_environment,
    to_clips as to_clips,
)
from .report import build_report as build_report
from .storage import (
    EmbeddingWriter as EmbeddingWriter,
    EpochStatistics as EpochStatistics,
    ReadStatistics as ReadStatistics,
    Windows as Windows,
    window_id as window_id,
)
from .training import (
    CachedEncoder as CachedEncoder,
    EmbeddingDataset as EmbeddingDataset,
    TensorMapping as TensorMapping,
    WeightedSum as WeightedSum,
    collate_embeddings as collate_embeddings,
    make_dataloader as make_dataloader,
    preload as preload,
)

__version__: str
