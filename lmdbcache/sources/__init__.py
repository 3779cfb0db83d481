"""Which file each embedding was computed from, and whether that file is still the same."""
