"""What identifies a cache: `CacheConfig` and its fingerprint."""

from __future__ import annotations

import hashlib
import json
import math
import numbers
import operator
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Final

from lmdbcache.errors import ConfigError

__all__ = [
    "DEFAULT_FRONT_END",
    "DEFAULT_MODEL_NAME",
    "COMPUTE_DTYPES",
    "DTYPES",
    "UNSTATED_FRONT_END",
    "WINDOW_FIELDS",
    "CacheConfig",
    "ModelName",
    "canonical_value",
    "is_published_ast",
]

DEFAULT_MODEL_NAME: Final = "MIT/ast-finetuned-audioset-10-10-0.4593"

# How a clip becomes the model's input: decoder, resampler and quality, mix to mono, padding rule,
# features. Whatever changes a feature's value changes this name.
DEFAULT_FRONT_END: Final = "soundfile+soxr-hq+mono-mean+zero-pad+ast-fbank/1"

# In the config of a model whose front end isn't stated.
UNSTATED_FRONT_END: Final = "unstated"

WINDOW_FIELDS: Final = ("window", "hop", "last_window")

COMPUTE_DTYPES: Final = ("float32", "float16", "bfloat16")
DTYPES: Final = (*COMPUTE_DTYPES, "int8")

_DEFAULT_DURATION: Final = 5.0
_LAST_WINDOWS: Final = ("pad", "drop", "align")
_MIN_HOP: Final = 0.001
_MAX_WINDOW_RATE: Final = 1_000_000  # the starts of windows are kept in microseconds
_MODEL_ALIASES: Final = {
    "ast": DEFAULT_MODEL_NAME,
    "ast-finetuned": DEFAULT_MODEL_NAME,
    DEFAULT_MODEL_NAME.lower(): DEFAULT_MODEL_NAME,
}
_PUBLISHED_AST: Final = "mit/ast-finetuned-"
_FINGERPRINT_DOMAIN: Final = b"lmdbcache config 1\n"
_NOT_IN_SLUG: Final = re.compile(r"[^A-Za-z0-9.]+")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+/@-]{0,127}")
_OUTPUT_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+/@:-]{0,127}")


class ModelName(str):
    """The name of a model, with the front end of its kind.

    A config that is given such a name and no front end takes that one.
    """

    front_end: str

    def __new__(cls, name: str, front_end: str) -> ModelName:
        """Make a name that equals the plain string."""
        self = super().__new__(cls, name)
        self.front_end = front_end
        return self

    def __getnewargs__(self) -> tuple[str, str]:  # type: ignore[override]
        """Pickle and copy with the front end."""
        return str(self), self.front_end


def is_published_ast(model_name: str) -> bool:
    """Whether this is the Hub name of one of MIT's Audio Spectrogram Transformers."""
    return model_name.lower().startswith(_PUBLISHED_AST)


@dataclass(frozen=True, init=False)
class CacheConfig:
    """The identity of one store: same config, same embeddings.

    Values are brought to one form on construction (`5` → `5.0`, `"ast-finetuned"` → the full Hub
    name, `torch.float16` → `"float16"`), so that equal meanings compare equal and have one
    fingerprint on every machine, Python and process. Immutable, hashable, picklable.

    Args:
        sample_rate: Sample rate of the waveform given to the front end, in Hz.
        duration: Length that each clip is cut or zero-padded to, in seconds; None takes `window`,
            or 5.0 without one.
        model_name: Hub name or a name of your own. `"ast"` and `"ast-finetuned"` mean
            `MIT/ast-finetuned-audioset-10-10-0.4593`. For a local folder use
            `lmdbcache.embedders.model_identity(folder)`.
        output: What is stored of the model's output: `"pooler_output"`, `"last_hidden_state"`,
            `"mean"` (over time), `"valid_mean"` (over the clip's own frames), a layer
            (`"layer:6"`, `"layer:6/mean"`), all of them (`"layers/mean"`), or a name of your own.
        dtype: Stored dtype: `"float32"`, `"float16"`, `"bfloat16"`, or `"int8"`: a scale for each
            row, read back as float32.
        namespace: Name of the dataset, so that equal sample ids of two datasets don't meet in one
            store.
        front_end: Name of the decoding and feature rules. None: AST's for MIT's AST models and for
            the `model_identity` of an AST folder, else `"unstated"`, under which `extract` stores
            nothing. `config_for(model)` states the front end of any model.
        compute_dtype: dtype the model computes in.
        window: Embed each recording in windows of this length, in seconds, instead of its first
            `duration` seconds. It is the duration of what the model gets.
        hop: From the start of one window to the start of the next, in seconds, at least 0.001;
            None takes `window`. It is rounded to whole samples.
        last_window: What happens at the end of a recording, where no whole window fits: `"pad"`
            zero-pads the first window that reaches the end, `"drop"` leaves the rest out,
            `"align"` adds a window that ends where the recording ends. A recording shorter than
            one window is padded, or with `"drop"` fails.
        dataset: Same as `namespace`, under the name that it has on disk.

    Raises:
        ConfigError: A value can't identify a cache; the message names the field.
    """

    sample_rate: int
    duration: float
    model_name: str
    output: str
    dtype: str
    namespace: str
    front_end: str
    compute_dtype: str
    window: float | None
    hop: float | None
    last_window: str

    def __init__(
        self,
        sample_rate: int = 16000,
        duration: float | None = None,
        model_name: str = DEFAULT_MODEL_NAME,
        output: str = "pooler_output",
        dtype: str = "float32",
        namespace: str = "",
        front_end: str | None = None,
        compute_dtype: str = "float32",
        *,
        window: float | None = None,
        hop: float | None = None,
        last_window: str = "pad",
        dataset: str | None = None,
    ) -> None:
        if duration is None:
            duration = _DEFAULT_DURATION if window is None else window
        values = {
            "sample_rate": sample_rate,
            "duration": duration,
            "model_name": model_name,
            "output": output,
            "dtype": dtype,
            "namespace": namespace if dataset is None else dataset,
            "front_end": _default_front_end(model_name) if front_end is None else front_end,
            "compute_dtype": compute_dtype,
            "window": window,
            "hop": window if hop is None else hop,
            "last_window": last_window,
        }
        for name, canonical in _CANONICAL_FORMS.items():
            object.__setattr__(self, name, canonical(name, values[name]))
        if self.sample_rate * self.duration < 1:
            raise ConfigError(
                f"duration: {self.duration} s at {self.sample_rate} Hz is less than one sample"
            )
        self._check_windows()

    def _check_windows(self) -> None:
        if self.window is None:
            name = "hop" if self.hop is not None else "last_window"
            if self.hop is not None or self.last_window != _LAST_WINDOWS[0]:
                raise ConfigError(f"{name}: {getattr(self, name)!r} needs a `window`")
            return
        if self.duration != self.window:
            raise ConfigError(
                f"duration: {self.duration} s, where the window is {self.window} s. With a "
                "`window`, leave `duration` out"
            )
        if (self.hop or 0.0) < _MIN_HOP or not self.hop_samples:
            raise ConfigError(f"hop: {self.hop} s; it must be at least {_MIN_HOP} s and one sample")
        if self.sample_rate > _MAX_WINDOW_RATE:
            raise ConfigError(
                f"window: {self.sample_rate} Hz; with windows at most {_MAX_WINDOW_RATE} Hz"
            )

    @property
    def dataset(self) -> str:
        """Same as `namespace`, under the name that it has on disk."""
        return self.namespace

    @property
    def num_samples(self) -> int:
        """Length of the waveform given to the front end, in samples."""
        return round(self.sample_rate * self.duration)

    @property
    def hop_samples(self) -> int:
        """From the start of one window to the start of the next, in samples; 0 without windows."""
        return round(self.sample_rate * (self.hop or 0.0))

    @property
    def fingerprint(self) -> str:
        """16 hex digits over the canonical form of every field."""
        encoded = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(
            _FINGERPRINT_DOMAIN + encoded.encode("ascii"), digest_size=8
        ).hexdigest()

    @property
    def model_alias(self) -> str:
        """`"ast"` for the model of that alias, else `model_name`."""
        return "ast" if self.model_name == DEFAULT_MODEL_NAME else self.model_name

    @property
    def title(self) -> str:
        """Namespace, model, output, and a length or dtype that isn't the default."""
        length = self.windows
        if self.window is None and self.duration != _DEFAULT_DURATION:
            length = f"{self.duration:g} s"
        dtype = "" if self.dtype == "float32" else self.dtype
        parts = (self.namespace, self.model_alias, self.output, length, dtype)
        return " ".join(filter(None, parts))

    @property
    def windows(self) -> str:
        """How recordings are cut, in words: `5 s every 2.5 s align`; empty without windows."""
        if self.window is None:
            return ""
        last = "" if self.last_window == _LAST_WINDOWS[0] else f" {self.last_window}"
        return f"{self.window:g} s every {self.hop:g} s{last}"

    @property
    def slug(self) -> str:
        """A readable part for the store's folder name."""
        parts = [self.namespace, self.model_name.rsplit("/", 1)[-1], self.output]
        parts += [f"{self.sample_rate}hz", f"{self.duration:g}s"]
        parts += [f"every-{self.hop:g}s"] if self.hop is not None else []
        parts.append(self.dtype)
        text = "-".join(part for part in parts if part)
        return _NOT_IN_SLUG.sub("-", text).strip("-.").lower()[:100]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as on disk, ready for JSON or msgpack: `namespace` is `dataset`.

        Without a window, the fields of windows aren't among them.
        """
        return {
            "dataset" if name == "namespace" else name: getattr(self, name)
            for name in _CANONICAL_FORMS
            if self.window is not None or name not in WINDOW_FIELDS
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CacheConfig:
        """Build a config from a dict, as read from JSON.

        Raises:
            ConfigError: A key isn't a field, or a value is refused.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known - {"dataset"}):
            raise ConfigError(
                f"{', '.join(unknown)}: not a field of CacheConfig; fields are "
                f"{', '.join(sorted(known))}"
            )
        return cls(**values)

    def replace(self, **changes: Any) -> CacheConfig:
        """Return a copy with some fields changed; of windows, `duration` and `window` are one."""
        if "dataset" in changes:
            changes["namespace"] = changes.pop("dataset")
        if self.window is not None and "duration" in changes:
            changes.setdefault("window", changes["duration"])
        changes.setdefault("duration", changes.get("window") or self.duration)
        if changes.get("window", self.window) is None:
            changes = {"hop": None, "last_window": _LAST_WINDOWS[0], **changes}
        return replace(self, **changes)

    def differences(self, other: CacheConfig) -> dict[str, tuple[Any, Any]]:
        """Return the fields that differ, each with (own value, the other's value)."""
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in _CANONICAL_FORMS}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def canonical_value(name: str, value: Any) -> Any:
    """Return a field's value in the one form that configs are compared in.

    Raises:
        ConfigError: It is refused.
    """
    return _CANONICAL_FORMS[name](name, value)


def _default_front_end(model_name: Any) -> str:
    if isinstance(model_name, ModelName):
        return model_name.front_end
    is_ast = is_published_ast(_model_name("model_name", model_name))
    return DEFAULT_FRONT_END if is_ast else UNSTATED_FRONT_END


def _sample_rate(name: str, value: Any) -> int:
    value = _plain_number(value)
    try:
        if isinstance(value, bool):
            raise TypeError
        rate = int(value) if isinstance(value, float) and value.is_integer() else None
        rate = operator.index(value) if rate is None else rate
    except TypeError:
        raise ConfigError(f"{name}: {value!r} isn't a whole number of Hz, such as 16000") from None
    if not 0 < rate < 1 << 32:
        raise ConfigError(f"{name}: {rate} Hz; it must be above 0 and below 2^32, such as 16000")
    return rate


def _plain_number(value: Any) -> Any:
    """Return the Python number of a numpy scalar, or of an array or tensor without dimensions."""
    return value.item() if getattr(value, "shape", None) == () else value


def _duration(name: str, value: Any) -> float:
    value = _plain_number(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ConfigError(f"{name}: {value!r} isn't a number of seconds, such as 5.0")
    try:
        seconds = float(value)
    except OverflowError:
        seconds = math.inf
    if not math.isfinite(seconds) or seconds <= 0:
        raise ConfigError(f"{name}: {seconds} s; it must be finite and above 0, such as 5.0")
    return seconds


def _seconds_or_none(name: str, value: Any) -> float | None:
    return None if value is None else _duration(name, value)


def _last_window(name: str, value: Any) -> str:
    if value not in _LAST_WINDOWS:
        raise ConfigError(f"{name}: {value!r}; known are {', '.join(_LAST_WINDOWS)}")
    return str(value)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{name}: {value!r} isn't text")
    text = unicodedata.normalize("NFC", value).strip()
    # Such characters aren't printable: one look at the whole is enough for most text.
    if not text.isprintable() and any(
        unicodedata.category(character) in ("Cc", "Cs") for character in text
    ):
        raise ConfigError(f"{name}: {value!r} holds control characters or lone surrogates")
    return text


def _model_name(name: str, value: Any) -> str:
    text = _text(name, value)
    if not text:
        raise ConfigError(f"{name}: empty; give a Hub name such as {DEFAULT_MODEL_NAME!r}")
    return _MODEL_ALIASES.get(text.lower(), text)


def _identifier(name: str, value: Any) -> str:
    text = _text(name, value)
    if not (_OUTPUT_NAME if name == "output" else _NAME).fullmatch(text):
        marks = "_.+/@:-" if name == "output" else "_.+/@-"
        raise ConfigError(
            f"{name}: {value!r}; use 1 to 128 letters, digits or any of '{marks}', "
            "starting with a letter or digit"
        )
    return text


def _namespace(name: str, value: Any) -> str:
    return _identifier(name, value).lower() if value != "" else ""


def _dtype(name: str, value: Any) -> str:
    # torch.float16, numpy.dtype("float16") and "float16" all end in the same word.
    text = (getattr(value, "__name__", None) or str(value)).removeprefix("torch.").strip().lower()
    known = COMPUTE_DTYPES if name == "compute_dtype" else DTYPES
    if text not in known:
        raise ConfigError(f"{name}: {value!r}; known are {', '.join(known)}")
    return text


_CANONICAL_FORMS: Final[dict[str, Callable[[str, Any], Any]]] = {
    "sample_rate": _sample_rate,
    "duration": _duration,
    "model_name": _model_name,
    "output": _identifier,
    "dtype": _dtype,
    "namespace": _namespace,
    "front_end": _identifier,
    "compute_dtype": _dtype,
    "window": _seconds_or_none,
    "hop": _seconds_or_none,
    "last_window": _last_window,
}
