from .base import (
    AudioModel as AudioModel,
    Embedder as Embedder,
    FrontEnd as FrontEnd,
    clip_features as clip_features,
    compute_features as compute_features,
)
from .checkpoint_files import weights_digest as weights_digest
from .checkpoints import (
    find_checkpoint as find_checkpoint,
    folder_provenance as folder_provenance,
    identify as identify,
    model_identity as model_identity,
    moved_weights as moved_weights,
)
from .devices import device_of_rank as device_of_rank
from .families.audio_spectrogram_transformer import (
    ASTEmbedder as ASTEmbedder,
    ASTFrontEnd as ASTFrontEnd,
)
from .first_batch import (
    FirstBatches as FirstBatches,
    num_repeats as num_repeats,
    tolerance_of as tolerance_of,
)
from .module_embedder import (
    ModuleEmbedder as ModuleEmbedder,
    RunningModule as RunningModule,
    no_real_numbers as no_real_numbers,
)
from .module_weights import module_digest as module_digest
from .onnx_embedder import ONNXEmbedder as ONNXEmbedder
from .registry import (
    PretrainedModel as PretrainedModel,
    config_for as config_for,
    described_model as described_model,
    find_model as find_model,
    known_model as known_model,
    ready_model as ready_model,
)
from .texts import embed_texts as embed_texts
