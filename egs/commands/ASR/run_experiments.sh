#!/usr/bin/env bash
# The experiments of RESULTS.md: students of two sizes trained to the end, in several
# ways (conf/runs.txt), with several seeds. Students train side by side.
# Usage: ./run_experiments.sh --corpus-dir DIR [--runs "none kd"] [--seeds "1 2 3"]
set -eou pipefail
caller=$PWD
script=$(realpath "${BASH_SOURCE[0]}")
cd "$(dirname "$script")"

# Options
corpus_dir=         # your clone of the corpus
work_dir=work       # results go here
runs="none cr-ctc kd kd-cr-ctc part part-kd slices slices-kd"  # names in conf/runs.txt
sizes="s xs"        # of students: s has 0.15 M parameters, xs 0.07 M
seeds="1 2 3"       # of the students
test=false          # true: decode the test speakers too, when all is decided
num_jobs=2          # trainings at the same time, each on one core

help_message="Usage: $0 --corpus-dir DIR [--option value ...]"

. shared/parse_options.sh
. shared/check_options.sh
check_numbers 1 num_jobs
check_list seeds
check_switch test
. shared/threads.sh
. shared/stoppable.sh
. local/training.sh
avg=3
num_threads=1

fail() {
  echo "run_experiments.sh: error: $*" >&2
  exit 1
}

declare -A starts cuts_of flags_of
while read -r name start cuts flags; do
  [[ -z $name || $name = "#"* ]] && continue
  starts[$name]=$start cuts_of[$name]=$cuts flags_of[$name]=$flags
done < conf/runs.txt
for name in $runs; do
  [ -n "${starts[$name]-}" ] || fail "--runs names $name, and conf/runs.txt has" \
    "$(printf '%s\n' "${!starts[@]}" | sort | xargs)"
done
if [ -n "$corpus_dir" ] && [ -d "$caller/$corpus_dir" ]; then
  corpus_dir=$(cd "$caller/$corpus_dir" && pwd)
fi

# The settings of a student of each size that differ from its teacher's.
settings_of() {
  local common="num-encoder-layers=1,1,1"
  case $1 in
    s) echo "$common embed-channels=8,16,32 encoder-dim=32,32,32" \
      "encoder-unmasked-dim=32,32,32 feedforward-dim=64,64,64 decoder-dim=48" \
      "joiner-dim=48 num-heads=3,3,3" ;;
    xs) echo "$common embed-channels=4,8,16 encoder-dim=16,24,24" \
      "encoder-unmasked-dim=16,24,24 feedforward-dim=48,64,64 decoder-dim=32" \
      "joiner-dim=32 num-heads=2,2,2 query-head-dim=8 value-head-dim=8" ;;
    *) fail "--sizes names $1, and must be of s and xs" ;;
  esac
}
for size in $sizes; do settings_of "$size" > /dev/null; done

# Twelve of the training speakers have no transcripts in the second experiment.
untranscribed=00000015,00000016,00000017,00000018,00000019,00000020,00000022
untranscribed+=,00000023,00000024,00000027,00000029,00000030
base=$work_dir/base part=$work_dir/part
common=(--seed 1 --corpus-dir "$corpus_dir" --stop-stage 5
  --dump-flags "--keep-lattice dense --keep-hidden out:half --keep-simple dense")
run ./run.sh "${common[@]}" --work-dir "$base"
if [[ " $runs" = *" part"* ]]; then
  run ./run.sh "${common[@]}" --work-dir "$part" --teacher-work-dir "$base" \
    --untranscribed-speakers "$untranscribed" --num-train 667 --num-untranscribed 1333
fi
if [ -f ../../../.venv/bin/activate ]; then . ../../../.venv/bin/activate; fi
teacher=$base/exp/teacher bpe=$base/data/lang_bpe_120/bpe.model
epoch=$(last_epoch "$teacher" 25)
teacher_flags=(--recipe ./zipformer --exp-dir "$teacher" --epoch "$epoch"
  --avg "$(averaged "$epoch")" --bpe-model "$bpe")

# one RUN SIZE SEED: make a student, train it to the end, decode it.
one() {
  local folder=$work_dir/exp/$1-$2/seed-$3 name=$1 size=$2 seed=$3 init=random sets=train
  local cuts=$base/data/fbank changes=() change flags first words method
  mkdir -p "$folder"
  if [ "${starts[$name]}" = slices ]; then init=teacher; fi
  for change in $(settings_of "$size"); do changes+=(--set "$change"); done
  [ -f "$folder/epoch-1.pt" ] || run icefall-kd student "${teacher_flags[@]}" \
    --student-dir "$folder" "${changes[@]}" --init "$init" --seed "$seed"
  read -r -a flags < "$folder/student_flags"
  read -r -a words <<< "${flags_of[$name]}"
  if [[ " ${words[*]} " = *" --kd-"* ]]; then cuts=$base/data/kd; fi
  case ${cuts_of[$name]} in
    part) cuts=$part/data/fbank ;;
    both) cuts=$part/data/kd sets=train,train-labelled ;;
  esac
  train "$folder" 2 60 --manifest-dir "$cuts" --train-set "$sets" --bpe-model "$bpe" \
    --seed "$seed" --num-threads "$num_threads" --sample-rate 16000 --avg "$avg" \
    --max-duration 15 --lr-epochs 3.5 --save-every-n 1000000 --patience 6 \
    "${flags[@]}" "${words[@]}"
  decode "$folder" dev
  if [ "$test" = true ]; then decode "$folder" test; fi
}

# decode FOLDER SET: with both heads, the best epoch.
decode() {
  local folder=$1 set=$2 epoch method
  epoch=$(last_epoch "$folder" 60)
  for method in ctc-greedy-search greedy_search; do
    [ -f "$folder/.$set.$method.$epoch" ] && continue
    run ./zipformer/decode.py --exp-dir "$folder" --epoch "$epoch" \
      --avg "$(averaged "$epoch")" --manifest-dir "$base/data/fbank" \
      --bpe-model "$bpe" --decoding-method "$method" --test-set "$set" \
      --num-threads "$num_threads"
    touch "$folder/.$set.$method.$epoch"
  done
}

export OMP_NUM_THREADS=1
mkdir -p "$work_dir/log"
. local/experiments.sh
for seed in $seeds; do
  for size in $sizes; do
    for name in $runs; do
      start "$work_dir/log" one "$name" "$size" "$seed"
    done
  done
done
finished
