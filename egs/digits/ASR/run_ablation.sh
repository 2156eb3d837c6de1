#!/usr/bin/env bash
# Each loss alone, and the default mix, beside the students of run_fsdd.sh: the same
# teachers, first parameters, steps and seeds. About 5 minutes a run on one core.
# Usage, when run_fsdd.sh has run: ./run_ablation.sh [--work-dir work/fsdd]
set -eou pipefail
script=$(realpath "${BASH_SOURCE[0]}")
cd "$(dirname "$script")"

# Options
work_dir=work/fsdd   # the work folder of run_fsdd.sh
seeds="1 2 3"       # of the students
variants="ctc symmetric rnnt collapsed path total full_sum hidden nbest mix"  # losses to train with
num_jobs=2          # runs at the same time, each on one core
half_step=312   # of 626; a multiple of 6, for the average over the last sixth

help_message="Usage: $0 [--option value ...]"
renamed="jobs:num_jobs"

. shared/parse_options.sh
. shared/check_options.sh
check_numbers 1 num_jobs
check_numbers 6 half_step
check_list seeds
. shared/threads.sh
. shared/stoppable.sh
. local/training.sh

if [ -f ../../../.venv/bin/activate ]; then . ../../../.venv/bin/activate; fi
export OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=${TORCHDYNAMO_DISABLE:-1}
. local/experiments.sh

# flags_of VARIANT: the cuts that it trains on, and its flags.
flags_of() {
  case $1 in
    none) echo "kd" ;;
    ctc) echo "kd --kd-ctc-weight 1" ;;
    symmetric) echo "kd --kd-ctc-weight 1 --kd-ctc-frame-weighting symmetric" ;;
    rnnt) echo "kd --kd-rnnt-weight 1" ;;
    collapsed) echo "kd --kd-rnnt-weight 1 --kd-rnnt-form collapsed" ;;
    path) echo "kd-path --kd-rnnt-weight 1" ;;
    total) echo "kd --kd-rnnt-weight 1 --kd-rnnt-form total" ;;
    full_sum) echo "kd --kd-full-sum-weight 0.1" ;;
    hidden) echo "kd --kd-hidden-weight 10 --kd-hidden-layers out:out" \
      "--kd-hidden-distance cosine" ;;
    nbest) echo "kd-nbest --kd-nbest-weight 0.5" ;;
    mix) echo "kd --kd-config conf/kd.yaml" ;;
    *) echo "run_ablation.sh: error: there is no variant $1" >&2; exit 1 ;;
  esac
}

# one SEED VARIANT: train and decode a student.
one() {
  local seed=$1 out=$work_dir/ablation/seed-$1/exp-$2
  local start=$work_dir/seed-$1-random/exp/student set flags student
  [ ! -f "$out/done" ] || return 0
  [ -f "$out/epoch-1.pt" ] || copy_student "$start" "$out"
  read -r set flags <<< "$(flags_of "$2")"
  read -r -a flags <<< "$flags"
  read -r -a student < "$out/student_flags"
  local mark common=(--num-threads 1
    --bpe-model "$work_dir/seed-$seed/data/lang_bpe_54/bpe.model")
  train "$out" 2 4 "${common[@]}" --seed "$seed" --save-every-n $((half_step / 6)) \
    --manifest-dir "$work_dir/ablation/seed-$seed/$set" "${student[@]}" "${flags[@]}"
  for method in ctc-greedy-search greedy_search; do
    for checkpoint in "--epoch 4" "--iter $half_step"; do
      mark=$out/.decoded-$method-$(tr -d ' ' <<< "$checkpoint")
      if [ -f "$mark" ]; then continue; fi
      # shellcheck disable=SC2086
      run ./zipformer/decode.py --exp-dir "$out" "${common[@]}" $checkpoint --avg 1 \
        --manifest-dir "$work_dir/seed-$seed-random/data/fbank" \
        --decoding-method "$method"
      touch "$mark"
    done
  done
  touch "$out/done"
}

for variant in $variants; do flags_of "$variant" > /dev/null; done
mkdir -p "$work_dir/ablation"
alone "$work_dir/ablation"
for seed in $seeds; do start "$work_dir/ablation" targets "$seed"; done
finished
for variant in $variants; do
  for seed in $seeds; do start "$work_dir/ablation" one "$seed" "$variant"; done
done
finished
./local/ablation_table.py --work-dir "$work_dir" --seeds "$seeds" \
  --variants "$variants" --half-step "$half_step" | tee "$work_dir/ablation/table.md"
