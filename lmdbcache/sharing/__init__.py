"""Embeddings shared between machines: push, pull and verify over any file system fsspec knows."""
