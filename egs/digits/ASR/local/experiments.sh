# What run_ablation.sh, run_slices.sh and run_streaming.sh share, after
# shared/stoppable.sh; they set work_dir and num_jobs.

# targets SEED: the targets of the training cuts, in three sets.
targets() {
  local base=$work_dir/seed-$1 out=$work_dir/ablation/seed-$1
  local cuts=cuts_train.jsonl.gz fbank=$work_dir/seed-$1-random/data/fbank
  local teacher=(--exp-dir "$base/exp/teacher" --epoch 10 --avg 1
    --bpe-model "$base/data/lang_bpe_54/bpe.model" --num-threads 1)
  [ ! -f "$out/.targets" ] || return 0
  mkdir -p "$out"/kd "$out"/kd-path "$out"/kd-nbest
  run icefall-kd dump --recipe ./zipformer "${teacher[@]}" --keep-lattice dense \
    --keep-hidden out:half "$fbank/$cuts" "$out/kd/$cuts"
  run icefall-kd dump --recipe ./zipformer "${teacher[@]}" --keep-lattice path:dense \
    "$fbank/$cuts" "$out/kd-path/$cuts"
  [ -f "$out/kd-nbest/$cuts" ] \
    || run ./local/nbest_cuts.py "${teacher[@]}" "$out/kd/$cuts" "$out/kd-nbest/$cuts"
  for set in kd kd-path kd-nbest; do
    cp "$fbank/cuts_dev.jsonl.gz" "$out/$set/"
  done
  touch "$out/.targets"
}

failed=$(mktemp -u)
trap 'stop_jobs; rm -f "$failed"' EXIT
# start DIR FUNCTION ARGS: in the background, when one of the jobs is free; its log in DIR.
start() {
  logs=$1
  local log
  log=$logs/$(tr ' ' - <<< "${*:2}").log
  while [ "$(jobs -rp | wc -l)" -ge "$num_jobs" ]; do sleep 2; done
  echo "${*:2}: log in $log"
  # No `wait PID`: a long run may see the number of a process a second time.
  (stoppable
    trap '[ $? -eq 0 ] || touch "$failed"; stop_jobs' EXIT
    "${@:2}") >> "$log" 2>&1 &
}

finished() {
  wait
  [ ! -e "$failed" ] || { echo "${0##*/}: error: a run failed, see the last lines of" \
    "$logs/*.log: mend it and start again, what is done is kept" >&2
    exit 1; }
}
