#!/usr/bin/env bash
# The digits recipe, from nothing to a table of WERs. See README.md.
# A recipe of another corpus sources this script and works in its own folder.
set -eou pipefail
caller=$PWD
script=$(realpath "${BASH_SOURCE[0]}")
cd "$(dirname "$(realpath "${BASH_SOURCE[-1]}")")"

# Options
stage=0             # first stage
stop_stage=10       # last stage
redo=false          # true: do the chosen stages again

corpus=espeak       # espeak (speech is synthesized) or fsdd; in egs/commands, commands
corpus_dir=         # fsdd: folder of the recordings; commands: your clone of the corpus
test_speaker=theo   # fsdd: held out for test
untranscribed_speakers=  # of the students' speech, separated by commas; espeak: most (its default), or none
train_teacher=auto  # auto: only if pretrained/ has none for these options; true: train it anyway; false: never
teacher_work_dir=   # use the teacher and tokens of this work folder
num_train=1600      # number of training utterances
num_untranscribed=800  # number of utterances of untranscribed speakers
num_dev=96          # number of validation utterances
num_test=300        # number of test utterances
vocab_size=54       # number of BPE tokens
seed=42             # of the trainings and the student's parameters
corpus_seed=        # of the corpus; empty: --seed

teacher_epochs=10   # epochs of the teacher, at most with --patience
student_epochs=3    # epochs of both students, with long_factor 1; at most with --patience
long_factor=1       # 3: also train and decode both students three times as long
patience=0          # above 0: train to the end, until the dev WER has not improved for so many epochs
avg=1               # how many epochs are averaged
teacher_set=        # settings of the teacher that differ from train.py's, such as "encoder-dim=64,128,128"
train_flags=        # more options of train.py, for all trainings, such as "--max-duration 30"
student_set="encoder-dim=32,32,32 encoder-unmasked-dim=32,32,32 num-encoder-layers=1,1,1 feedforward-dim=64,64,64 decoder-dim=64 joiner-dim=64"  # settings that differ from the teacher's: 0.3 M parameters instead of 1.3 M
student_init=teacher  # start from the teacher's slices, or: random
kd_config=conf/kd.yaml  # weights of the losses
kd_flags=           # override kd_config, such as "--kd-temperature 2"
dump_flags="--keep-lattice dense --keep-hidden out:half"  # of icefall-kd dump
export_flags=       # of icefall-kd export, such as "--int8 encoder"

work_dir=.          # data/ and exp/ go here
venv=../../../.venv  # environment that stage 0 makes, if there is none
num_threads=0       # CPU threads of each program; 0: all cores

help_message="Usage: $0 [--option value ...]
Stages: 0 environment, 1 data, 2 features, 3 tokens, 4 teacher, 5 targets,
  6 student, 7 training, 8 decoding, 9 table, 10 export. A stage whose work is done is
  skipped, and one that was stopped continues."
renamed="teacher_dir:teacher_work_dir student:student_set"

if [ -f conf/corpus.sh ]; then
  . conf/corpus.sh
  help_message+="
Of the options below, this recipe has other defaults:"
  while IFS='=' read -r name value; do
    help_message+=$'\n'"  --${name//_/-} $value"
  done < <(grep -v '^#' conf/corpus.sh)
fi
. shared/parse_options.sh
. shared/check_options.sh
corpus_seed=${corpus_seed:-$seed}
check_numbers 0 stage stop_stage seed corpus_seed num_untranscribed num_threads patience
check_numbers 1 num_train num_dev num_test vocab_size student_epochs long_factor avg
check_numbers 2 teacher_epochs  # for averaging
check_switch redo
. shared/threads.sh
. shared/stoppable.sh
. local/training.sh

log() {
  local fname=${BASH_SOURCE[1]##*/}
  echo -e "$(date '+%Y-%m-%d %H:%M:%S') (${fname}:${BASH_LINENO[0]}:${FUNCNAME[1]}) $*"
}

fail() {
  echo "run.sh: error: $*" >&2
  exit 1
}

begun=$SECONDS
[ -f "$kd_config" ] || fail "the file of --kd-config, $kd_config, does not exist"
if [ -n "$corpus_dir" ] && [ -d "$caller/$corpus_dir" ]; then
  corpus_dir=$(cd "$caller/$corpus_dir" && pwd)
fi
# Compiling at every start costs more than it saves in runs this short.
export TORCHDYNAMO_DISABLE=${TORCHDYNAMO_DISABLE:-1}
corpora=$(printf '%s\n' local/prepare_*.py | sed 's/.*prepare_//; s/\.py$//')
grep -qxF -e "$corpus" <<< "$corpora" \
  || fail "the corpus is '$corpus', and must be ${corpora//$'\n'/ or }"
rate=8000
if [ "$corpus" = commands ]; then rate=16000; fi
[ "$corpus" = espeak ] || [ -n "$corpus_dir" ] || [ "$stage" -gt 1 ] \
  || fail "--corpus $corpus needs --corpus-dir, the folder of its recordings"
for setting in $teacher_set; do
  [[ $setting == ?*=?* ]] \
    || fail "--teacher-set has '$setting', and each word must be NAME=VALUE, such as" \
      "encoder-dim=64,128,128"
done
# Most voices of espeak have no transcripts for the students: hidden is true.
hidden=false
if [ "$corpus" = espeak ]; then
  [ -z "$teacher_work_dir" ] || fail "--teacher-work-dir is not for --corpus espeak"
  case ${untranscribed_speakers:-most} in
    most) hidden=true ;;
    none) ;;
    *) fail "--untranscribed-speakers is $untranscribed_speakers, and must be most or none" \
      "with --corpus espeak" ;;
  esac
  untranscribed_speakers=
fi
[[ $train_teacher = @(auto|true|false) ]] \
  || fail "--train-teacher is $train_teacher, and must be auto, true or false"
# What pretrained/ was trained with. Data of other sizes have the same test voices.
released=false
if [ -f pretrained/pretrained.pt ] && [ "$train_teacher" != true ] \
  && [ "$corpus/$vocab_size/$teacher_epochs/$avg/$patience" = espeak/54/10/1/0 ] \
  && [ -z "$teacher_set$train_flags" ]; then
  released=true
fi
[ "$train_teacher" != false ] || [ "$released" = true ] \
  || fail "--train-teacher is false, and pretrained/ has no teacher for these options:" \
    "leave out --corpus, --vocab-size, --teacher-epochs, --teacher-set, --train-flags," \
    "--avg and --patience, or give --train-teacher true"
[ "$patience" -eq 0 ] || [ "$long_factor" -eq 1 ] \
  || fail "--patience $patience ends a training by itself: leave out --long-factor" \
    "$long_factor"

data=$work_dir/data
exp=$work_dir/exp
lang=$data/lang_bpe_$vocab_size
teacher=$exp/teacher
if [ -n "$teacher_work_dir" ]; then
  lang=$teacher_work_dir/data/lang_bpe_$vocab_size
  teacher=$teacher_work_dir/exp/teacher
  [ -f "$teacher/epoch-$(last_epoch "$teacher" "$teacher_epochs").pt" ] \
    || fail "$teacher has no epoch-$teacher_epochs.pt: run its stages up to 4 first"
  [ ! -f "$teacher/best-epoch" ] || [ -f "$teacher_work_dir/exp/.4.done" ] \
    || fail "the teacher in $teacher is not trained to the end: let its stage 4 finish"
  [ -f "$lang/bpe.model" ] \
    || fail "$lang has no bpe.model: give the --vocab-size of $teacher_work_dir"
fi
mkdir -p "$data" "$exp"

# Results of other settings in the same folder would be taken for these.
settings="corpus=$corpus corpus_seed=$corpus_seed test_speaker=$test_speaker seed=$seed \
untranscribed_speakers=$untranscribed_speakers num_train=$num_train \
num_untranscribed=$num_untranscribed num_dev=$num_dev \
num_test=$num_test vocab_size=$vocab_size teacher_epochs=$teacher_epochs \
teacher_dir=$teacher_work_dir student=$student_set student_init=$student_init \
student_epochs=$student_epochs long_factor=$long_factor patience=$patience avg=$avg \
teacher_set=$teacher_set train_flags=$train_flags dump_flags=$dump_flags \
kd=$(sed 's/#.*//' "$kd_config" | tr -s ' \n' ' ')$kd_flags"
# Folders of former versions have no such settings.
settings+=${export_flags:+ export_flags=$export_flags}
if [ "$released" = true ]; then settings+=" teacher=pretrained"; fi
if [ "$hidden" = true ]; then settings+=" voices=hidden"; fi
# write FILE TEXT: whole or not at all.
write() { echo "$2" > "$1.tmp" && mv "$1.tmp" "$1"; }

alone "$exp"
if [ -f "$exp/.1.done" ] && [ "$(cat "$exp/.settings")" != "$settings" ]; then
  [ "$redo" = true ] || fail "$work_dir holds results of other settings" \
    "($(cat "$exp/.settings")), not these ($settings): give another --work-dir," \
    "or --redo true with the stages to do again"
fi
# For a stage N, .N.begun and .N.done in exp/ record whether it has begun or is done. A
# redo that was stopped continues when the same redo is asked for again: .redo records
# that its stages are due already.
redoing="$stage to $stop_stage, $settings"
if [ "$redo" != true ]; then
  rm -f "$exp/.redo"
elif [ ! -f "$exp/.redo" ] || [ "$(cat "$exp/.redo")" != "$redoing" ]; then
  if [ "$stage" -le "$stop_stage" ]; then
    for n in $(seq "$stage" 10); do rm -f "$exp/.$n."*; done
  fi
fi
write "$exp/.settings" "$settings"
if [ "$redo" = true ]; then write "$exp/.redo" "$redoing"; fi
rm -rf "$work_dir"/{data,exp}/{,*/}.tmp-*  # of a script that was killed

# todo N NAME [OUTPUT ...]: whether stage N is asked for and not done yet. When a stage
# begins, it removes former outputs; when it continues, it keeps them.
todo() {
  local n=$1 name=$2 before
  shift 2
  [ "$stage" -le "$n" ] && [ "$stop_stage" -ge "$n" ] || return 1
  if [ -f "$exp/.$n.done" ]; then
    log "Stage $n: $name: done before (--redo true does it again)"
    return 1
  fi
  for before in $(seq 0 $((n - 1))); do
    [ -f "$exp/.$before.done" ] \
      || fail "stage $n ($name) needs stage $before, which is not done: run $0 --stage" \
        "$before"
  done
  if [ -f "$exp/.$n.begun" ]; then
    log "Stage $n: $name: goes on where it was stopped"
  else
    log "Stage $n: $name"
    rm -rf "$@" && touch "$exp/.$n.begun" || fail "$exp can't be written to"
  fi
}

finish() { mv "$exp/.$1.begun" "$exp/.$1.done"; }

if todo 0 "environment"; then  # 3 minutes
  if python3 -c "import icefall_kd, lhotse, zipformer.modules" 2>/dev/null; then
    log "Using $(command -v python3)"
  else
    run bash ../../../tools/make_env.sh --prefix "$venv"
  fi
  finish 0
fi
if ! python3 -c "import icefall_kd, zipformer.modules" 2>/dev/null; then
  [ -f "$venv/bin/activate" ] || fail "there is no environment in $venv: run $0 --stage 0"
  . "$venv/bin/activate"
fi
if [ "$stage" -le 0 ]; then icefall-kd doctor; fi
if [ "$stage" -le 1 ] && [ "$stop_stage" -ge 9 ] && [ ! -f "$exp/.1.done" ]; then
  trained_epochs=$teacher_epochs
  if [ "$released" = true ] || [ -n "$teacher_work_dir" ]; then trained_epochs=0; fi
  # Settings that fit no model are refused by stage 6.
  run ./local/how_long.py --student-set "$teacher_set $student_set" \
    --num-utterances "$num_train" --teacher-epochs "$trained_epochs" \
    --student-epochs "$((student_epochs * long_factor))" \
    --num-threads "$num_threads" 2>/dev/null || log "How long it takes is not known"
fi

if todo 1 "data ($corpus)"; then  # 1 minute, 100 MB
  rm -rf "$data/manifests" "$data/audio"
  common=(--seed "$corpus_seed" --num-train "$num_train" --num-dev "$num_dev"
    --num-test "$num_test" --output-dir "$data/manifests" --audio-dir "$data/audio")
  if [ "$corpus" = espeak ]; then
    run ./local/prepare_espeak.py "${common[@]}"
  else
    if [ -n "$untranscribed_speakers" ]; then
      common+=(--untranscribed-speakers "$untranscribed_speakers"
        --num-untranscribed "$num_untranscribed")
    fi
    if [ "$corpus" = fsdd ]; then common+=(--test-speaker "$test_speaker"); fi
    run "./local/prepare_$corpus.py" --corpus-dir "$corpus_dir" "${common[@]}"
  fi
  finish 1
fi

if todo 2 "features" "$data/fbank"; then  # 1 minute, 60 MB
  run ./local/compute_fbank.py --manifest-dir "$data/manifests" \
    --sampling-rate "$rate" --output-dir "$data/fbank"
  if [ "$hidden" = true ]; then
    run ./local/hide_transcripts.py --manifest "$data/fbank/cuts_train.jsonl.gz"
  fi
  finish 2
fi

if todo 3 "tokens"; then
  if [ "$released" = true ]; then
    mkdir -p "$lang"
    cp pretrained/{bpe.model,tokens.txt} "$lang/"
  elif [ -z "$teacher_work_dir" ]; then
    run ./local/train_bpe_model.py --lang-dir "$lang" --vocab-size "$vocab_size" \
      --manifest "$data/manifests/cuts_train.jsonl.gz"
  fi
  finish 3
fi
bpe=$lang/bpe.model

read -r -a train_words <<< "$train_flags"
training=(--bpe-model "$bpe" --seed "$seed" --sample-rate "$rate"
  --patience "$patience" --avg "$avg" "${train_words[@]}")

if todo 4 "teacher" "$exp/teacher"; then  # 15 minutes and 60 MB, if it is trained
  if [ "$released" = true ]; then
    (cd pretrained && sha256sum --quiet -c SHA256SUMS) \
      || fail "pretrained/ is not as it was released: get its files again, for instance" \
        "by git checkout, or give --train-teacher true"
    mkdir -p "$teacher"
    cp pretrained/pretrained.pt "$teacher/.tmp.pt"
    mv "$teacher/.tmp.pt" "$teacher/epoch-99.pt"
    log "The teacher is that of pretrained/; --train-teacher true trains it"
  elif [ -z "$teacher_work_dir" ]; then
    settings_of_teacher=()
    for setting in $teacher_set; do
      settings_of_teacher+=("--${setting%%=*}" "${setting#*=}")
    done
    train "$teacher" 1 "$teacher_epochs" --manifest-dir "$data/fbank" \
      "${training[@]}" "${settings_of_teacher[@]}" --num-threads "$num_threads"
  fi
  finish 4
fi
teacher_epoch=$(last_epoch "$teacher" "$teacher_epochs")
if [ "$released" = true ]; then teacher_epoch=99; fi
read -r -a average_of_teacher <<< "$(average_flags "$teacher" "$teacher_epoch")"
teacher_flags=(--recipe ./zipformer --exp-dir "$teacher" --epoch "$teacher_epoch"
  "${average_of_teacher[@]}")

hard_sets=train
if [ "$hidden" = true ]; then hard_sets=train-transcribed; fi
kd_sets=$hard_sets
if [ "$hidden" = true ] || [ -n "$untranscribed_speakers" ]; then
  kd_sets=$hard_sets,train-labelled
fi

labelled=$data/fbank/cuts_train-labelled.jsonl.gz
if todo 5 "targets" "$data/kd" "$labelled"; then  # 1 minute, 25 MB
  mkdir -p "$data/kd"
  if [ "$kd_sets" != "$hard_sets" ] && [ ! -f "$labelled" ]; then
    labels=$data/kd/labels.jsonl.gz
    run icefall-kd label "${teacher_flags[@]}" --bpe-model "$bpe" \
      --num-threads "$num_threads" \
      "$data/fbank/cuts_train-untranscribed.jsonl.gz" "$labels"
    run icefall-kd filter --bpe-model "$bpe" "$labels" "$labelled"
  fi
  read -r -a dump_words <<< "$dump_flags"
  for set in ${kd_sets//,/ }; do
    run icefall-kd dump "${teacher_flags[@]}" --bpe-model "$bpe" \
      --num-threads "$num_threads" "${dump_words[@]}" \
      "$data/fbank/cuts_$set.jsonl.gz" "$data/kd/cuts_$set.jsonl.gz"
  done
  cp "$data/fbank/cuts_dev.jsonl.gz" "$data/kd/"
  finish 5
fi

if todo 6 "student" "$exp/student" "$exp/student-kd"; then
  changes=()
  for change in $student_set; do changes+=(--set "$change"); done
  run icefall-kd student "${teacher_flags[@]}" --bpe-model "$bpe" \
    --student-dir "$exp/student" "${changes[@]}" --init "$student_init" --seed "$seed"
  copy_student "$exp/student" "$exp/student-kd"
  finish 6
fi

# epoch-1.pt is the student before training. Equal steps: with half of the cuts
# untranscribed, the student without KD has half of the steps in an epoch, and a fifth
# with four fifths.
last=$((1 + student_epochs * long_factor))
hard_mult=1
if [ -n "$untranscribed_speakers" ]; then hard_mult=2; fi
if [ "$hidden" = true ]; then hard_mult=5; fi
hard_last=$((1 + student_epochs * long_factor * hard_mult))

# Of the students' folders, all but what stage 6 made.
trained=()
while read -r f; do trained+=("$f"); done < <(find "$exp/student" "$exp/student-kd" \
  -mindepth 1 -maxdepth 1 ! -name epoch-1.pt ! -name "student_*" 2>/dev/null)
if todo 7 "training, without and with KD" "${trained[@]}"; then  # 5 minutes
  read -r -a flags < "$exp/student/student_flags"
  common=("${training[@]}" "${flags[@]}")
  read -r -a more <<< "$kd_flags"
  # Side by side: a small model trains no faster on two cores than on one.
  if [ "$num_threads" -eq 0 ]; then num_threads=$((($(nproc) + 1) / 2)); fi
  common+=(--num-threads "$num_threads")
  mkdir -p "$exp/student/log"
  hard_log=$exp/student/log/stage-7
  log "The student without KD trains meanwhile; its log is $hard_log"
  in_background train "$exp/student" 2 "$hard_last" --manifest-dir "$data/fbank" \
    --train-set "$hard_sets" "${common[@]}" >> "$hard_log" 2>&1
  hard=$!
  train "$exp/student-kd" 2 "$last" --manifest-dir "$data/kd" --train-set "$kd_sets" \
    "${common[@]}" --kd-config "$kd_config" "${more[@]}"
  log "Waiting for the student without KD"
  wait "$hard" || fail "the student without KD did not train: see $hard_log"
  finish 7
fi

# model:epoch of all that is decoded; the last of each model is in summary.json
models=("$teacher:$teacher_epoch")
for f in $(printf '%s\n' 1 "$long_factor" | sort -un); do
  hard_epoch=$(last_epoch "$exp/student" $((1 + student_epochs * f * hard_mult)))
  kd_epoch=$(last_epoch "$exp/student-kd" $((1 + student_epochs * f)))
  models+=("$exp/student:$hard_epoch" "$exp/student-kd:$kd_epoch")
done

if todo 8 "decoding"; then  # 1 minute
  for m in "${models[@]}"; do
    for method in ctc-greedy-search greedy_search; do
      mark=$exp/.8.$(tr : - <<< "${m##*/}").$method
      if [ -f "$mark" ]; then continue; fi
      read -r -a words <<< "$(average_flags "${m%:*}" "${m##*:}")"
      run ./zipformer/decode.py --exp-dir "${m%:*}" --epoch "${m##*:}" "${words[@]}" \
        --manifest-dir "$data/fbank" --bpe-model "$bpe" \
        --decoding-method "$method" --num-threads "$num_threads"
      touch "$mark"
    done
  done
  finish 8
fi

if todo 9 "table" "$exp/report"; then  # 1 minute
  run ./local/make_table.py --seed "$seed" --avg "$avg" --bpe-model "$bpe" \
    --output "$exp/summary.json" --manifest "$data/fbank/cuts_test.jsonl.gz" \
    "${models[@]}"
  if python3 -c "import matplotlib" 2>/dev/null; then
    run icefall-kd report "$exp/report" --model "teacher=$teacher" \
      --model "student=$exp/student" --model "student-kd=$exp/student-kd" \
      --baseline student --manifest-dir "$data/fbank" > /dev/null
  else
    log "The report with curves is left out: it needs \`pip install matplotlib\`"
  fi
  finish 9
fi

exported=$exp/student-kd/export
missing="needs the packages onnx, onnxruntime and sherpa-onnx, which can't be imported:"
missing+=" run \`pip install onnx onnxruntime sherpa-onnx\`, and the same command again"
if [ "$stop_stage" -ge 10 ] && [ ! -f "$exp/.10.done" ] \
  && ! python3 -c "import onnx, onnxruntime, sherpa_onnx" 2>/dev/null; then
  [ "$stage" -lt 10 ] || fail "stage 10 (export) $missing"
  log "Stage 10: export: left out, as it $missing"
elif todo 10 "export of the distilled student" "$exported"; then  # 1 minute, 10 MB
  read -r -a export_words <<< "$export_flags"
  run icefall-kd export --recipe ./zipformer --exp-dir "$exp/student-kd" \
    --epoch "$kd_epoch" --avg "$(averaged "$kd_epoch")" --bpe-model "$bpe" \
    --export-dir "$exported" --check "$data/fbank/cuts_test.jsonl.gz" \
    "${export_words[@]}"
  finish 10
fi
rm -f "$exp/.redo"
for table in "$exported/parity.md" "$exp/summary.md" "$exp/summary.txt"; do
  if [ "$stop_stage" -ge 9 ] && [ -f "$table" ]; then
    echo
    cat "$table"
  fi
done

took="$(((SECONDS - begun) / 60)) min $(((SECONDS - begun) % 60)) s"
cat <<END

Done in $took. Everything lies in $(cd "$work_dir" && pwd):
  exp/summary.json, summary.md     the table
  exp/report/report.html           the same with curves, for a browser (with matplotlib)
  exp/student-kd/epoch-$kd_epoch.pt        the distilled student, an ordinary checkpoint
  exp/student-kd/export            the same for sherpa-onnx, and how they compare
  exp/*/log, exp/*/tensorboard     losses; tensorboard --logdir $exp
  exp/*/greedy_search, exp/*/ctc-greedy-search   WERs and aligned utterances
  data/kd                          the cuts with the teacher's targets
END
if [ "$patience" -gt 0 ]; then
  echo "  exp/*/dev-wer.csv, best-epoch    dev WER after each epoch, and the best epoch," \
    "up to which $avg are averaged"
fi
cat <<END
To try next:
  $0 --stage 7 --redo true --kd-flags "--kd-temperature 2"   another temperature
END
if [ "$patience" -eq 0 ]; then
  echo "  $0 --work-dir work/long --long-factor 3             three times the steps"
fi
if [ "$corpus" = espeak ]; then
  echo "  $0 --corpus fsdd --corpus-dir DIR --work-dir work/fsdd   real recordings"
fi
