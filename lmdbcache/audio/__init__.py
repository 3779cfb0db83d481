"""From an audio file to a waveform: decoders, what is refused, mixing, resampling, length."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
