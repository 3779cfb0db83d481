"""Push, pull and verify over any file system that fsspec knows."""
