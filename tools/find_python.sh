#!/usr/bin/env bash
#
# Print the path of a working Python of one version, or exit with status 1.
#
# A name on the PATH is not enough: pyenv puts a python3.10 there that refuses to
# run while another version is selected, and some systems leave out ensurepip,
# without which no virtual environment can be made. So each candidate is run.
#
# Usage:
#   tools/find_python.sh 3.10

set -euo pipefail

if [[ $# -ne 1 || ! $1 =~ ^3\.[0-9]+$ ]]; then
  echo "Usage: tools/find_python.sh VERSION, for example 3.10" >&2
  exit 2
fi
version=$1

works() {
  "$1" -c "
import ensurepip, sys, venv
sys.exit('%d.%d' % sys.version_info[:2] != '$version')
" >/dev/null 2>&1
}

candidates() {
  type -ap "python$version" || true
  type -ap python3 || true
  local root
  for root in "${PYENV_ROOT:-}" "$(pyenv root 2>/dev/null || true)" "$HOME/.pyenv"; do
    if [[ -n $root ]]; then
      # Newest first; no match leaves the pattern, which does not run.
      printf '%s\n' "$root/versions/$version".*/bin/python | sort -rV
    fi
  done
}

while IFS= read -r candidate; do
  if works "$candidate"; then
    # The interpreter itself, not a shim that may change its mind later.
    "$candidate" -c 'import sys; print(sys.executable)'
    exit 0
  fi
done < <(candidates)

echo "No working Python $version was found on the PATH or under pyenv; install" \
  "one, for example with 'pyenv install $version'." >&2
exit 1
