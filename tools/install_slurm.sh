#!/bin/bash
# Slurm and munge, for the tests that run examples/slurm on a real cluster on this machine. Nothing is configured and no
# daemon is needed: the tests start their own. Where it cannot be installed this says so, and those tests skip.
set -euo pipefail

skipped() {
    echo "tools/install_slurm.sh: $*; the tests of examples/slurm will be skipped"
    exit 0
}

absent=()
for program in sbatch slurmctld slurmd munged; do command -v "$program" > /dev/null || absent+=("$program"); done
((${#absent[@]})) || exit 0
((EUID == 0)) || skipped "no ${absent[*]} here, and only root can install it"
command -v apt-get > /dev/null || skipped "no ${absent[*]} here, and no apt-get to install it with"
export DEBIAN_FRONTEND=noninteractive
apt-get -qq update || skipped "apt-get update failed"
apt-get -qq install -y --no-install-recommends slurmctld slurmd slurm-client munge > /dev/null ||
    skipped "apt-get could not install it"
