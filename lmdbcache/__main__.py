"""`python -m lmdbcache`: the command line."""

from lmdbcache.cli import main

main()
