#!/usr/bin/env bash
# Students that start from their teacher's slices beside students that start from random
# parameters, with KD and without: how many steps each needs for a WER. About 5 minutes
# a run on one core; it uses the students of run_fsdd.sh, and targets as run_ablation.sh
# makes them.
# Usage, when run_fsdd.sh has run: ./run_slices.sh [--work-dir work/fsdd]
set -eou pipefail
script=$(realpath "${BASH_SOURCE[0]}")
cd "$(dirname "$script")"

# Options
work_dir=work/fsdd   # the work folder of run_fsdd.sh
seeds="1 2 3"       # of the students
starts="random first important"   # parameters; slices: which channels and layers
losses="none mix"                  # KD: without, or conf/kd.yaml
num_jobs=2          # runs at the same time, each on one core
every=50        # steps between two points of the curve

help_message="Usage: $0 [--option value ...]"
renamed="jobs:num_jobs kinds:losses"

. shared/parse_options.sh
. shared/check_options.sh
check_numbers 1 num_jobs every
check_list seeds
. shared/threads.sh
. shared/stoppable.sh
. local/training.sh

if [ -f ../../../.venv/bin/activate ]; then . ../../../.venv/bin/activate; fi
export OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=${TORCHDYNAMO_DISABLE:-1}
. local/experiments.sh
out=$work_dir/slices

# one SEED START LOSS: build and train a student, and draw its curve.
one() {
  local seed=$1 exp=$out/seed-$1/exp-$2-$3 base=$work_dir/seed-$1
  local random=$work_dir/seed-$1-random settings change flags student
  local bpe=$base/data/lang_bpe_54/bpe.model fbank=$random/data/fbank
  [ ! -f "$exp/done" ] || return 0
  if [ -f "$exp/epoch-1.pt" ]; then
    :  # it was stopped later
  elif [ "$2" = random ]; then
    copy_student "$random/exp/student" "$exp"
  else
    settings=()
    for change in encoder-dim=32,32,32 encoder-unmasked-dim=32,32,32 \
      num-encoder-layers=1,1,1 feedforward-dim=64,64,64 decoder-dim=64 joiner-dim=64; do
      settings+=(--set "$change")
    done
    [ "$2" = first ] || settings+=(--layers important --channels important)
    run icefall-kd student --recipe ./zipformer --exp-dir "$base/exp/teacher" --epoch 10 \
      --bpe-model "$bpe" --student-dir "$exp" --seed "$seed" "${settings[@]}" \
      --cuts "$fbank/cuts_train.jsonl.gz"
  fi
  read -r -a student < "$exp/student_flags"
  flags=()
  [ "$3" = none ] || flags=(--kd-config conf/kd.yaml)
  train "$exp" 2 4 --bpe-model "$bpe" --num-threads 1 --seed "$seed" \
    --save-every-n "$every" \
    --manifest-dir "$work_dir/ablation/seed-$seed/kd" "${student[@]}" \
    "${flags[@]}"
  run ./local/learning_curve.py --exp-dir "$exp" --bpe-model "$bpe" \
    --cuts "$fbank/cuts_test.jsonl.gz" --json "$exp/curve.json"
  touch "$exp/done"
}

mkdir -p "$out" "$work_dir/ablation"
alone "$work_dir/ablation"  # whose targets it makes and uses
for seed in $seeds; do start "$out" targets "$seed"; done
finished
for loss in $losses; do
  for start in $starts; do
    for seed in $seeds; do start "$out" one "$seed" "$start" "$loss"; done
  done
done
finished
./local/curves_table.py --dir "$out" --seeds "$seeds" --starts "$starts" \
  --losses "$losses" | tee "$out/table.md"
