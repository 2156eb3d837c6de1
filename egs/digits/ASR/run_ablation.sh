#!/usr/bin/env bash
# Each loss alone, and the default mix, beside the students of run_fsdd.sh: the same
# teachers, first parameters, steps and seeds. About 5 minutes a run on one core.
# Usage, when run_fsdd.sh has run: ./run_ablation.sh [--work-dir work/fsdd]
set -eou pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

work_dir=work/fsdd
seeds="1 2 3"
variants="ctc symmetric rnnt collapsed path total full_sum hidden nbest mix"
jobs=2
half_step=312   # of 626; a multiple of 6, for the average over the last sixth
help_message="Usage: $0 [--work-dir work/fsdd] [--seeds '1 2 3'] [--jobs 2]
  [--variants '$variants']"

. shared/parse_options.sh

if [ -f ../../../.venv/bin/activate ]; then . ../../../.venv/bin/activate; fi
export OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=${TORCHDYNAMO_DISABLE:-1}

# flags_of VARIANT: the cuts that it trains on, and its flags.
flags_of() {
  case $1 in
    none) echo "kd" ;;
    ctc) echo "kd --kd-ctc-weight 1" ;;
    symmetric) echo "kd --kd-ctc-weight 1 --kd-ctc-frames symmetric" ;;
    rnnt) echo "kd --kd-rnnt-weight 1" ;;
    collapsed) echo "kd --kd-rnnt-weight 1 --kd-rnnt-form collapsed" ;;
    path) echo "kd-path --kd-rnnt-weight 1" ;;
    total) echo "kd --kd-rnnt-weight 1 --kd-rnnt-form total" ;;
    full_sum) echo "kd --kd-full-sum-weight 0.1" ;;
    hidden) echo "kd --kd-hidden-weight 10 --kd-hidden-layers out:out" \
      "--kd-hidden-kind cosine" ;;
    nbest) echo "kd-nbest --kd-nbest-weight 0.5" ;;
    mix) echo "kd --kd-config conf/kd.yaml" ;;
    *) echo "run_ablation.sh: error: there is no variant $1" >&2; exit 1 ;;
  esac
}

# targets SEED: what the teacher says on the training cuts, in three sets.
targets() {
  local base=$work_dir/seed-$1 out=$work_dir/ablation/seed-$1
  local cuts=digits_cuts_train.jsonl.gz fbank=$work_dir/seed-$1-random/data/fbank
  local teacher=(--exp-dir "$base/exp/teacher" --epoch 10 --avg 1
    --bpe-model "$base/data/lang_bpe_54/bpe.model" --num-threads 1)
  [ ! -f "$out/.targets" ] || return 0
  mkdir -p "$out"/kd "$out"/kd-path "$out"/kd-nbest
  icefall-kd dump --recipe ./zipformer "${teacher[@]}" --keep-lattice dense \
    --keep-hidden out:half "$fbank/$cuts" "$out/kd/$cuts"
  icefall-kd dump --recipe ./zipformer "${teacher[@]}" --keep-lattice path:dense \
    "$fbank/$cuts" "$out/kd-path/$cuts"
  ./local/nbest_cuts.py "${teacher[@]}" "$out/kd/$cuts" "$out/kd-nbest/$cuts"
  for set in kd kd-path kd-nbest; do
    cp "$fbank/digits_cuts_dev.jsonl.gz" "$out/$set/"
  done
  touch "$out/.targets"
}

# one SEED VARIANT: train and decode a student.
one() {
  local seed=$1 out=$work_dir/ablation/seed-$1/exp-$2
  local start=$work_dir/seed-$1-random/exp/student set flags student
  [ ! -f "$out/done" ] || return 0
  rm -rf "$out" && mkdir -p "$out"
  cp "$start/epoch-1.pt" "$start/student_flags" "$out/"
  read -r set flags <<< "$(flags_of "$2")"
  read -r -a flags <<< "$flags"
  read -r -a student < "$out/student_flags"
  local common=(--exp-dir "$out" --num-threads 1
    --bpe-model "$work_dir/seed-$seed/data/lang_bpe_54/bpe.model")
  ./zipformer/train.py "${common[@]}" --seed "$seed" --start-epoch 2 --num-epochs 4 \
    --save-every-n $((half_step / 6)) \
    --manifest-dir "$work_dir/ablation/seed-$seed/$set" "${student[@]}" "${flags[@]}"
  for method in ctc-greedy-search greedy_search; do
    for checkpoint in "--epoch 4" "--iter $half_step"; do
      # shellcheck disable=SC2086
      ./zipformer/decode.py "${common[@]}" $checkpoint --avg 1 \
        --manifest-dir "$work_dir/seed-$seed-random/data/fbank" \
        --decoding-method "$method"
    done
  done
  touch "$out/done"
}

pids=()
run() {
  while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do sleep 2; done
  echo "$*: log in $work_dir/ablation/$1-$2${3:+-$3}.log"
  "$@" > "$work_dir/ablation/$1-$2${3:+-$3}.log" 2>&1 &
  pids+=($!)
}
finished() {
  for pid in ${pids[@]+"${pids[@]}"}; do
    wait "$pid" || { echo "run_ablation.sh: error: a run failed, see the last lines" \
      "of $work_dir/ablation/*.log: mend it and start again, what is done is kept" >&2
      exit 1; }
  done
  pids=()
}
for variant in $variants; do flags_of "$variant" > /dev/null; done
mkdir -p "$work_dir/ablation"
for seed in $seeds; do run targets "$seed"; done
finished
for variant in $variants; do
  for seed in $seeds; do run one "$seed" "$variant"; done
done
finished
./local/ablation_table.py --work-dir "$work_dir" --seeds "$seeds" \
  --variants "$variants" --half-step "$half_step" | tee "$work_dir/ablation/table.md"
