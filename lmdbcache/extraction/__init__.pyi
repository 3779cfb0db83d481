from .auditing import (
    AuditReport as AuditReport,
    audit as audit,
    recorded_model as recorded_model,
)
from .clips import to_clips as to_clips
from .estimate import (
    Choice as Choice,
    ExtractionPlan as ExtractionPlan,
    plan_extraction as plan_extraction,
)
from .on_ray import extract_on_ray as extract_on_ray
from .pipeline import extract as extract, stored_of_share as stored_of_share
from .queries import embed_clip as embed_clip, embed_text as embed_text
from .ranks import (
    RankShare as RankShare,
    finish_with_other_ranks as finish_with_other_ranks,
    is_on_several_machines as is_on_several_machines,
    launched_by as launched_by,
    share_from_environment as share_from_environment,
)
from .streaming import extract_stream as extract_stream
from .summary import ExtractionSummary as ExtractionSummary
from .vegas import extract_or_load_ast_embeddings as extract_or_load_ast_embeddings
