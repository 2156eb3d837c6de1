#!/usr/bin/env bash
# To be sourced, after parse_options.sh. What a script can't use it refuses before it
# removes or writes anything. To bash a number with a zero in front is octal, and one of
# many digits overflows.

_number='(0|[1-9][0-9]{0,8})'

_refuse_option() {
  echo "${0##*/}: error: --${1//_/-} is '${!1}', and must be ${*:2}" >&2
  exit 1
}

# check_numbers LEAST NAME ...: refuse options that are no whole number from LEAST on.
check_numbers() {
  local least=$1 option
  shift
  for option in "$@"; do
    [[ ${!option} =~ ^$_number$ ]] && [ "${!option}" -ge "$least" ] \
      || _refuse_option "$option" "a whole number from $least to 999999999, without" \
        "zeros in front"
  done
}

# check_list NAME: refuse an option that is no list of whole numbers.
check_list() {
  [[ ${!1} =~ ^\ *$_number(\ +$_number)*\ *$ ]] \
    || _refuse_option "$1" "one or more whole numbers with spaces between them, each" \
      "from 0 to 999999999, without zeros in front"
}

# check_switch NAME: refuse an option that is neither true nor false.
check_switch() {
  [[ ${!1} =~ ^(true|false)$ ]] || _refuse_option "$1" "true or false"
}
