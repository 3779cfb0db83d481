"""Is everything here as lmdbcache needs it? Looks, changes nothing, imports no torch itself."""
