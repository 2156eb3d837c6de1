#!/usr/bin/env bash
# To be sourced by kd.sh: words of options, and what a model's flags say of it.

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

# says OPTION DEFAULT FLAG...: whether a model's flags switch an option on.
says() {
  local option=$1 value=$2
  shift 2
  while [ $# -gt 1 ]; do
    if [ "$1" = "--$option" ]; then value=$2; fi
    shift
  done
  [[ $value =~ ^([Tt]rue|[Yy]es|1|t|y)$ ]]
}
has_ctc() { says use-ctc False "$@"; }
has_transducer() { says use-transducer True "$@"; }
is_causal() { says causal False "$@"; }

# suits SCRIPT FLAG...: whether the model has the head that the script reads.
suits() {
  local script=$1
  shift
  case $script in
    export.py) ;;
    *ctc*) has_ctc "$@" ;;
    *) has_transducer "$@" ;;
  esac
}

# read_flags FILE: its words, as the array `words`; none where there is no file.
read_flags() {
  words=()
  if [ -f "$1" ]; then read -r -d '' -a words < "$1" || true; fi
}
