#!/usr/bin/env bash
# To be sourced. Stopped by Ctrl-C, `kill` or a closed terminal, a script ends at once,
# and with it all that it has started. Bash alone would wait for what runs in the
# foreground, and leave what runs in the background to itself.
#
#   run COMMAND ...             in the foreground, for all that takes longer than seconds
#   in_background FUNCTION ...  its process is $!; the function uses `run` likewise

stop_jobs() {
  local left
  left=$(jobs -p)
  # shellcheck disable=SC2086
  if [ -n "$left" ]; then
    kill $left 2>/dev/null || true
    wait $left 2>/dev/null || true
  fi
}

stoppable() {
  trap stop_jobs EXIT
  trap 'exit 129' HUP
  trap 'exit 130' INT
  trap 'exit 143' TERM
}

# In the background bash lets a command ignore Ctrl-C, and what that command starts.
run() {
  (trap - INT; exec "$@") &
  wait $!
}

in_background() {
  (stoppable; "$@") &
}

# alone FOLDER: wait until no other process works there, if there is such a folder. What
# a script that was killed had started counts, until it ends.
alone() {
  [ -d "$1" ] && command -v flock > /dev/null || return 0
  exec 9>> "$1/.lock"
  if ! flock -n 9; then
    echo "${0##*/}: another run works in $1 (or what is left of one that was killed:" \
      "fuser -v $1/.lock names it): waiting for its end" >&2
    run flock 9
  fi
}

stoppable
