from .comparison import (
    DEFAULT_TOLERANCE as DEFAULT_TOLERANCE,
    StoreComparison as StoreComparison,
    compare_stores as compare_stores,
    difference_of as difference_of,
    largest_difference as largest_difference,
)
from .coverage import (
    Coverage as Coverage,
    coverage_of as coverage_of,
    left_out_counts as left_out_counts,
)
from .embedding_cache import (
    ROOT_VARIABLE as ROOT_VARIABLE,
    EmbeddingCache as EmbeddingCache,
    EmbeddingReader as EmbeddingReader,
)
from .misses import (
    FAILURES_NAME as FAILURES_NAME,
    ClipFailure as ClipFailure,
    Explanation as Explanation,
    MissReason as MissReason,
    read_failures as read_failures,
    update_failures as update_failures,
)
from .pruning import (
    PrunePlan as PrunePlan,
    PrunePolicy as PrunePolicy,
    leftovers_under as leftovers_under,
    plan_pruning as plan_pruning,
    prune as prune,
)
from .recording_view import RecordingView as RecordingView
from .records import (
    SOURCES_NAME as SOURCES_NAME,
    THIS_STORE as THIS_STORE,
    Origin as Origin,
    Source as Source,
    SourceRecorder as SourceRecorder,
    SourceRecords as SourceRecords,
    clip_lengths as clip_lengths,
    count_origins as count_origins,
    write_sources as write_sources,
)
from .sources import (
    STATES as STATES,
    SourceReport as SourceReport,
    adopt_sources as adopt_sources,
    changed_clips as changed_clips,
    check_sources as check_sources,
    compare as compare,
    num_suspects as num_suspects,
    read_source as read_source,
    recorded_sources as recorded_sources,
    source_of as source_of,
)
from .store_info import (
    StoreInfo as StoreInfo,
    info_or_damage as info_or_damage,
    is_store as is_store,
    read_store_info as read_store_info,
    users_of as users_of,
)
from .views import (
    HiddenStateView as HiddenStateView,
    Nearest as Nearest,
    TokenLayout as TokenLayout,
    ViewSelection as ViewSelection,
    nearest as nearest,
)
