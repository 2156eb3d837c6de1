#!/usr/bin/env bash
# To be sourced. How the threads of a program wait for each other (OpenMP): asleep, and
# not, as by default, spinning. Spinning is a little faster on an idle machine; beside
# one busy process it takes the core away from the very thread that is waited for
# (benchmarks/neighbours.py). What the user has set stays.
if [ -z "${OMP_WAIT_POLICY:-}${GOMP_SPINCOUNT:-}${KMP_BLOCKTIME:-}" ]; then
  export OMP_WAIT_POLICY=PASSIVE
fi
