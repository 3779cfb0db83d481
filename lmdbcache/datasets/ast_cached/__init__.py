"""Torch datasets that hold cached embeddings, with the calls that existing scripts make."""
