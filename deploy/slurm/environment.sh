#!/usr/bin/env bash
# Sourced by the batch scripts: the folder of the project, and its Python.
cd "${SLURM_SUBMIT_DIR:?this is a batch script: submit it with sbatch, in the folder of the project}" || exit 2
if [ ! -f "${VENV:=.venv}/bin/activate" ]; then
  echo "error: $PWD/$VENV has no bin/activate; run make install there, or name another environment: VENV=... sbatch ..." >&2
  exit 2
fi
# shellcheck source=/dev/null
. "$VENV/bin/activate"
