from .cached_encoder import CachedEncoder as CachedEncoder
from .dataset import (
    EmbeddingDataset as EmbeddingDataset,
    collate_embeddings as collate_embeddings,
)
from .loader import make_dataloader as make_dataloader
from .preloading import preload as preload
from .targets import Targets as Targets, target_tensor as target_tensor
from .tensors import TensorMapping as TensorMapping, as_tensor as as_tensor
from .torch_files import (
    HIDDEN as HIDDEN,
    MEAN as MEAN,
    POOLED as POOLED,
    output_of_dimensions as output_of_dimensions,
    plain_tensor as plain_tensor,
    read_tensor_dict as read_tensor_dict,
    read_text_embeddings as read_text_embeddings,
    read_torch_file as read_torch_file,
    unwrapped as unwrapped,
)
from .weighted_sum import WeightedSum as WeightedSum
from .write_back import StoredEmbeddings as StoredEmbeddings, find_stored as find_stored
