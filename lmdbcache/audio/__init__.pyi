from .decoding import (
    DecodedClip as DecodedClip,
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
from .remote import (
    BytesSource as BytesSource,
    FilePart as FilePart,
    list_url as list_url,
    opened_url as opened_url,
)
from .source import (
    AudioSource as AudioSource,
    Clips as Clips,
    as_source as as_source,
    open_source as open_source,
    shown as shown,
)
from .waveform import fit as fit, is_digital_silence as is_digital_silence
from .windows import (
    AudioWindow as AudioWindow,
    announced_samples as announced_samples,
    load_windows as load_windows,
    num_windows as num_windows,
)
