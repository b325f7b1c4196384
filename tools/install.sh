#!/usr/bin/env bash
# Makes the virtual environment and installs everything that the project needs, Horovod included.
#
#   tools/install.sh VENV
set -euo pipefail

venv=$1
cd "$(dirname "$0")/.."

find_python() {
  for candidate in "${PYTHON:-}" python3.11 python3 python; do
    [ -n "$candidate" ] && command -v "$candidate" >/dev/null || continue
    "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || continue
    echo "$candidate"
    return
  done
  echo "Python 3.11 was not found. Install it, or name it: make install PYTHON=/path/to/python3.11" >&2
  return 1
}

if [ ! -x "$venv/bin/python" ] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
  python=$(find_python)
  rm -rf "$venv"
  "$python" -m venv "$venv" || {
    echo "No virtual environment could be made. On Debian and Ubuntu: apt-get install python3-venv" >&2
    exit 1
  }
fi
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e ".[dev,bench]"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes -r tools/requirements-s3-server.txt
if [ ! -x "$venv/moto/bin/python" ]; then
  "$venv/bin/python" -m venv "$venv/moto"
fi
"$venv/moto/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes -r tools/requirements-moto-server.txt
# FuxiCTR, a peer in benchmarks.train: beside our packages, not among them, as it asks for many of its own.
if [ ! -x "$venv/fuxictr/bin/python" ]; then
  "$venv/bin/python" -m venv "$venv/fuxictr"
fi
packages='import sysconfig; print(sysconfig.get_path("purelib"))'
echo "import site; site.addsitedir('$("$venv/bin/python" -c "$packages")')" \
  >"$("$venv/fuxictr/bin/python" -c "$packages")/ours.pth"
"$venv/fuxictr/bin/python" -m pip install --quiet --disable-pip-version-check fuxictr==2.3.10
tools/build_horovod.sh "$venv/bin/python"
touch "$venv/.installed"
