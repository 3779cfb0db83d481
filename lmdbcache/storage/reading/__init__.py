"""What a reader is made of."""
