#!/usr/bin/env bash
# Builds Horovod against the torch of the given Python, once per torch and Python version, and installs it.
#
#   tools/build_horovod.sh PYTHON [CACHE_DIR]
#
# Horovod 0.28.1 asks for C++14 and torch's headers need C++20, so the compiler is wrapped: the last -std flag wins.
# With CUDA and NCCL on the machine: HOROVOD_GPU_OPERATIONS=NCCL make install (not tried by the authors).
set -euo pipefail

python=$1
cache_root=${2:-${XDG_CACHE_HOME:-$HOME/.cache}/crossmedia}
version=0.28.1

installed=$("$python" -m pip list --format=freeze 2>/dev/null | sed -n 's/^horovod==//p')
tag=$("$python" -c 'import platform, sys, torch
print(f"torch{torch.__version__}-cp{sys.version_info[0]}{sys.version_info[1]}-{platform.machine()}")')
wheels=$cache_root/horovod-$version-$tag${HOROVOD_GPU_OPERATIONS:+-$HOROVOD_GPU_OPERATIONS}

if [ "$installed" = "$version" ] && "$python" -c 'import horovod.torch' 2>/dev/null; then
  echo "horovod $version is installed"
  exit 0
fi

if ! ls "$wheels"/horovod-*.whl >/dev/null 2>&1; then
  "$python" - <<'PY'
import pathlib, sys, sysconfig
header = pathlib.Path(sysconfig.get_paths()["include"], "Python.h")
if not header.exists():
    sys.exit(f"{header} is missing. Install the headers of this Python: apt-get install python3-dev (or python3.11-dev)")
PY
  compiler=${CXX:-c++}
  command -v "$compiler" >/dev/null || { echo "No C++ compiler. Install one: apt-get install g++" >&2; exit 1; }
  echo "building horovod $version for $tag; about four minutes, once per machine (cache: $wheels)"
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  printf '#!/bin/sh\nexec %s "$@" -std=c++20\n' "$compiler" >"$work/c++20"
  chmod +x "$work/c++20"
  "$python" -m pip install --quiet "cmake<4" "setuptools<81" wheel packaging
  # Horovod's setup.py looks for cmake on the PATH.
  bin=$(dirname "$("$python" -c 'import sys; print(sys.executable)')")
  if ! PATH="$bin:$PATH" CXX="$work/c++20" HOROVOD_WITH_PYTORCH=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1 \
    HOROVOD_WITH_GLOO=1 HOROVOD_WITHOUT_MPI=1 \
    "$python" -m pip wheel --no-build-isolation --no-deps --wheel-dir "$work/wheels" "horovod==$version" >"$work/log" 2>&1; then
    tail -n 60 "$work/log" >&2
    echo "horovod did not build" >&2
    exit 1
  fi
  # Published by one rename, so that a build that was cut off leaves nothing that looks finished.
  mkdir -p "$cache_root"
  mv -T "$work/wheels" "$wheels" 2>/dev/null || [ -d "$wheels" ]
fi

"$python" -m pip install --quiet "$wheels"/horovod-*.whl
"$python" -c 'import horovod.torch' || { echo "horovod was built but does not import" >&2; exit 1; }
echo "horovod $version is installed"
