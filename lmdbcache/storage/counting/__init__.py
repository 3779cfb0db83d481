"""How often samples were found, and which were not."""
