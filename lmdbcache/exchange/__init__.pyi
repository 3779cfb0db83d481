from .config_inference import missing_fields as missing_fields
from .exporting import ExportReport as ExportReport, export_embeddings as export_embeddings
from .formats import FORMATS as FORMATS, open_source as open_source
from .formats.base import Source as Source
from .formats.keys import KeyChoice as KeyChoice
from .importing import ImportReport as ImportReport, import_embeddings as import_embeddings
from .intake import (
    Conflict as Conflict,
    Intake as Intake,
    IntakeReport as IntakeReport,
    Refusal as Refusal,
    Rows as Rows,
)
from .merge import MergeReport as MergeReport, merge_stores as merge_stores
from .sharing.manifests import shared_fingerprints as shared_fingerprints
from .sharing.pulling import PullReport as PullReport, pull as pull
from .sharing.pushing import PushReport as PushReport, push as push
from .sharing.remote import Remote as Remote, is_url as is_url
from .sharing.verifying import RemoteReport as RemoteReport, verify_remote as verify_remote
from .staging_lock import at_rest as at_rest, held_store as held_store
