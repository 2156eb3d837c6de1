#!/usr/bin/env bash
# Streaming students with an offline teacher, and how late --kd-ctc-delay lets them be:
# the teacher of run_fsdd.sh's first seed, students from random parameters with chunks
# of 160 ms. About 5 minutes a run on one core.
# Usage, when run_fsdd.sh has run: ./run_streaming.sh [--work-dir work/fsdd]
set -eou pipefail
script=$(realpath "${BASH_SOURCE[0]}")
cd "$(dirname "$script")"

# Options
work_dir=work/fsdd   # the work folder of run_fsdd.sh
seeds="1 2 3"       # of the students
variants="none d0 d1 d2 d4"   # none: hard labels alone; dN: CTC frames, delay N
num_jobs=2          # runs at the same time, each on one core

help_message="Usage: $0 [--option value ...]"
renamed="jobs:num_jobs"

. shared/parse_options.sh
. shared/check_options.sh
check_numbers 1 num_jobs
check_list seeds
. shared/threads.sh
. shared/stoppable.sh
. local/training.sh

for variant in $variants; do
  [[ $variant =~ ^(none|d[0-9]+)$ ]] || {
    echo "run_streaming.sh: error: there is no variant $variant: give none, or d and" \
      "the delay in frames" >&2
    exit 1
  }
done
if [ -f ../../../.venv/bin/activate ]; then . ../../../.venv/bin/activate; fi
export OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=${TORCHDYNAMO_DISABLE:-1}
. local/experiments.sh

base=$work_dir/seed-1
[ -f "$base/data/kd/cuts_train.jsonl.gz" ] || {
  echo "run_streaming.sh: error: $base has no targets: let run_fsdd.sh finish seed 1" >&2
  exit 1
}

# one SEED VARIANT: train a student; what epochs it has are kept.
one() {
  local manifests=$base/data/kd kd=()
  if [ "$2" = none ]; then
    manifests=$base/data/fbank
  else
    kd=(--kd-ctc-weight 1 --kd-ctc-delay "${2#d}")
  fi
  train "$work_dir/streaming/seed-$1/exp-$2" 1 3 --num-threads 1 --seed "$1" \
    --bpe-model "$base/data/lang_bpe_54/bpe.model" --manifest-dir "$manifests" \
    --causal 1 --chunk-size 8 --left-context-frames 64 --encoder-dim 32,32,32 \
    --encoder-unmasked-dim 32,32,32 --num-encoder-layers 1,1,1 \
    --feedforward-dim 64,64,64 --decoder-dim 64 --joiner-dim 64 "${kd[@]}"
}

mkdir -p "$work_dir/streaming"
alone "$work_dir/streaming"
for seed in $seeds; do
  for variant in $variants; do start "$work_dir/streaming" one "$seed" "$variant"; done
done
finished
./local/streaming_table.py --work-dir "$work_dir" --seeds "$seeds" \
  --variants "$variants" | tee "$work_dir/streaming/table.md"
