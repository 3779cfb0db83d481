"""`python -m lmdbcache`: the command line."""

from lmdbcache.cli.main import main

main()
