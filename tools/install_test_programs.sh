#!/bin/sh
# Programs that a few tests start: mdb_stat and mdb_dump read our files, a browser opens the report.
# Install them where that needs no password; elsewhere the tests that want them are skipped with a
# message.
install() { # package
  { apt-get install -y --no-install-recommends "$1" ||
    { apt-get update && apt-get install -y --no-install-recommends "$1"; }; } > /dev/null 2>&1
}
may_install() { [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; }
have_browser() {
  command -v chromium > /dev/null || command -v chromium-browser > /dev/null ||
    command -v google-chrome > /dev/null
}

if ! command -v mdb_stat > /dev/null; then
  may_install && install lmdb-utils
  command -v mdb_stat > /dev/null || echo "mdb_stat isn't here (package lmdb-utils): one test is skipped"
fi
if ! have_browser; then
  may_install && install chromium
  have_browser || echo "No browser is here (package chromium): the report's browser tests are skipped"
fi
exit 0
