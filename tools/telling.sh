# shellcheck shell=bash
# Sourced by scripts that install: what takes long says every 10 s that it goes on.

telling() { # telling WHAT COMMAND ARGUMENT...: run the command; its exit code is this function's
  local what=$1 started=$SECONDS flags=$- clock code
  shift
  echo "$what"
  # The clock's own sleep holds no output open, and it stops where this script was ended.
  (while sleep 10 >/dev/null 2>&1 && kill -0 $$ 2>/dev/null; do echo "$what: $((SECONDS - started)) s"; done) &
  clock=$!
  set +e # instead of a condition, in which a (set -e; ...) within the command would do nothing
  "$@"
  code=$?
  kill "$clock" 2>/dev/null
  wait "$clock" 2>/dev/null
  [[ $flags != *e* ]] || set -e
  return "$code"
}
