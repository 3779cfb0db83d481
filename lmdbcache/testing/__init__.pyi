from .dataset_contract import DatasetContract as DatasetContract
from .embedder_contract import EmbedderContract as EmbedderContract, ModelContract as ModelContract
