"""Work on a whole store: compaction, verification, repair."""
