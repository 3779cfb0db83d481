"""From a waveform to an embedding: front ends, families of models, torch modules."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
