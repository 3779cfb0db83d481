"""A linear probe that nodes train on embeddings they pull, or on one cache they share."""
