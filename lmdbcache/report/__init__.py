"""The HTML report: one file that shows what a cache holds, to read and to share."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
