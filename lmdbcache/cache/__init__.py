"""All stores under one root: what they hold, what they miss, what was read, what may go."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
