#!/usr/bin/env bash
# Fetches what `make test-cluster` needs of Debian, sshd and Slurm, into a folder of its own: nothing is installed.
#
#   tools/cluster_packages.sh FOLDER
#
# The packages are unpacked below FOLDER, and FOLDER/bin has their programs by the names that they call each other.
# Needs apt-get and dpkg; root only where apt's lists of packages have never been fetched. A second call does nothing.
# Exit code 1, with one line, where something could not be had; the tests then say which of them were not run.
set -euo pipefail

packages=(
  openssh-server openssh-client libwrap0 libwtmpdb0
  slurmctld slurmd slurm-client slurm-wlm-basic-plugins libhwloc15 libjwt2 libb64-0d libmunge2
)

folder=${1:?which folder? tools/cluster_packages.sh FOLDER}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
marker=$folder/unpacked.txt
if [ "$(cat "$marker" 2>/dev/null)" = "${packages[*]}" ]; then
  exit 0
fi
for program in apt-get dpkg; do
  if ! command -v "$program" >/dev/null; then
    echo "sshd and Slurm could not be fetched: this machine has no $program (it is of Debian and Ubuntu)" >&2
    exit 1
  fi
done

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
fetch() {
  apt-get download -qq -o APT::Sandbox::User=root "${packages[@]}" 2>"$work/errors"
}
# Lists that were never fetched, or are so old that their files have left the mirror.
if ! fetch && ! { apt-get update -qq 2>"$work/errors" && fetch; }; then
  echo "sshd and Slurm could not be fetched by apt-get: $(grep -m 1 '^E:' "$work/errors" || tail -n 1 "$work/errors")" >&2
  exit 1
fi
rm -rf "${folder:?}/usr" "${folder:?}/etc" "${folder:?}/bin"
for file in *.deb; do
  dpkg -x "$file" "$folder"
done
mkdir "$folder/bin"
for program in "$folder"/usr/bin/* "$folder"/usr/sbin/*; do
  name=$(basename "$program")
  ln -s "$program" "$folder/bin/${name%-wlm}"
done
echo "${packages[*]}" >"$marker"
