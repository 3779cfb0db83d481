"""From files to samples: an adapter for each layout, splits and nodes; cached torch datasets."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
