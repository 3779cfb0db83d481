"""Which file each embedding was computed from, and whether it is still the same."""
