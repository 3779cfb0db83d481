from .cache import (
    Coverage as Coverage,
    DatasetCoverage as DatasetCoverage,
    EmbeddingCache as EmbeddingCache,
    EpochStatistics as EpochStatistics,
    Explanation as Explanation,
    HiddenStateView as HiddenStateView,
    ReadStatistics as ReadStatistics,
    StoreInfo as StoreInfo,
    TokenLayout as TokenLayout,
)
from .config import CacheConfig as CacheConfig
from .datasets import (
    CachedAudioDataset as CachedAudioDataset,
    VEGASDataset as VEGASDataset,
    collate_mixed as collate_mixed,
    open_dataset as open_dataset,
)
from .embedders import (
    ModuleEmbedder as ModuleEmbedder,
    config_for as config_for,
    model_identity as model_identity,
)
from .errors import CacheError as CacheError
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
from .storage import EmbeddingReader as EmbeddingReader, EmbeddingWriter as EmbeddingWriter
from .training import (
    CachedEncoder as CachedEncoder,
    EmbeddingDataset as EmbeddingDataset,
    TensorMapping as TensorMapping,
    collate_embeddings as collate_embeddings,
    make_dataloader as make_dataloader,
    preload as preload,
)

__version__: str
