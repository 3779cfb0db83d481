"""What lies in a store: names and keys, values, the metadata record."""
