"""Tests that a class of your own has to pass to work with lmdbcache; run by pytest."""
