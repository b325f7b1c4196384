#!/usr/bin/env bash
# Sourced by the batch scripts in the folder of the project: its Python.
if [ ! -f "${VENV:=.venv}/bin/activate" ]; then
  echo "error: $(realpath --canonicalize-missing "$VENV") has no bin/activate; run make install there, or name another environment: VENV=... sbatch ..." >&2
  exit 2
fi
# shellcheck source=/dev/null
. "$VENV/bin/activate"
