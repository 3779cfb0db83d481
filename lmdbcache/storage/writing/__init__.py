"""What a writer is made of."""
