#!/usr/bin/env bash
# To be sourced. How the threads of a program wait for each other (OpenMP). By default
# they spin. Beside a busy process, a thread that spins takes the core from the thread
# that it waits for. A thread that sleeps does not, but takes twice the time where no
# process is busy (benchmarks/neighbours.py). So threads sleep if another process is busy
# when the script begins, and else spin for a moment, then sleep. What the user has set
# stays.

# idle_share: of all cores' time in the next third of a second, in percent.
idle_share() {
  local before after
  before=$(awk '/^cpu / { print $5 + $6, $2 + $3 + $4 + $5 + $6 + $7 + $8 }' /proc/stat)
  sleep 0.3
  after=$(awk '/^cpu / { print $5 + $6, $2 + $3 + $4 + $5 + $6 + $7 + $8 }' /proc/stat)
  awk '{ print int(100 * ($3 - $1) / ($4 - $2 > 0 ? $4 - $2 : 1)) }' \
    <<< "$before $after"
}

if [ -z "${OMP_WAIT_POLICY:-}${GOMP_SPINCOUNT:-}${KMP_BLOCKTIME:-}" ]; then
  # Half of a core that other processes use counts as a busy process.
  if [ -r /proc/stat ] && [ "$(idle_share)" -lt $((100 - 50 / $(nproc))) ]; then
    export OMP_WAIT_POLICY=PASSIVE
  else
    export GOMP_SPINCOUNT=1000
  fi
fi
