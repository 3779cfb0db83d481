from .checks.checking import IntegrityReport as IntegrityReport
from .checks.first_opening import is_known as is_known
from .checks.value_checks import Progress as Progress
from .engine_errors import translated_errors as translated_errors
from .filesystems import (
    NETWORK_VARIABLE as NETWORK_VARIABLE,
    Mount as Mount,
    check_local_for_writing as check_local_for_writing,
    mount_of as mount_of,
    network_mount as network_mount,
)
from .gather import (
    LARGE_VALUE_BYTES as LARGE_VALUE_BYTES,
    MappedFile as MappedFile,
    batch_buffers as batch_buffers,
)
from .generations import (
    RESERVE_BYTES as RESERVE_BYTES,
    check_room as check_room,
    current_generation as current_generation,
    write_lock as write_lock,
    writers_of as writers_of,
)
from .last_use import last_used as last_used, last_written as last_written
from .layout import (
    EXTRAS_NAME as EXTRAS_NAME,
    canonical_class as canonical_class,
    canonical_sample_id as canonical_sample_id,
    class_of as class_of,
    join_sample_id as join_sample_id,
    sample_id_of_key as sample_id_of_key,
    sample_key as sample_key,
    sample_keys as sample_keys,
    split_sample_id as split_sample_id,
)
from .maintenance.compaction import (
    CompactionResult as CompactionResult,
    compact as compact,
    plan_compaction as plan_compaction,
)
from .maintenance.damaged_store import (
    DamagedStore as DamagedStore,
    data_file as data_file,
    unnamed_generations as unnamed_generations,
)
from .maintenance.leftovers import (
    Leftover as Leftover,
    find_leftovers as find_leftovers,
    remove_leftovers as remove_leftovers,
    removing as removing,
)
from .maintenance.repair import (
    RepairReport as RepairReport,
    repair as repair,
)
from .maintenance.verification import verify as verify
from .metadata import (
    StoreMetadata as StoreMetadata,
    checksum as checksum,
    checksums as checksums,
    portable as portable,
)
from .opening import check_data_file as check_data_file
from .reader import (
    EmbeddingReader as EmbeddingReader,
    Positions as Positions,
    Selection as Selection,
)
from .reader_slots import (
    others as others,
    slot_use as slot_use,
)
from .report import Report as Report
from .row_parts import RowPart as RowPart
from .similarity import Nearest as Nearest, nearest as nearest
from .space import space_use as space_use
from .statistics import (
    EpochStatistics as EpochStatistics,
    ReadStatistics as ReadStatistics,
    counts_of as counts_of,
    reset_statistics as reset_statistics,
    statistics_of as statistics_of,
)
from .values import (
    NUMPY_DTYPES as NUMPY_DTYPES,
    as_read as as_read,
    as_stored as as_stored,
    check_shape as check_shape,
    decoded as decoded,
    encoded as encoded,
    from_stored as from_stored,
    has_masked_elements as has_masked_elements,
    is_what_is_stored as is_what_is_stored,
    stored_form as stored_form,
    value_bytes as value_bytes,
)
from .verified_reads import Verify as Verify, check_pages as check_pages
from .windows import (
    Windows as Windows,
    check_recording_id as check_recording_id,
    check_window_key as check_window_key,
    first_window as first_window,
    is_first_window as is_first_window,
    recording_of as recording_of,
    window_id as window_id,
    window_start as window_start,
)
from .writer import (
    EmbeddingWriter as EmbeddingWriter,
    OnDuplicate as OnDuplicate,
    check_on_duplicate as check_on_duplicate,
)
