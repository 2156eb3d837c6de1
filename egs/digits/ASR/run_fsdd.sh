#!/usr/bin/env bash
# The experiments of RESULTS.md: real digits, several seeds, a held-out speaker.
# About 45 minutes a seed on one core; seeds run side by side.
# Usage: ./run_fsdd.sh --corpus-dir DIR [--work-dir work/fsdd] [--seeds "1 2 3"]
set -eou pipefail
caller=$PWD
script=$(realpath "${BASH_SOURCE[0]}")
cd "$(dirname "$script")"

# Options
corpus_dir=          # folder of the recordings of the Free Spoken Digit Dataset
work_dir=work/fsdd   # results go here
seeds="1 2 3"       # of corpora, teachers and students
num_jobs=2          # runs at the same time, each on one core
test_speaker=theo   # held out for test
untranscribed_speakers=nicolas,yweweler  # in the third experiment

help_message="Usage: $0 --corpus-dir DIR [--option value ...]"
renamed="jobs:num_jobs"

. shared/parse_options.sh
. shared/check_options.sh
check_numbers 1 num_jobs
check_list seeds
. shared/threads.sh
. shared/stoppable.sh

[ -n "$corpus_dir" ] || { echo "run_fsdd.sh: error: --corpus-dir is missing, the" \
  "folder of the Free Spoken Digit Dataset's recordings" >&2; exit 1; }
if [ -d "$caller/$corpus_dir" ]; then corpus_dir=$(cd "$caller/$corpus_dir" && pwd); fi
run ./run.sh --stage 0 --stop-stage 0 --work-dir "$work_dir/environment"
if [ -f ../../../.venv/bin/activate ]; then . ../../../.venv/bin/activate; fi
mkdir -p "$work_dir/log"

one_seed() {
  local seed=$1 base=$work_dir/seed-$1
  local common=(--corpus fsdd --corpus-dir "$corpus_dir" --test-speaker "$test_speaker"
    --seed "$seed" --num-threads 1 --kd-config conf/ctc.yaml --stop-stage 9)
  local half=(--untranscribed-speakers "$untranscribed_speakers" --num-train 800)
  local from_random=(--student-init random --student-epochs 3 --teacher-work-dir "$base")
  run ./run.sh "${common[@]}" --work-dir "$base" --student-epochs 1 --long-factor 3
  run ./run.sh "${common[@]}" "${from_random[@]}" --work-dir "$base-random" \
    --long-factor 3
  run ./run.sh "${common[@]}" "${from_random[@]}" "${half[@]}" --work-dir "$base-half"
}
export OMP_NUM_THREADS=1
pids=()
for seed in $seeds; do
  while [ "$(jobs -rp | wc -l)" -ge "$num_jobs" ]; do sleep 2; done
  echo "seed $seed: log in $work_dir/log/seed-$seed"
  in_background one_seed "$seed" >> "$work_dir/log/seed-$seed" 2>&1
  pids+=($!)
done
for pid in "${pids[@]}"; do
  wait "$pid" || { echo "run_fsdd.sh: error: a seed failed, see the last lines of" \
    "$work_dir/log/seed-*: mend it and start again, what is done is kept" >&2; exit 1; }
done
./local/results_table.py --work-dir "$work_dir" --seeds "$seeds" | tee "$work_dir/table.md"
