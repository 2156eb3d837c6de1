#!/usr/bin/env bash
# To be sourced; the script sets `script`, its own path. `--some-name value` sets the
# shell variable some_name, which must have a value already. `--help` prints
# $help_message and the options: the variables between "# Options" and help_message.
# renamed="old_name:new_name ..." are options that have a new name.

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "$0: error: this is bash $BASH_VERSION: run it with bash 4.4 or newer" >&2
  exit 1
fi

_refuse() {
  echo "$0: error: $*" >&2
  exit 1
}

_list_options() {
  local line
  echo "Options, with their defaults:"
  while IFS= read -r line; do
    if [[ $line =~ ^([a-z][a-z0-9_]*)=(.*)$ ]]; then
      echo "  --${BASH_REMATCH[1]//_/-} ${BASH_REMATCH[2]}"
    fi
  done < <(sed -n '/^# Options/,/^help_message=/{/^help_message=/d; p}' "$script")
}

while [ $# -gt 0 ]; do
  case "$1" in
    --help|-h)
      printf '%s\n' "$help_message"
      _list_options
      exit 0
      ;;
    --*)
      _name=${1#--}
      _name=${_name//-/_}
      for _pair in ${renamed-}; do
        _new=${_pair#*:}
        [ "$_name" != "${_pair%:*}" ] \
          || _refuse "the option $1 is now called --${_new//_/-}"
      done
      [[ $_name =~ ^[a-z][a-z0-9_]*$ && -n ${!_name+set} ]] \
        || _refuse "there is no option $1: see $0 --help"
      [ $# -ge 2 ] || _refuse "the option $1 has no value: see $0 --help"
      printf -v "$_name" '%s' "$2"
      shift 2
      ;;
    *) _refuse "$1 is no option (they begin with --): see $0 --help" ;;
  esac
done
unset _name _pair _new
