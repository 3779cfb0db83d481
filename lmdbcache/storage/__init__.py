"""One LMDB environment: its layout on disk, its readers, writers, compaction and checks."""
