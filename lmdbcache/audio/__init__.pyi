from .decoding import (
    DecodeReport as DecodeReport,
    decode as decode,
    fit as fit,
    is_digital_silence as is_digital_silence,
    load_clip as load_clip,
    load_waveform as load_waveform,
)
from .formats import (
    by_soundfile as by_soundfile,
    decoder_of as decoder_of,
    is_audio as is_audio,
    is_readable as is_readable,
    with_decoder as with_decoder,
)
from .source import (
    AudioSource as AudioSource,
    Clips as Clips,
    as_source as as_source,
    shown as shown,
)
