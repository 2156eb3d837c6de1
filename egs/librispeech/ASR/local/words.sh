#!/usr/bin/env bash
# To be sourced by kd.sh: options of several words, and what a model's flags say.

# split VARIABLE: its words, as the array `words`. Quotes hold a word together.
split() {
  local word
  words=()
  xargs printf '%s\0' <<< "${!1}" > /dev/null 2>&1 \
    || fail "--${1//_/-} has a quotation mark without its second one: ${!1}"
  while IFS= read -r -d '' word; do
    words+=("$word")
  done < <(xargs -r printf '%s\0' <<< "${!1}")
}

# read_flags FILE: its words, as the array `words`; none where there is no file.
read_flags() {
  words=()
  if [ -f "$1" ]; then read -r -d '' -a words < "$1" || true; fi
}

# is_on OPTION DEFAULT FLAG...: whether a model's flags switch an option on.
is_on() {
  local option=$1 value=$2
  shift 2
  while [ $# -gt 1 ]; do
    if [ "$1" = "--$option" ]; then value=$2; fi
    shift
  done
  [[ $value =~ ^([Tt]rue|[Yy]es|1|t|y)$ ]]
}
has_ctc() { is_on use-ctc False "$@"; }
has_transducer() { is_on use-transducer True "$@"; }
is_causal() { is_on causal False "$@"; }

# has_head_for DECODING FLAG...: whether the model has the head that a decoding reads,
# SCRIPT:METHOD or icefall-kd:METHOD.
has_head_for() {
  local decoding=$1 name=${1%%:*}
  shift
  if [ "$name" = icefall-kd ]; then name=${decoding##*:}; fi
  has_head_of "$name" "$@"
}

# has_head_of SCRIPT FLAG...: whether the model has the head that the script reads.
has_head_of() {
  local name=$1
  shift
  case $name in
    export.py) ;;
    *ctc*) has_ctc "$@" ;;
    *) has_transducer "$@" ;;
  esac
}
