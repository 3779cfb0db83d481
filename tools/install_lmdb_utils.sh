#!/bin/sh
# One test reads our files with mdb_stat and mdb_dump. Install them where that needs no password;
# elsewhere the test that wants them is skipped with a message.
command -v mdb_stat > /dev/null && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
  { apt-get install -y lmdb-utils || { apt-get update && apt-get install -y lmdb-utils; }; } > /dev/null 2>&1
fi
command -v mdb_stat > /dev/null || echo "mdb_stat isn't here (package lmdb-utils): one test is skipped"
