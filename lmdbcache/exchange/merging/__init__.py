"""Embeddings of other stores into one store."""
