from .audit import AuditReport as AuditReport, audit as audit
from .capacity import CapacityPlan as CapacityPlan, Choice as Choice, plan_capacity as plan_capacity
from .dataset_run import extract_or_load_ast_embeddings as extract_or_load_ast_embeddings
from .finishing import finish_with_other_ranks as finish_with_other_ranks
from .launchers import (
    is_on_several_machines as is_on_several_machines,
    launched_by as launched_by,
    share_from_environment as share_from_environment,
)
from .on_ray import extract_on_ray as extract_on_ray
from .pipeline import (
    extract as extract,
    plan_extraction as plan_extraction,
    stored_of_share as stored_of_share,
)
from .rank_share import RankShare as RankShare
from .samples import to_clips as to_clips
from .space import ExtractionPlan as ExtractionPlan
from .summary import ExtractionSummary as ExtractionSummary
