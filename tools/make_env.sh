#!/usr/bin/env bash
#
# Make a virtual environment with the project and all that its default parts need:
# zipformer (the recipe's model, which brings torch and torchaudio), lhotse and
# fast_rnnt. Python 3.10 to 3.13; a GPU is not needed.
#
# Usage: tools/make_env.sh [options]
#   --prefix FOLDER   where to make it (default: .venv)
#   --python PYTHON   the Python to make it with (default: python3)
#   --dev             also what the tests and the style checks need
#   --kaldifeat       also kaldifeat, built from source
#   --no-project      leave out the project itself
#
# It can be run again at any time: what is there is kept, what is missing is added.

set -euo pipefail

source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/common.sh"

prefix=.venv
base=
extras=digits
project=1
words=(base)
natives=(fast_rnnt)
while [[ $# -gt 0 ]]; do
  case $1 in
    --prefix) need_value "$1" $#; prefix=$2; shift ;;
    --python) need_value "$1" $#; base=$2; shift ;;
    --dev) extras=digits,test; words+=(dev) ;;
    --kaldifeat) natives+=(kaldifeat); words+=(kaldifeat) ;;
    --no-project) project=0 ;;
    -h | --help) usage "$0"; exit 0 ;;
    *) die "The option $1 is not known; see tools/make_env.sh --help." ;;
  esac
  shift
done
if [[ $project -eq 1 ]]; then
  words+=(project)
fi

# check_version PYTHON: torch 2.7, the newest that zipformer takes, ends at 3.13.
check_version() {
  local version
  version=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) ||
    die "$1 does not run; name a Python from 3.10 to 3.13 with --python."
  case $version in
    3.10 | 3.11 | 3.12 | 3.13) ;;
    *) die "$1 is Python $version and 3.10 to 3.13 is needed; name one with" \
      "--python and, if $prefix is there, another --prefix." ;;
  esac
}

check_version "${base:-python3}"
make_venv "${base:-python3}" "$prefix"
check_version "$python"
if [[ -n $base ]]; then
  same_version "$base"
fi
if is_ready "${words[@]}"; then
  step "$prefix is ready; nothing to do"
  exit 0
fi

native=$root/tools/install_native.py

# fast_rnnt works, or else k2 does, and one transducer engine is enough.
missing=()
for name in "${natives[@]}"; do
  if ! "$python" "$native" --check "$name" >>"$log" 2>&1; then
    if [[ $name != fast_rnnt ]] || ! "$python" "$native" --check k2 >>"$log" 2>&1; then
      missing+=("$name")
    fi
  fi
done
# Better to miss a compiler now than after the downloads.
if [[ ${#missing[@]} -gt 0 ]]; then
  "$python" "$native" --check build-tools >/dev/null
fi

step "installing zipformer, torch and torchaudio (about 80 s)"
pip_install "zipformer 0.1.3" zipformer==0.1.3 urllib3

if [[ $project -eq 1 ]]; then
  step "installing the project with its extras $extras (about 20 s)"
  pip_install "the project with its extras $extras" -e "$root[$extras]"
fi

for name in "${missing[@]}"; do
  "$python" "$native" "$name"
done

set_ready "${words[@]}"
step "done; run: source '$prefix/bin/activate'"
