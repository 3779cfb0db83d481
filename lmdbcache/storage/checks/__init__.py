"""Whether a generation is sound, before LMDB sees it."""
