#!/usr/bin/env bash
# Makes the virtual environment and installs all that a user needs, Horovod included unless HOROVOD=no. What tests, pages and
# peers in benchmarks need beyond that, tools/install_for.sh adds.
#
#   tools/install.sh VENV [packages|horovod]
#
# With a second word it does the one part alone: all packages but Horovod, or Horovod, which is built beside other work then.
#
# PYTHON names the Python to make it with, by default the first one found of 3.11 to 3.13; an environment of another
# Python than PYTHON is made again. TORCH names releases in place of the newest. HOROVOD_GPU_OPERATIONS: see
# build_horovod.sh. HOROVOD=no leaves Horovod out, and needs no compiler; an environment without it stays so until
# HOROVOD=yes.
set -euo pipefail

venv=$1
part=${2:-both}
cd "$(dirname "$0")/.."
# shellcheck source=tools/telling.sh
. tools/telling.sh

fail() {
  echo "$*" >&2
  exit 1
}

version_of() { # as 3.11; nothing where it is no Python that runs
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true
}

is_supported() {
  case $1 in 3.11 | 3.12 | 3.13) ;; *) return 1 ;; esac
}

has_venv() {
  "$1" -c 'import ensurepip, venv' 2>/dev/null
}

find_python() {
  local candidate
  for candidate in python3 python python3.13 python3.12 python3.11; do
    is_supported "$(version_of "$candidate")" && has_venv "$candidate" && echo "$candidate" && return
  done
  fail "No Python 3.11, 3.12 or 3.13 with venv was found. Install one (Debian and Ubuntu: apt-get install python3-venv python3-dev)," \
    "or name it: make install PYTHON=/path/to/python3.12"
}

asked=
if [ -n "${PYTHON:-}" ]; then
  asked=$(version_of "$PYTHON")
  [ -n "$asked" ] || fail "PYTHON=$PYTHON does not run; name a Python 3.11, 3.12 or 3.13"
  is_supported "$asked" || fail "PYTHON=$PYTHON is Python $asked; name a Python 3.11, 3.12 or 3.13"
fi

case ${HOROVOD:-} in '' | yes | no) ;; *) fail "HOROVOD=$HOROVOD: it should be no, to leave Horovod out, or yes" ;; esac
if [ "${HOROVOD:-}" = no ] && [ -n "${HOROVOD_GPU_OPERATIONS:-}" ]; then
  fail "HOROVOD=no leaves out what HOROVOD_GPU_OPERATIONS=$HOROVOD_GPU_OPERATIONS would build; say one of them"
fi

present=
if [ -x "$venv/bin/python" ] && "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
  present=$(version_of "$venv/bin/python")
fi
if [ "$part" != horovod ]; then
  if ! is_supported "$present" || [ "${asked:-$present}" != "$present" ]; then
    if [ -n "$(ls -A "$venv" 2>/dev/null)" ] && [ ! -f "$venv/pyvenv.cfg" ]; then
      fail "$venv is not a virtual environment; name another: make install VENV=.venv"
    fi
    python=${PYTHON:-$(find_python)}
    has_venv "$python" || fail "$python cannot make a virtual environment. On Debian and Ubuntu: apt-get install python3-venv (or python$asked-venv)"
    [ -z "$present" ] || echo "$venv is of Python $present; it is made again with Python $(version_of "$python")"
    rm -rf "$venv"
    "$python" -m venv "$venv"
  fi
  rm -f "$venv/.packages" "$venv/.installed"
  pip=(-m pip install --quiet --disable-pip-version-check)
  # shellcheck disable=SC2086 # TORCH is words, e.g. "torch==2.13.0 torchvision==0.28.0"
  telling "installing torch, Dask, pyarrow and what they need" "$venv/bin/python" "${pip[@]}" -e ".[explorer,notebook]" ${TORCH:-}
  touch "$venv/.packages"
fi
[ "$part" != packages ] || exit 0
without=$venv/.without-horovod
if [ "${HOROVOD:-}" = no ] || { [ -z "${HOROVOD:-}${HOROVOD_GPU_OPERATIONS:-}" ] && [ -f "$without" ]; }; then
  touch "$without"
  rm -f "$venv/.horovod"
  "$venv/bin/python" -m pip uninstall --quiet --yes horovod 2>/dev/null || true
  echo "Horovod is left out: torchrun starts several ranks (docs/RANKS.md); HOROVOD=yes make install builds it"
else
  rm -f "$without"
  tools/build_horovod.sh "$venv/bin/python"
fi
# What was asked for; the Makefile compares it.
echo "PYTHON=${PYTHON:-} HOROVOD_GPU_OPERATIONS=${HOROVOD_GPU_OPERATIONS:-}${HOROVOD:+ HOROVOD=$HOROVOD}" >"$venv/.installed"
