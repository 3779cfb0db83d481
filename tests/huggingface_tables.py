"""Small Hugging Face datasets with encoded audio, made without torchcodec."""

from __future__ import annotations

import io

import datasets
import soundfile
from synthetic_layouts import tone

CLASSES = ["Siren", "bell", "wind"]
STRUCT = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}


def encoded(name: str, number: int, form: str = "WAV") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(name, number, 0.2), 16000, format=form)
    return buffer.getvalue()


def table(rows, *, label=None, split=None, audio=True, **extra):
    """A Dataset of `(class or None, bytes or None, path or None)` rows.

    `label` is the label column's feature, by default a ClassLabel of CLASSES.
    """
    label = label or datasets.ClassLabel(names=CLASSES)
    columns = {
        "audio": [{"bytes": content, "path": path} for _, content, path in rows],
        "label": [_encoded_label(label, name) for name, _, _ in rows],
        **extra,
    }
    kinds = {name: datasets.Value("string") for name in extra}
    features = datasets.Features({"audio": STRUCT, "label": label, **kinds})
    made = datasets.Dataset.from_dict(columns, features=features, split=split)
    return made.cast_column("audio", datasets.Audio()) if audio else made


def _encoded_label(label, name):
    if isinstance(label, datasets.ClassLabel):
        return -1 if name is None else label.str2int(name)
    return name


def two_splits(per_class=2, *, paths=True):
    """Train and validation, clips as bytes in four formats."""
    forms = ("WAV", "FLAC", "OGG", "MP3")
    splits = {}
    for number, split in enumerate(("train", "validation")):
        rows = []
        for clip in range(per_class):
            for place, name in enumerate(CLASSES):
                form = forms[(clip + place) % 4]
                path = f"{split}_{name}_{clip}.{form.lower()}" if paths else None
                rows.append((name, encoded(name, 10 * number + clip, form), path))
        splits[split] = table(rows, split=split)
    return datasets.DatasetDict(splits)
