# What make_env.sh and make_k2_env.sh share. To be sourced, not run.

root=$(dirname "$(dirname "$(realpath "${BASH_SOURCE[0]}")")")

# die SENTENCE: say what is wrong and what to do, and stop.
die() {
  echo "$*" >&2
  exit 1
}

# step TEXT: say what is being done, and about how long it takes.
step() {
  echo "==> $*"
}

# need_value OPTION COUNT: refuse an option that came without its value.
need_value() {
  [[ $2 -ge 2 ]] || die "$1 needs a value; see --help."
}

# usage FILE: print the comment at the head of a script.
usage() {
  sed -n '3,/^$/ s/^# \{0,1\}//p' "$1"
}

# make_venv PYTHON PREFIX: make the virtual environment unless it is there.
# Sets: python (its interpreter), prefix (absolute), log.
make_venv() {
  local base=$1
  prefix=$2
  if [[ -e $prefix && ! -e $prefix/pyvenv.cfg ]]; then
    if [[ ! -d $prefix || -n $(ls -A -I install.log "$prefix") ]]; then
      die "$prefix is there and is no virtual environment; move it away or" \
        "choose another --prefix."
    fi
  fi
  mkdir -p "$prefix" 2>/dev/null ||
    die "The folder $prefix cannot be made; choose another --prefix."
  prefix=$(cd "$prefix" && pwd)
  python=$prefix/bin/python
  log=$prefix/install.log
  if ! "$python" -m pip --version >/dev/null 2>&1; then
    step "making a virtual environment in $prefix (about 5 s)"
    "$base" -m venv "$prefix" >"$log" 2>&1 ||
      die "$base cannot make a virtual environment; install your system's package" \
        "for it, for example python3-venv (the log is $log)."
  fi
  : >"$log" || die "$log cannot be written; choose another --prefix."
}

# same_version PYTHON: refuse an environment that another Python was used for.
same_version() {
  local code='import sys; print("%d.%d" % sys.version_info[:2])' wanted found
  wanted=$("$1" -c "$code")
  found=$("$python" -c "$code")
  [[ $wanted == "$found" ]] ||
    die "$prefix holds Python $found and $1 is Python $wanted; remove the folder or" \
      "choose another --prefix."
}

# pip_install WHAT ARGS...: install quietly; the words are pip's arguments.
pip_install() {
  local what=$1
  shift
  if ! PIP_DISABLE_PIP_VERSION_CHECK=1 \
    "$python" -m pip install -q "$@" </dev/null >>"$log" 2>&1; then
    if grep -q 'No space left on device' "$log"; then
      die "The disk is full, so $what is not installed; free some space and run" \
        "the same command again (the log is $log)."
    fi
    die "pip could not install $what; check the network, read the end of $log and" \
      "run the same command again."
  fi
}

# fingerprint: changes when what is to be installed may have changed.
fingerprint() {
  (
    cd "$root"
    cat setup.py pyproject.toml tools/*.sh tools/*.py 2>/dev/null || true
  ) | cksum
}

# is_ready WORDS...: whether the marker names all of this as installed.
is_ready() {
  local marker=$prefix/.icefall_kd_ready word
  [[ -e $marker && $(sed -n 1p "$marker") == "$(fingerprint)" ]] || return 1
  for word in "$@"; do
    grep -qx -- "$word" "$marker" || return 1
  done
}

# set_ready WORDS...: write the marker; its former content stays if the
# fingerprint is the same.
set_ready() {
  local marker=$prefix/.icefall_kd_ready
  local old=()
  if is_ready; then
    mapfile -t old < <(sed 1d "$marker")
  fi
  {
    fingerprint
    printf '%s\n' "${old[@]}" "$@" | sed '/^$/d' | sort -u
  } >"$marker.part"
  mv "$marker.part" "$marker"
}
