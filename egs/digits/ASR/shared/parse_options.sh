#!/usr/bin/env bash
# To be sourced. `--some-name value` sets the shell variable some_name, which must have
# a value already; `--help` prints $help_message.

while [ $# -gt 0 ]; do
  case "$1" in
    --help|-h)
      printf '%s\n' "${help_message:-no help}"
      exit 0
      ;;
    --*)
      _name=${1#--}
      _name=${_name//-/_}
      if [[ ! $_name =~ ^[a-z][a-z0-9_]*$ ]] || [ -z "${!_name+set}" ]; then
        echo "$0: error: there is no option $1: see $0 --help" >&2
        exit 1
      fi
      if [ $# -lt 2 ]; then
        echo "$0: error: the option $1 has no value: see $0 --help" >&2
        exit 1
      fi
      printf -v "$_name" '%s' "$2"
      shift 2
      ;;
    *)
      echo "$0: error: $1 is no option (they begin with --): see $0 --help" >&2
      exit 1
      ;;
  esac
done
unset _name
