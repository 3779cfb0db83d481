from .ast_cached.esc50 import ESC50Dataset as ESC50Dataset
from .ast_cached.items import vegas_collate_fn as vegas_collate_fn
from .ast_cached.vegas import (
    VEGASDataset as VEGASDataset,
    create_vegas_dataloader as create_vegas_dataloader,
)
from .ast_cached.vggsound import VGGSoundDataset as VGGSoundDataset
from .base import (
    AudioDataset as AudioDataset,
    ListedDataset as ListedDataset,
    Sample as Sample,
    sample_id_of as sample_id_of,
    source_of as source_of,
)
from .cached_audio import CachedAudioDataset as CachedAudioDataset, collate_mixed as collate_mixed
from .namespaces import PUBLISHED as PUBLISHED, check_namespace as check_namespace
from .narrowing import (
    NODE_SEED as NODE_SEED,
    Narrowing as Narrowing,
    split_names as split_names,
    split_of as split_of,
    split_source as split_source,
)
from .opening import open_dataset as open_dataset
from .overlaps import overlap_audit as overlap_audit
from .scanning import LeftOut as LeftOut
from .splits import (
    node_split as node_split,
    partition_samples as partition_samples,
    split_samples as split_samples,
)
from .streamed import stream_clips as stream_clips
from .tar_shards import TarShards as TarShards
from .vegas import CLASS_LABELS as CLASS_LABELS, NAMESPACE as NAMESPACE
