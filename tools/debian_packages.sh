#!/usr/bin/env bash
# Fetches packages of Debian or Ubuntu and unpacks them below a folder of their own: nothing is installed.
#
#   tools/debian_packages.sh FOLDER WHAT PACKAGE...
#
# WHAT names in messages what the packages are for, e.g. "sshd and Slurm". A second call with the same packages does
# nothing. Needs apt-get and dpkg; root only where apt's lists of packages have never been fetched. Exit code 1, with one
# line, where something could not be had. With --with-dependencies before FOLDER also what the packages need and this
# machine has not installed, but never the C library.
set -euo pipefail

dependencies=
if [ "${1:-}" = --with-dependencies ]; then
  dependencies=yes
  shift
fi
folder=${1:?which folder?}
what=${2:?what is it?}
shift 2
packages=("$@")

mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
marker=$folder/unpacked.txt
if [ "$(cat "$marker" 2>/dev/null)" = "${packages[*]}" ]; then
  exit 0
fi
for program in apt-get dpkg; do
  if ! command -v "$program" >/dev/null; then
    echo "$what could not be fetched: this machine has no $program (it is of Debian and Ubuntu)" >&2
    exit 1
  fi
done

# One at a time: apt-get refuses to fetch its lists while another one does.
exec 9>"${TMPDIR:-/tmp}/crossmedia-packages-$UID.lock"
flock 9
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
needed() { # what apt would install: the packages and what they need
  apt-get install --simulate --no-install-recommends "${packages[@]}" 2>"$work/errors" >"$work/plan" &&
    awk '$1 == "Inst" && $2 !~ /^(libc6|libc-bin|libc-l10n|locales)(:|$)/ {print $2}' "$work/plan"
}
fetch() {
  rm -f ./*.deb
  local names=("${packages[@]}")
  if [ -n "$dependencies" ]; then
    local more
    more=$(needed) || return 1
    mapfile -t -O "${#names[@]}" names <<<"$more"
  fi
  apt-get download -qq -o APT::Sandbox::User=root "${names[@]}" 2>"$work/errors"
}
# Lists that were never fetched, or are so old that their files have left the mirror.
if ! fetch && ! { apt-get update -qq 2>"$work/errors" && fetch; }; then
  echo "$what could not be fetched by apt-get: $(grep -m 1 '^E:' "$work/errors" || tail -n 1 "$work/errors")" >&2
  exit 1
fi
rm -rf "${folder:?}"/{usr,etc,bin,lib,opt,var,unpacked.txt}
for file in *.deb; do
  dpkg -x "$file" "$folder"
done
echo "${packages[*]}" >"$marker"
