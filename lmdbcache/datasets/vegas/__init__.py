"""VEGAS, as the code that it comes from expects it."""
