#!/usr/bin/env bash
# To be sourced by kd.sh: speech without transcripts, which the teacher labels. The
# functions read kd.sh's options and arrays. The folders in targets_dir are labels/, what
# the teacher heard; kept/, what the filter left of it; parts/, manifests with targets
# that the mix is made of.

# expand_manifests OPTION: the manifests that its patterns name, as the array `expanded`.
expand_manifests() {
  local pattern matches m
  expanded=()
  split "$1"
  for pattern in "${words[@]}"; do
    matches=$pattern
    if [ ! -e "$manifest_dir/$pattern" ]; then
      matches=$(cd "$manifest_dir" 2>/dev/null && compgen -G "$pattern" | sort) || true
    fi
    [ -n "$matches" ] || fail "$asr_dir/$manifest_dir has no $pattern: run the recipe's" \
      "prepare.sh first, or correct --manifest-dir and --${1//_/-}"
    while IFS= read -r m; do expanded+=("$m"); done <<< "$matches"
  done
}

# check_unlabelled: what --unlabelled-manifests can't go with is refused.
check_unlabelled() {
  local m weights
  [ -z "$job" ] || fail "--job is $job and --unlabelled-manifests are given, whose" \
    "labels all jobs need: run stage 2 with --num-jobs alone"
  for m in "${unlabelled[@]}"; do
    ! grep -qxF -e "$m" <<< "$(printf '%s\n' "${manifests[@]}")" \
      || fail "$m is in --train-manifests and in --unlabelled-manifests: name it in one"
  done
  split mix_weights
  weights=("${words[@]}")
  [ "${#weights[@]}" -eq 0 ] || [ "${#weights[@]}" -eq $((1 + ${#unlabelled[@]})) ] \
    || fail "--mix-weights is '$mix_weights': give $((1 + ${#unlabelled[@]})) numbers," \
      "of the first of --train-manifests and of each of --unlabelled-manifests"
}

# label_job N: the part of job N in the labels of each manifest.
label_job() {
  local m method=greedy_search
  if ! has_transducer "${teacher_model[@]}"; then method=ctc-greedy-search; fi
  split label_flags
  local more=("${words[@]}")
  for m in "${unlabelled[@]}"; do
    mkdir -p "$targets_dir/labels/$(dirname "$m")"
    icefall-kd label "${teacher[@]}" --decoding-method "$method" --num-jobs "$num_jobs" \
      --job "$1" "$manifest_dir/$m" "$targets_dir/labels/$m" "${chunked[@]}" \
      "${more[@]}" \
      || fail "the teacher can't label $manifest_dir/$m: correct what the message names," \
        "and give the same command again"
  done
}

# filter_labels: what of the labels is trained on; seconds. Targets of what another filter
# kept are removed, as a dump that goes on would leave its cuts in.
filter_labels() {
  local m kept part
  split filter_flags
  local more=("${words[@]}")
  for m in "${unlabelled[@]}"; do
    kept=$targets_dir/kept/$m part=$targets_dir/parts/$m
    mkdir -p "$(dirname "$kept")"
    if [ -f "$kept" ] && [ ! -f "$kept.before" ]; then
      cp "$kept" "$kept.before.tmp"
      mv "$kept.before.tmp" "$kept.before"
    fi
    icefall-kd filter "${token_flags[@]}" --page "$kept.dropped.md" "${more[@]}" \
      "$targets_dir/labels/$m" "$kept"
    if [ -f "$kept.before" ]; then
      cmp -s <(gzip -cdf "$kept") <(gzip -cdf "$kept.before") \
        || rm -rf "$part" "$part.partial" "${part%.jsonl*}_kd"
      rm -f "$kept.before"
    fi
  done
}

# mix_parts: the first training manifest with the pseudo-labelled cuts in it.
mix_parts() {
  local parts=() m i=0
  split mix_weights
  for m in "${manifests[0]}" "${unlabelled[@]}"; do
    parts+=(--cuts "$targets_dir/parts/$m")
    if [ "${#words[@]}" -gt 0 ]; then parts+=(--weight "${words[$i]}"); fi
    i=$((i + 1))
  done
  m=$targets_dir/${manifests[0]}
  mkdir -p "$(dirname "$m")"
  if [ -L "$m" ]; then rm -f "$m"; fi
  icefall-kd mix "$m" "${parts[@]}"
  echo "$mixture" > "$targets_dir/.mixture"
}
