#!/usr/bin/env bash
# To be sourced by kd.sh: what its stages do with manifests and models. The functions
# read kd.sh's options and arrays.

# Manifests that are not distilled are read where they are, by links.
link_other_manifests() {
  local f
  while IFS= read -r f; do
    mkdir -p "$targets_dir/$(dirname "$f")"
    [ -e "$targets_dir/$f" ] \
      || ln -sfn "$(realpath "$manifest_dir/$f")" "$targets_dir/$f" 2>/dev/null \
      || [ -L "$targets_dir/$f" ]  # another job was faster
  done < <(cd "$manifest_dir" && find . -name "*.jsonl.gz" | sed 's|^\./||' \
    | grep -vxF "$(printf '%s\n' "${manifests[@]}")" || true)
}

# in_jobs NAME: NAME_job with each job's number, by the launcher or side by side here.
in_jobs() {
  local j pids=() tasks=() gpus
  if [ -n "$cmd" ]; then
    for j in $(seq 0 $((num_jobs - 1))); do tasks+=("$1 $j"); done
    launch "$1" "$targets_dir/log" 2 "${tasks[@]}"
    return
  fi
  if [ "$num_jobs" -eq 1 ]; then
    "$1_job" 0
    return
  fi
  log "$num_jobs jobs; their logs are $targets_dir/log/$1-*"
  read -r -a gpus <<< "$(tr ',' ' ' <<< "${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 63)}")"
  for j in $(seq 0 $((num_jobs - 1))); do
    CUDA_VISIBLE_DEVICES=${gpus[$((j % ${#gpus[@]}))]} in_background "$1_job" "$j" \
      > "$targets_dir/log/$1-$j" 2>&1
    pids+=($!)
  done
  for j in "${!pids[@]}"; do
    wait "${pids[$j]}" || fail "job $j failed: $(tail -n 1 "$targets_dir/log/$1-$j")"
  done
}

# dump_job N: the part of job N. Jobs share one manifest, or take several in turn. What
# will be mixed goes to parts/.
dump_job() {
  local share=() given=() written=() m i forms=(--keep "$keep")
  for m in "${manifests[@]}"; do
    given+=("$manifest_dir/$m")
    written+=("$targets_dir/$m")
  done
  for m in "${unlabelled[@]}"; do
    written[0]=$targets_dir/parts/${manifests[0]}
    given+=("$targets_dir/kept/$m")
    written+=("$targets_dir/parts/$m")
  done
  if [ "${#given[@]}" -eq 1 ]; then share=(--num-jobs "$num_jobs" --job "$1"); fi
  if [ "${keep_lattice:-none}" != none ]; then
    forms+=(--keep-lattice "$keep_lattice")
  fi
  if [ "${keep_hidden:-none}" != none ]; then forms+=(--keep-hidden "$keep_hidden"); fi
  if [ "${keep_simple:-none}" != none ]; then forms+=(--keep-simple "$keep_simple"); fi
  for i in "${!given[@]}"; do
    if [ "${#given[@]}" -gt 1 ] && [ $((i % num_jobs)) -ne "$1" ]; then continue; fi
    m=${written[$i]}
    mkdir -p "$(dirname "$m")"
    if [ -L "$m" ]; then rm -f "$m"; fi  # no targets yet
    icefall-kd dump "${teacher[@]}" "${forms[@]}" --max-duration "$dump_max_duration" \
      "${share[@]}" "${given[$i]}" "$m" "${chunked[@]}"
  done
}

# A checkpoint that a killed training was writing has no directory at its end.
is_whole() {
  [ -f "$1" ] && "${python[@]}" -m zipfile -l "$1" > /dev/null 2>&1
}

# train FOLDER FIRST LAST [FLAGS]: those of the epochs FIRST to LAST that are not done.
train() {
  local folder=$1 first=$2 end=$3 e
  shift 3
  alone "$folder"
  for e in $(seq "$end" -1 "$first"); do
    if is_whole "$folder/epoch-$e.pt"; then first=$((e + 1)); break; fi
  done
  if [ "$first" -gt "$end" ]; then log "$folder has its epoch $end"; return; fi
  [ -f "$folder/epoch-$((first - 1)).pt" ] \
    || fail "$folder has no epoch-$((first - 1)).pt: run the stages before this one"
  read_flags "$exp_dir/start/student_flags"
  "${python[@]}" "./$plugged/train.py" --world-size "$world_size" \
    --start-epoch "$first" --num-epochs "$end" --exp-dir "$folder" \
    --manifest-dir "$targets_dir" "${token_flags[@]}" "${train_words[@]}" \
    "${words[@]}" "$@" \
    || fail "the training in $asr_dir/$folder stopped: correct what its message names, and" \
      "give the same command again; it continues after the last whole epoch"
}

# copy_start NAME: a student that continues from the first epochs, common to all.
copy_start() {
  local e f
  mkdir -p "$exp_dir/$1"
  for e in $(seq 1 $((1 + first_epochs))); do
    f=epoch-$e.pt
    if [ ! -f "$exp_dir/$1/$f" ]; then
      [ -f "$exp_dir/start/$f" ] || fail "$exp_dir/start has no $f: run stages 3 and 4"
      cp "$exp_dir/start/$f" "$exp_dir/$1/$f.tmp"
      mv "$exp_dir/$1/$f.tmp" "$exp_dir/$1/$f"
    fi
  done
  if [ -d "$exp_dir/start/log" ]; then cp -r "$exp_dir/start/log" "$exp_dir/$1/"; fi
}

# The decodings that fit the student's heads, in `decodings`; a script that the recipe
# lacks is refused.
choose_scripts() {
  local d name needed=()
  decodings=()
  split decode
  for d in "${words[@]}"; do
    if has_head_for "$d" "${student_model[@]}"; then decodings+=("$d"); fi
  done
  [ "${#decodings[@]}" -gt 0 ] || [ "$stop_stage" -lt 8 ] || fail "--decode is" \
    "'$decode', and the student has no such head: give" \
    "ctc_decode.py:ctc-greedy-search or decode.py:greedy_search"
  split export
  if [ "$stop_stage" -ge 8 ]; then needed+=("${decodings[@]%%:*}"); fi
  if [ "$stop_stage" -ge 9 ]; then needed+=("${words[@]}"); fi
  for name in "${needed[@]}"; do
    if [ "$name" = icefall-kd ]; then need_test_manifests; continue; fi
    [ -f "$recipe/$name" ] || fail "$asr_dir/$recipe has no $name: give --decode" \
      "(now $decode) and --export (now $export) scripts that it has"
  done
}

# What icefall-kd is to decode, or to compare its files on, must be there.
need_test_manifests() {
  local m
  split test_manifests
  [ "${#words[@]}" -gt 0 ] || fail "--test-manifests is empty: name those of" \
    "$asr_dir/$manifest_dir that icefall-kd decodes"
  for m in "${words[@]}"; do
    [ -e "$manifest_dir/$m" ] || fail "$asr_dir/$manifest_dir has no $m: give" \
      "--test-manifests (now $test_manifests) those that icefall-kd decodes"
  done
}

# The student as ONNX and TorchScript, compared on cuts of the first test manifest.
export_by_icefall_kd() {
  local cuts
  split test_manifests
  cuts=$manifest_dir/${words[0]}
  split export_flags
  icefall-kd export --recipe "./$recipe" --exp-dir "$exp_dir/kd" "${token_flags[@]}" \
    --export-dir "$exp_dir/kd/export" --forms torchscript,onnx --check "$cuts" \
    "${student_model[@]}" "${words[@]}" \
    || fail "icefall-kd can't export $asr_dir/$exp_dir/kd: correct what its message" \
      "names, and go on with --stage 9"
}

# decode_models: by each method that a model has a head for, what is not decoded yet; by
# the launcher at the same time, or here one after another.
decode_models() {
  local name d due=() folder epoch average flags mark
  for name in teacher kd no-kd; do
    if [ "$name" = no-kd ] && [ "$baseline" != true ]; then continue; fi
    for d in "${decodings[@]}"; do
      choose_decoding "$name" "$d"
      has_head_for "$d" "${flags[@]}" || continue
      if [ -f "$mark" ]; then
        log "$folder: ${d##*:} is done"
      elif [ -n "$cmd" ]; then
        due+=("decode $name $d")
      else
        decode_job "$name" "$d"
      fi
    done
  done
  if [ "${#due[@]}" -gt 0 ]; then launch decode "$exp_dir/log" 8 "${due[@]}"; fi
}

# choose_decoding MODEL DECODING: the model's folder, epoch, average and flags, and the
# file that marks the decoding as done, as variables of these names.
choose_decoding() {
  local model_name
  if [ "$1" = teacher ]; then
    folder=$teacher_exp_dir epoch=$teacher_epoch average=$teacher_avg
    flags=("${teacher_model[@]}")
  else
    folder=$exp_dir/$1 epoch=$last average=$avg
    flags=("${student_model[@]}")
  fi
  model_name=.epoch-$epoch-avg-$average
  if is_causal "${flags[@]}"; then
    flags+=("${chunks[@]}")
    model_name+=-chunk-$chunk_size-left-$left_context_frames
  fi
  mark=$folder/${2##*:}/$model_name.done
  if [ "${2%%:*}" = icefall-kd ]; then mark=${mark%.done}-icefall-kd.done; fi
}

# decode_job MODEL DECODING: one model, teacher, kd or no-kd, by one method.
decode_job() {
  local folder epoch average flags mark name=${2%%:*} method=${2##*:} decode_words
  choose_decoding "$1" "$2"
  log "$folder: $method"
  split decode_flags
  decode_words=("${words[@]}")
  if [ "$name" = icefall-kd ]; then
    decode_by_icefall_kd "$folder" "$method" "${flags[@]}" "${decode_words[@]}"
    touch "$mark"
    return
  fi
  if [ "$name" = ctc_decode.py ]; then
    split ctc_decode_flags
    decode_words=(--lang-dir "$(dirname "$tokens_file")" "${decode_words[@]}"
      "${words[@]}")
  fi
  take_flags "$recipe/$name" "${flags[@]}" "${decode_words[@]}"
  "${python[@]}" "./$recipe/$name" --exp-dir "$folder" --decoding-method "$method" \
    --manifest-dir "$manifest_dir" "${token_flags[@]}" "${words[@]}" \
    || fail "$name can't decode $asr_dir/$folder by $method: correct what its message names," \
      "and go on with --stage 8"
  touch "$mark"
}

# decode_by_icefall_kd FOLDER METHOD FLAG...: each of the test manifests.
decode_by_icefall_kd() {
  local folder=$1 method=$2 m test_words
  shift 2
  split test_manifests
  test_words=("${words[@]}")
  for m in "${test_words[@]}"; do
    icefall-kd decode --recipe "./$recipe" --exp-dir "$folder" \
      --decoding-method "$method" --cuts "$manifest_dir/$m" --unit "$unit" \
      "${token_flags[@]}" "$@" \
      || fail "icefall-kd can't decode $asr_dir/$folder by $method: correct what its" \
        "message names, and go on with --stage 8"
  done
}

# take_flags SCRIPT FLAG...: the flags, as the array `words`; without --context-size and
# its value where the script has no such option, as icefall's ctc_decode.py.
take_flags() {
  local file=$1
  shift
  words=()
  while [ $# -gt 0 ]; do
    if [ "$1" = --context-size ] && ! grep -q -e '"--context-size"' "$file"; then
      shift 2
    else
      words+=("$1")
      shift
    fi
  done
}
