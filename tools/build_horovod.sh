#!/usr/bin/env bash
# Builds Horovod against the torch of the given Python, once per torch, Python and request, and installs it.
#
#   tools/build_horovod.sh PYTHON [CACHE_DIR]
#
# HOROVOD_GPU_OPERATIONS=NCCL builds with NCCL (not tried by the authors): it and the other variables of Horovod's
# installation guide (HOROVOD_NCCL_HOME, HOROVOD_NCCL_LINK, HOROVOD_CUDA_HOME) are passed to Horovod's own build. =CPU builds
# for the CPU, with collectives by Gloo. Without it an environment keeps what it was last asked for; a new one is built for the CPU.
set -euo pipefail

# shellcheck source=tools/telling.sh
. "$(dirname "$0")/telling.sh"
python=$1
cache_root=${2:-${XDG_CACHE_HOME:-$HOME/.cache}/crossmedia}
version=0.28.1

record=$("$python" -c 'import sys; print(sys.prefix)')/.horovod
operations=${HOROVOD_GPU_OPERATIONS:-}
if [ -z "$operations" ] && [ -f "$record" ]; then
  operations=$(sed 's/.*-//' "$record")
fi
case ${operations:=CPU} in
  CPU) unset "${!HOROVOD_GPU@}" ;; # Horovod's build takes no "CPU", and HOROVOD_GPU_ALLREDUCE would ask for GPUs too
  NCCL) export HOROVOD_GPU_OPERATIONS=NCCL ;;
  *) echo "HOROVOD_GPU_OPERATIONS=$operations: it should be NCCL, or CPU for collectives by Gloo" >&2; exit 1 ;;
esac
tag=$("$python" -c 'import platform, sys, torch
print(f"torch{torch.__version__}-cp{sys.version_info[0]}{sys.version_info[1]}-{platform.machine()}")')
build=horovod-$version-$tag-$operations
wheels=$cache_root/${build%-CPU}

build_wheel() {
  local work=$1 bin
  # Horovod's setup.py looks for cmake on the PATH.
  bin=$(dirname "$("$python" -c 'import sys; print(sys.executable)')")
  export PATH="$bin:$PATH" HOROVOD_WITH_PYTORCH=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1 \
    HOROVOD_WITH_GLOO=1 HOROVOD_WITHOUT_MPI=1 HOROVOD_WITHOUT_NVTX=1
  "$python" -m pip install --quiet "cmake<4" "setuptools<81" wheel packaging
  "$python" -m pip download --quiet --no-deps --no-binary horovod --no-build-isolation --dest "$work" "horovod==$version"
  tar -xzf "$work/horovod-$version.tar.gz" -C "$work"
  patch_sources "$work/horovod-$version"
  "$python" -m pip wheel --no-build-isolation --no-deps --wheel-dir "$work/wheels" "$work/horovod-$version"
}

build_logged() {
  (set -e; build_wheel "$work") >"$log" 2>&1
}

patch_sources() {
  # torch's headers need C++20, a CUDA toolkit of today C++17.
  sed -i 's/set(CMAKE_CXX_STANDARD 14)/set(CMAKE_CXX_STANDARD 20)/' "$1/CMakeLists.txt" "$1/horovod/torch/CMakeLists.txt"
  sed -i 's/set(CMAKE_CUDA_STANDARD 11)/set(CMAKE_CUDA_STANDARD 17)/' "$1/horovod/common/ops/cuda/CMakeLists.txt"
  # distutils left Python in 3.12.
  sed -i 's/from distutils.spawn import find_executable/from shutil import which as find_executable/' "$1/horovod/runner/js_run.py"
  sed -i "s/from distutils.sysconfig import .*)\"/import sysconfig; print(sysconfig.get_path('include'))\"/" "$1/horovod/torch/CMakeLists.txt"
  if [ "$operations" = CPU ]; then
    # With a CUDA build of torch it wants a whole toolkit wherever it finds an nvcc, also where GPUs were not asked for.
    sed -i '/^include(CheckLanguage)/,/^macro(ADD_CUDA)/{/^macro/!d}' "$1/CMakeLists.txt"
    sed -i 's/print(True if ((torch.version.cuda is not None).*)"/print(False)"/' "$1/cmake/Modules/FindPytorch.cmake"
  fi
}

patch_launcher() {
  # horovodrun's rendezvous, which asks for no password, listens on every address of the machine. It is asked at one: that of
  # --network-interfaces, and of loopback where all ranks are here. In the installed files, as the wheel may be an older one.
  local runner
  runner=$("$python" -c 'import importlib.util; print(importlib.util.find_spec("horovod").submodule_search_locations[0])')/runner
  if ! grep -q HOROVOD_RENDEZVOUS_BIND "$runner/gloo_run.py"; then
    sed -i "s/^            addr = ('', port)\$/            addr = (__import__('os').environ.get('HOROVOD_RENDEZVOUS_BIND', ''), port)/" \
      "$runner/util/network.py"
    sed -i "s/^    global_rendezv_port = rendezvous.start()\$/    os.environ['HOROVOD_RENDEZVOUS_BIND'] = server_ip\n&/" "$runner/gloo_run.py"
  fi
  # Where a rank fails, which prints why in one line, the launcher's own 20 lines of traceback say nothing more: one line of them.
  if ! grep -q 'except RuntimeError as failure' "$runner/launch.py"; then
    sed -i '/^def run_commandline/,$s/^    _run(args)$/    try:\n        _run(args)\n    except RuntimeError as failure:\n        sys.exit(" ".join(str(failure).split()))/' \
      "$runner/launch.py"
  fi
  grep -q HOROVOD_RENDEZVOUS_BIND "$runner/util/network.py" && grep -q HOROVOD_RENDEZVOUS_BIND "$runner/gloo_run.py" &&
    grep -q 'except RuntimeError as failure' "$runner/launch.py"
}

if [ "$("$python" -m pip list --format=freeze 2>/dev/null | sed -n 's/^horovod==//p')" = "$version" ] &&
  [ "$(cat "$record" 2>/dev/null)" = "$build" ] && "$python" -c 'import horovod.torch' 2>/dev/null; then
  patch_launcher
  echo "horovod $version is installed ($operations)"
  exit 0
fi

if ! ls "$wheels"/horovod-*.whl >/dev/null 2>&1; then
  "$python" - <<'PY'
import pathlib, sys, sysconfig
header = pathlib.Path(sysconfig.get_path("include"), "Python.h")
if not header.exists():
    name = "python{}.{}-dev".format(*sys.version_info)
    sys.exit(f"{header} is missing. Install the headers of this Python: apt-get install python3-dev (or {name})")
PY
  command -v "${CXX:-c++}" >/dev/null || { echo "No C++ compiler. Install one: apt-get install g++" >&2; exit 1; }
  echo "horovod $version for $tag: about four minutes, once per machine (cache: $wheels)"
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  log=$cache_root/horovod-build.log
  mkdir -p "$cache_root"
  set +e
  telling "building horovod" build_logged
  built=$?
  set -e
  if [ "$built" != 0 ]; then
    grep -E -A 3 -m 10 'CMake Error|error:|ERROR:' "$log" >&2 || tail -n 10 "$log" >&2
    echo "horovod did not build; all that the build said: $log" >&2
    exit 1
  fi
  # Published by one rename, so that a build that was cut off leaves nothing that looks finished.
  mv -T "$work/wheels" "$wheels" 2>/dev/null || [ -d "$wheels" ]
fi

rm -f "$record"
"$python" -m pip uninstall --quiet --yes horovod 2>/dev/null
"$python" -m pip install --quiet "$wheels"/horovod-*.whl
"$python" -c 'import sys, horovod.torch as hvd; sys.exit("NCCL" == sys.argv[1] and not hvd.nccl_built())' "$operations" || {
  echo "horovod was built for $operations, but does not import, or without what was asked for" >&2
  exit 1
}
patch_launcher
echo "$build" >"$record"
echo "horovod $version is installed ($operations)"
