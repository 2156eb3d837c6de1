#!/usr/bin/env bash
# Make an environment for the tests, and run them: all, or those that the words name.
# Usage: bash tests/run.sh [PYTEST_OPTION ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash tools/make_env.sh --prefix .venv-test --dev
exec .venv-test/bin/python -m pytest "$@"
