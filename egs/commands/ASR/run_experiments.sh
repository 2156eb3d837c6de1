#!/usr/bin/env bash
# The experiments of RESULTS.md: students of two sizes trained to the end, in several
# ways (conf/runs.txt), with several seeds, and a report on each size. Students train
# side by side.
# Usage: ./run_experiments.sh --corpus-dir DIR [--runs "none kd"] [--seeds "1 2 3"]
set -eou pipefail
caller=$PWD
script=$(realpath "${BASH_SOURCE[0]}")
cd "$(dirname "$script")"

# Options
stage=1             # first stage
stop_stage=3        # last stage
corpus_dir=         # your clone of the corpus
work_dir=work       # results go here
runs="none cr-ctc kd kd-cr-ctc part part-kd"  # names in conf/runs.txt
sizes="s xs"        # of students: s has 0.15 M parameters, xs 0.07 M
seeds="1 2 3"       # of the students
epochs=36           # of a student at most, if --num-epochs in conf/runs.txt says no other
test=false          # true: decode the test speakers too, when all is decided
num_jobs=2          # trainings at the same time, each on one core
run_flags=          # more options of run.sh, for the teacher, such as "--num-train 100"

help_message="Usage: $0 --corpus-dir DIR [--option value ...]
Stages: 1 teacher and targets, 2 students, 3 reports. What is done is kept."

. shared/parse_options.sh
. shared/check_options.sh
check_numbers 1 stage stop_stage num_jobs epochs
check_list seeds
check_switch test
. shared/threads.sh
. shared/stoppable.sh
. local/training.sh
. conf/corpus.sh
num_threads=1
# The students of run.sh still get better when it stops.
student_epochs=$epochs patience=5
read -r -a train_words <<< "$train_flags"

fail() {
  echo "run_experiments.sh: error: $*" >&2
  exit 1
}

declare -A starts cuts_of flags_of
while read -r name start cuts flags; do
  [[ -z $name || $name = "#"* ]] && continue
  starts[$name]=$start cuts_of[$name]=$cuts flags_of[$name]=$flags
done < conf/runs.txt
for option in runs sizes seeds; do
  read -r -a words <<< "${!option}"
  [ ${#words[@]} -gt 0 ] || fail "--$option is empty: name one or more"
  twice=$(printf '%s\n' "${words[@]}" | sort | uniq -d)
  [ -z "$twice" ] || fail "--$option names ${twice//$'\n'/ } twice: name it once"
done
for name in $runs; do
  [ -n "${starts[$name]-}" ] || fail "--runs names $name, and conf/runs.txt has" \
    "$(printf '%s\n' "${!starts[@]}" | sort | xargs)"
done
if [ -n "$corpus_dir" ] && [ -d "$caller/$corpus_dir" ]; then
  corpus_dir=$(cd "$caller/$corpus_dir" && pwd)
fi

# The settings of a student of each size that differ from its teacher's.
declare -A settings_of=([s]=$student_set)
settings_of[xs]="embed-channels=4,8,16 encoder-dim=16,24,24 \
encoder-unmasked-dim=16,24,24 num-encoder-layers=1,1,1 feedforward-dim=48,64,64 \
decoder-dim=32 joiner-dim=32 num-heads=2,2,2 query-head-dim=8 value-head-dim=8"
for size in $sizes; do
  [ -n "${settings_of[$size]-}" ] || fail "--sizes names $size, and must be of s and xs"
  # Slices keep the width of the teacher's heads.
  [[ ${settings_of[$size]} = *-head-dim=* ]] || continue
  for name in $runs; do
    [ "${starts[$name]}" != slices ] || fail "--runs names $name, whose students start" \
      "from slices of the teacher, and --sizes names $size, whose heads are narrower" \
      "than the teacher's: leave one of them out"
  done
done

# Twelve of the training speakers have no transcripts in the second experiment.
untranscribed=00000015,00000016,00000017,00000018,00000019,00000020,00000022
untranscribed+=,00000023,00000024,00000027,00000029,00000030
base=$work_dir/base part=$work_dir/part
if [ "$stage" -le 1 ] && [ "$stop_stage" -ge 1 ]; then
  read -r -a more <<< "$run_flags"
  common=(--seed 1 --corpus-dir "$corpus_dir" --stop-stage 5
    --dump-flags "--keep-lattice dense --keep-hidden out:half --keep-simple dense"
    "${more[@]}")
  run ./run.sh "${common[@]}" --work-dir "$base"
  if [[ " $runs" = *" part"* ]]; then
    run ./run.sh "${common[@]}" --work-dir "$part" --teacher-work-dir "$base" \
      --untranscribed-speakers "$untranscribed" \
      --num-train "$((num_train / 3))" --num-untranscribed "$((num_train * 2 / 3))"
  fi
fi
if [ -f ../../../.venv/bin/activate ]; then . ../../../.venv/bin/activate; fi
teacher=$base/exp/teacher bpe=$(echo "$base"/data/lang_bpe_*/bpe.model)
[ -f "$base/exp/.5.done" ] || fail "$base has no teacher with targets: run stage 1"
epoch=$(last_epoch "$teacher" "$teacher_epochs")
teacher_flags=(--recipe ./zipformer --exp-dir "$teacher" --epoch "$epoch"
  --avg "$(averaged "$epoch")" --bpe-model "$bpe")
sets=dev
if [ "$test" = true ]; then sets="dev test"; fi

# one RUN SIZE SEED: make a student, train it to the end, decode it.
one() {
  local folder=$work_dir/exp/$1-$2/seed-$3 name=$1 size=$2 seed=$3 init=random
  local cuts=$base/data/fbank train_sets=train changes=() change flags words set
  mkdir -p "$folder"
  if [ "${starts[$name]}" = slices ]; then init=teacher; fi
  for change in ${settings_of[$size]}; do changes+=(--set "$change"); done
  [ -f "$folder/epoch-1.pt" ] || run icefall-kd student "${teacher_flags[@]}" \
    --student-dir "$folder" "${changes[@]}" --init "$init" --seed "$seed"
  read -r -a flags < "$folder/student_flags"
  read -r -a words <<< "${flags_of[$name]}"
  if [[ " ${words[*]} " = *" --kd-"* ]]; then cuts=$base/data/kd; fi
  case ${cuts_of[$name]} in
    part) cuts=$part/data/fbank ;;
    both) cuts=$part/data/kd train_sets=train,train-labelled ;;
  esac
  train "$folder" 2 "$student_epochs" --manifest-dir "$cuts" \
    --train-set "$train_sets" --bpe-model "$bpe" --seed "$seed" \
    --num-threads "$num_threads" --sample-rate 16000 --avg "$avg" \
    --patience "$patience" "${train_words[@]}" "${flags[@]}" "${words[@]}"
  for set in $sets; do decode "$folder" "$set"; done
}

# decode FOLDER SET: with both heads, the best epoch.
decode() {
  local folder=$1 set=$2 epoch method
  epoch=$(last_epoch "$folder" "$student_epochs")
  for method in ctc-greedy-search greedy_search; do
    [ -f "$folder/.$set.$method.$epoch" ] && continue
    run ./zipformer/decode.py --exp-dir "$folder" --epoch "$epoch" \
      --avg "$(averaged "$epoch")" --manifest-dir "$base/data/fbank" \
      --bpe-model "$bpe" --decoding-method "$method" --test-set "$set" \
      --num-threads "$num_threads"
    touch "$folder/.$set.$method.$epoch"
  done
}

# report_on SIZE: the teacher beside the students of a size.
report_on() {
  local models=(--model "teacher=$teacher") name seed folder set first
  read -r first _ <<< "$runs"
  for name in $runs; do
    for seed in $seeds; do
      folder=$work_dir/exp/$name-$1/seed-$seed
      for set in $sets; do
        [ -f "$folder/.$set.greedy_search.$(last_epoch "$folder" "$student_epochs")" ] \
          || fail "$folder is not trained to the end and decoded on $set: run stage 2"
      done
      models+=(--model "$name=$folder")
    done
  done
  for set in $sets; do decode "$teacher" "$set"; done
  run icefall-kd report "$work_dir/report-$1" "${models[@]}" \
    --baseline "$first" --manifest-dir "$base/data/fbank"
}

export OMP_NUM_THREADS=1
mkdir -p "$work_dir/log"
alone "$work_dir/log"
if [ "$stage" -le 2 ] && [ "$stop_stage" -ge 2 ]; then
  . local/experiments.sh
  for seed in $seeds; do
    for size in $sizes; do
      for name in $runs; do
        start "$work_dir/log" one "$name" "$size" "$seed"
      done
    done
  done
  finished
fi
if [ "$stop_stage" -ge 3 ]; then
  for size in $sizes; do report_on "$size"; done
fi
