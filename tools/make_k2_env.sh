#!/usr/bin/env bash
#
# Make a virtual environment with k2, for the parts that want it and for icefall's
# own recipes. It needs Python 3.10 exactly: k2 1.23.4, the newest on the package
# index, is a binary for CPython 3.10 and torch 1.13.1. A GPU is not needed.
# For a newer k2, use one of the wheels on k2's own page instead.
#
# Usage: tools/make_k2_env.sh [options]
#   --prefix FOLDER   where to make it (default: .venv-k2)
#   --python PYTHON   a Python 3.10 (default: the one tools/find_python.sh finds)
#   --icefall         also what icefall's own recipes import
#   --fast-rnnt       also fast_rnnt, built from source
#   --no-project      leave out the project itself
#
# It can be run again at any time: what is there is kept, what is missing is added.

set -euo pipefail

source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/common.sh"

prefix=.venv-k2
base=
icefall=0
fast_rnnt=0
project=1
words=(base)
while [[ $# -gt 0 ]]; do
  case $1 in
    --prefix) need_value "$1" $#; prefix=$2; shift ;;
    --python) need_value "$1" $#; base=$2; shift ;;
    --icefall) icefall=1; words+=(icefall) ;;
    --fast-rnnt) fast_rnnt=1; words+=(fast-rnnt) ;;
    --no-project) project=0 ;;
    -h | --help) usage "$0"; exit 0 ;;
    *) die "The option $1 is not known; see tools/make_k2_env.sh --help." ;;
  esac
  shift
done
if [[ $project -eq 1 ]]; then
  words+=(project)
fi

is_310() {
  "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 10))' >/dev/null 2>&1
}

if [[ -z $base ]]; then
  base=$("$root/tools/find_python.sh" 3.10)
fi
is_310 "$base" ||
  die "$base is no working Python 3.10, the only one that k2 1.23.4 works with;" \
    "name one with --python."

make_venv "$base" "$prefix"
same_version "$base"
if is_ready "${words[@]}"; then
  step "$prefix is ready; nothing to do"
  exit 0
fi

native=$root/tools/install_native.py

if [[ $fast_rnnt -eq 1 ]] &&
  ! "$python" "$native" --check fast_rnnt >>"$log" 2>&1; then
  "$python" "$native" --check build-tools >/dev/null
fi

# NumPy 2 breaks torch 1.13, lhotse from 1.28 on needs a newer torch, and many
# packages would bring them in. pip.conf makes later calls of this environment's
# pip keep to the same versions.
constraints=$prefix/constraints.txt
cat >"$constraints" <<'END'
numpy<2
torch==1.13.1
torchaudio==0.13.1
k2==1.23.4
lhotse==1.27.0
END
printf '[install]\nconstraint = %s\n' "$constraints" >"$prefix/pip.conf"

# k2's wheels bear the Python that they are for in a tag that pip doesn't compare, so it
# takes one of them at random: the hash is that of the one for Python 3.10.
cat >"$prefix/k2.txt" <<'END'
k2==1.23.4 --hash=sha256:1404589732fdb7f6f5bf62297a20dd73318b7b4f2e10dd52dc3d5b6669688a4c
END
step "installing k2, torch, torchaudio and lhotse (about 50 s)"
pip_install "k2 1.23.4 for Python 3.10" --no-deps -r "$prefix/k2.txt"
pip_install "k2 1.23.4 with torch 1.13.1" -c "$constraints" \
  k2==1.23.4 'numpy<2' torchaudio==0.13.1 lhotse==1.27.0 sentencepiece urllib3

# zipformer and atdataset ask for a newer torch than this one, and work with it all
# the same.
step "installing zipformer and what it imports (about 20 s)"
pip_install "zipformer 0.1.3" -c "$constraints" --no-deps \
  zipformer==0.1.3 atdataset==0.2.6
pip_install "what zipformer imports" -c "$constraints" 'numpy<2' \
  simple-sentencepiece webdataset braceexpand huggingface_hub modelscope \
  onnx onnxruntime onnxconverter_common

step "installing what the recipes and the tests import (about 20 s)"
pip_install "what the recipes and the tests import" -c "$constraints" 'numpy<2' \
  h5py kaldialign kaldifst packaging six tensorboard soundfile espeakng-loader tqdm matplotlib pytest pytest-xdist hypothesis

if [[ $icefall -eq 1 ]]; then
  step "installing what icefall's own recipes import (about 30 s)"
  pip_install "what icefall's own recipes import" -c "$constraints" 'numpy<2' \
    pypinyin==0.50.0 kaldilm kaldifst kaldi-decoder num2words typeguard dill \
    packaging matplotlib lilcom
fi

if [[ $project -eq 1 ]]; then
  step "installing the project (about 5 s)"
  pip_install "the project" -c "$constraints" --no-deps -e "$root"
fi

if [[ $fast_rnnt -eq 1 ]]; then
  "$python" "$native" fast_rnnt
fi

step "checking that k2 works (about 10 s)"
"$python" -c 'import k2, lhotse, torch, torchaudio; import zipformer.modules.model' \
  >>"$log" 2>&1 ||
  die "k2, torch, torchaudio, lhotse or zipformer cannot be imported; read the end" \
    "of $log, remove $prefix and run the same command again."
"$python" "$native" --check k2

set_ready "${words[@]}"
step "done; run: source '$prefix/bin/activate'"
