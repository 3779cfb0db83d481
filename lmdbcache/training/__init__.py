"""In a training loop: torch tensors, a Dataset, a loader, a store in RAM, a cached encoder."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
