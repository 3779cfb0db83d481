"""Test suites that adapters and models from elsewhere can run on themselves; they need pytest."""
