#!/usr/bin/env bash
# Adds what targets of the Makefile need beyond the installation, and notes it in VENV/.for-PURPOSE.
#
#   tools/install_for.sh VENV tests|docs|peers
#
# tests: the tools of tests, checks and benchmarks, an S3 server, and what checks deploy/. docs: the generator of the site,
# the newest version that has its pages and scripts inside: later ones ask for a package that not every index has. peers:
# FuxiCTR, with which benchmarks compare; it asks for many packages of its own. The last two get environments beside ours,
# VENV/docs and VENV/fuxictr.
set -euo pipefail

venv=$1
purpose=$2
cd "$(dirname "$0")/.."
# shellcheck source=tools/telling.sh
. tools/telling.sh
pip=(-m pip install --quiet --disable-pip-version-check)

environment() { # make it where it is not
  [ -x "$1/bin/python" ] || "$venv/bin/python" -m venv "$1"
}

case $purpose in
  tests)
    telling "installing the tools of tests" "$venv/bin/python" "${pip[@]}" -e ".[dev,bench,explorer]"
    "$venv/bin/python" "${pip[@]}" --require-hashes -r tools/requirements-s3-server.txt
    "$venv/bin/python" "${pip[@]}" --require-hashes --no-deps -r tools/requirements-deploy.txt
    ;;
  docs)
    environment "$venv/docs"
    telling "installing the generator of pages" "$venv/docs/bin/python" "${pip[@]}" zensical==0.0.73
    ;;
  peers)
    environment "$venv/fuxictr"
    packages='import sysconfig; print(sysconfig.get_path("purelib"))'
    echo "import site; site.addsitedir('$("$venv/bin/python" -c "$packages")')" \
      >"$("$venv/fuxictr/bin/python" -c "$packages")/ours.pth"
    fuxictr() { "$venv/fuxictr/bin/python" "${pip[@]}" fuxictr==2.3.10 >"$venv/fuxictr.log" 2>&1; }
    if ! telling "installing FuxiCTR" fuxictr; then
      rm -rf "$venv/fuxictr"
      echo "FuxiCTR could not be installed ($venv/fuxictr.log says why); the benchmarks leave it out"
    fi
    ;;
  *)
    echo "$purpose: it should be tests, docs or peers" >&2
    exit 1
    ;;
esac
touch "$venv/.for-$purpose"
