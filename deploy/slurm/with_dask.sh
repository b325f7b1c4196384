#!/usr/bin/env bash
# Runs a script of jobs/ with a Dask cluster of this Slurm job: the scheduler here, a worker on every node.
#
#   deploy/slurm/with_dask.sh jobs/extract_features.py ARGUMENTS      (in a batch script)
#
# All of it speaks TLS, by a key that is made here for this job alone and sent to the nodes by sbcast: it is in files of
# this user, and on no command line. Whoever does not have it cannot reach scheduler or workers.
set -euo pipefail
umask 077

: "${SLURM_JOB_ID:?this runs in a batch script: sbatch deploy/slurm/extract.sbatch}"
tls=$(mktemp -d "${TMPDIR:-/tmp}/dask-$SLURM_JOB_ID-XXXXXX")
on_every_node=(--nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1)
scheduler='' workers=''
finish() {
  trap - TERM
  if [ -n "$scheduler" ]; then
    kill "$scheduler" 2>/dev/null || true
  fi
  if [ -n "$workers" ]; then # they end when they lose the scheduler; a node that is gone does not
    for _ in {1..100}; do
      kill -0 "$workers" 2>/dev/null || break
      sleep 0.2
    done
    kill -KILL "$workers" 2>/dev/null || true
  fi
  rm -rf "$tls"
}
trap finish EXIT
trap 'exit 143' TERM

openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 90 -subj "/CN=job-$SLURM_JOB_ID" \
  -keyout "$tls/key.pem" -out "$tls/cert.pem" 2>"$tls/openssl.txt" || { cat "$tls/openssl.txt" >&2; exit 1; }
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
  # Here it is there, and on the others where they share the disk. One of another user, or open to others, ends the job.
  # shellcheck disable=SC2016
  srun "${on_every_node[@]}" bash -c '
    mkdir -m 700 "$0" 2>/dev/null || { [ ! -L "$0" ] && [ -O "$0" ] && [ "$(stat -c %a "$0")" = 700 ]; } ||
      { echo "error: $0 on $SLURMD_NODENAME is not a folder of this job alone: somebody else made it" >&2; exit 1; }
  ' "$tls"
  for file in key.pem cert.pem; do
    sbcast --force --preserve "$tls/$file" "$tls/$file"
  done
fi
export DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION=True
export DASK_DISTRIBUTED__COMM__TLS__CA_FILE="$tls/cert.pem"
for role in SCHEDULER WORKER CLIENT; do
  export "DASK_DISTRIBUTED__COMM__TLS__${role}__CERT=$tls/cert.pem" "DASK_DISTRIBUTED__COMM__TLS__${role}__KEY=$tls/key.pem"
done
# On Python 3.11 before 3.11.9, the worker's profiler can stop a worker for ever.
export DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED=False

# Without a dashboard, a page of figures is still served, without TLS: on loopback alone.
no_dashboard=(--no-dashboard --dashboard-address 127.0.0.1:0)
dask scheduler --protocol tls --port 0 "${no_dashboard[@]}" --scheduler-file "$tls/scheduler.json" &
scheduler=$!
while [ ! -s "$tls/scheduler.json" ]; do
  kill -0 "$scheduler" || { echo "error: the scheduler did not start" >&2; exit 1; }
  sleep 0.2
done
port=$(sed -n 's|.*"address": "tls://.*:\([0-9]*\)".*|\1|p' "$tls/scheduler.json")

# A worker finds the scheduler at the address from which srun reached its node, and removes the key when it ends. A node
# that fails takes no other along.
# shellcheck disable=SC2016
srun --no-kill --kill-on-bad-exit=0 --wait=0 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "${on_every_node[@]}" bash -c '
  trap "rm -rf \"$1\"" EXIT
  dask worker "tls://$SLURM_LAUNCH_NODE_IPADDR:$0" "${@:2}" --death-timeout 300 --local-directory "${TMPDIR:-/tmp}"
' "$port" "$tls" "${no_dashboard[@]}" &
workers=$!

dask-submit --scheduler-file "$tls/scheduler.json" --wait-workers "$SLURM_JOB_NUM_NODES" --timeout 120 "$@" &
submitted=$!
trap 'kill "$submitted"; wait "$submitted"' TERM
wait "$submitted"
