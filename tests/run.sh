#!/usr/bin/env bash
# Make an environment for the tests, and run them: all, or those that the words name.
# Usage: bash tests/run.sh [PYTEST_OPTION ...]
set -euo pipefail
cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/.."
# Two processes share the cores, and threads that spin beside each other crawl.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

bash tools/make_env.sh --prefix .venv-test --dev
# A file's tests share what they make, so a file stays with one of the two processes. In
# order of their names the recipe, the longest file, is not the last one.
exec .venv-test/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
