#!/usr/bin/env bash
# Fetches what `make test-cluster` needs of Debian, sshd and Slurm, into a folder of its own: nothing is installed.
#
#   tools/cluster_packages.sh FOLDER
#
# The packages are unpacked below FOLDER, and FOLDER/bin has their programs by the names that they call each other.
# Exit code 1, with one line, where something could not be had; the tests then say which of them were not run.
set -euo pipefail

packages=(
  openssh-server openssh-client libwrap0 libwtmpdb0
  slurmctld slurmd slurm-client slurm-wlm-basic-plugins libhwloc15 libjwt2 libb64-0d libmunge2
)

folder=${1:?which folder? tools/cluster_packages.sh FOLDER}
"$(dirname "$0")/debian_packages.sh" "$folder" "sshd and Slurm" "${packages[@]}"
folder=$(cd "$folder" && pwd)
mkdir -p "$folder/bin"
for program in "$folder"/usr/bin/* "$folder"/usr/sbin/*; do
  name=$(basename "$program")
  ln -sfn "$program" "$folder/bin/${name%-wlm}"
done
