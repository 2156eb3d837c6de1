#!/usr/bin/env bash
# From a trained teacher to a distilled student, in your own icefall. See README.md.
#
#   ./kd.sh --asr-dir ~/icefall/egs/librispeech/ASR --student s
#
# Fill in what stands down to "To change if you like", here, in a file that you give as
# --config, or as options (--teacher-epoch 50). aishell, gigaspeech and wenetspeech:
# --config conf/aishell.sh and so on.
set -eou pipefail

asr_dir=                      # icefall's egs/librispeech/ASR, with its data/
recipe=zipformer              # folder of train.py in it
teacher_dir=zipformer/exp     # the teacher's --exp-dir
teacher_epoch=30              # and what its decode.py is given
teacher_avg=9
teacher_flags=                # --num-encoder-layers ... of another size than M
tokens="--bpe-model data/lang_bpe_500/bpe.model"
tokens_file=data/lang_bpe_500/tokens.txt
student=s                     # of `icefall-kd student --list`, or a size such as 5M
train_manifests=librispeech_cuts_train-clean-100.jsonl.gz  # in manifest_dir
train_flags="--full-libri 0 --max-duration 1000 --use-fp16 1"
use_ctc=1                     # 0: teacher and student have a transducer alone

# To change if you like.
world_size=1                  # GPUs to train on
student_flags=                # of `icefall-kd student`, such as --channels important
warmup_epochs=3               # on hard labels, before distillation
kd_epochs=24                  # with distillation
finetune_epochs=3             # on hard labels again, behind it
avg=9                         # epochs that the student's decoding averages
kd_config=conf/kd.yaml        # weights of the losses
kd_flags=                     # go before it, such as --kd-temperature 2
keep=adaptive:0.999:16        # how targets are kept: icefall-kd dump --help
keep_lattice=adaptive:0.999:16
keep_hidden=                  # out:half, for the hidden-weight of kd_config: large
dump_max_duration=600
baseline=true                 # also train the student without distillation
decode="decode.py:greedy_search decode.py:modified_beam_search ctc_decode.py:ctc-greedy-search"
decode_flags="--max-duration 600"
ctc_decode_flags="--lang-dir data/lang_bpe_500"  # of ctc_decode.py alone
export="export.py export-onnx.py"
unit=WER                      # CER for a recipe of characters
manifest_dir=data/fbank
kd_dir=data/kd                # targets, and the manifests that carry them
exp_dir=                      # students; default: RECIPE_kd/exp-STUDENT
python=python3

nj=1                          # jobs of stage 2, one a GPU
job=                          # of them this one alone (Slurm): 0 to nj - 1
stage=0
stop_stage=10
config=

help_message="Usage: $0 [--config FILE] [--option value ...]
Stages: 0 checks, 1 plug, 2 targets, 3 student, 4 warm-up, 5 distillation,
  6 fine-tuning, 7 student without distillation, 8 decoding, 9 export, 10 report.
A stage goes on where it stopped.
Options (now):
$(sed -n '/^asr_dir=/,/^config=/{s/ *#.*//; /^[a-z_]*=/{h; s/=.*//; y/_/-/; G
  s/\n[a-z_]*=/ /; s/^/  --/; p}}' "$0")"

caller=$PWD
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

fail() {
  echo "kd.sh: error: $*" >&2
  exit 1
}

# A file named on the command line, or of this folder.
find_file() {
  local f
  for f in "$1" "$caller/$1" "$here/$1"; do
    [ -f "$f" ] && { realpath "$f"; return; }
  done
  fail "the file $1 does not exist"
}

. "$here/shared/threads.sh"
. "$here/shared/stoppable.sh"

# The file first: options go before it.
previous=
for word in "$@"; do
  if [ "$previous" = --config ]; then
    file=$(find_file "$word") || exit 1
    . "$file"
  fi
  previous=$word
done
. "$here/shared/parse_options.sh"
recipe=${recipe%/} teacher_dir=${teacher_dir%/}
if [ "$use_ctc" = 0 ]; then
  keep=none
  if [ "$kd_config" = conf/kd.yaml ]; then kd_config=conf/kd-transducer.yaml; fi
fi

log() {
  echo "$(date '+%Y-%m-%d %H:%M:%S') (kd.sh) $*"
}

[ -n "$asr_dir" ] || fail "--asr-dir is missing, icefall's folder egs/librispeech/ASR"
[ -d "$asr_dir" ] || asr_dir=$caller/$asr_dir
[ -d "$asr_dir/$recipe" ] || fail "$asr_dir has no folder $recipe: give --asr-dir" \
  "icefall's egs/librispeech/ASR, and --recipe the folder of train.py in it"
kd_config=$(find_file "$kd_config") || exit 1
cd "$asr_dir"
icefall=$(cd ../../.. && pwd)
export PYTHONPATH=$icefall${PYTHONPATH:+:$PYTHONPATH}
plugged=${recipe}_kd
exp_dir=${exp_dir:-$plugged/exp-$student}

for number in warmup_epochs kd_epochs finetune_epochs avg nj world_size use_ctc stage \
  stop_stage; do
  [[ ${!number} =~ ^[0-9]+$ ]] || fail "--${number//_/-} is '${!number}', not a number"
done
last=$((1 + warmup_epochs + kd_epochs + finetune_epochs))
[ "$nj" -ge 1 ] || fail "--nj is $nj, and must be 1 or more"
[[ -z $job || ( $job =~ ^[0-9]+$ && $job -lt $nj ) ]] \
  || fail "--job is $job and --nj $nj: give --job 0 to $((nj - 1))"
[ "$kd_epochs" -ge 1 ] || fail "--kd-epochs is $kd_epochs, and must be 1 or more"
[ "$avg" -ge 1 ] && [ "$avg" -lt "$last" ] || fail "--avg is $avg and the student has" \
  "$((last - 1)) epochs to average: give 1 to $((last - 1))"
case $baseline in
  true|false) ;;
  *) fail "--baseline is '$baseline', and must be true or false" ;;
esac
# shellcheck disable=SC2086
found=$(cd "$manifest_dir" 2>/dev/null && ls -d $train_manifests 2>/dev/null) \
  || fail "$asr_dir/$manifest_dir has no $train_manifests: run the recipe's prepare.sh" \
    "first, or mend --manifest-dir and --train-manifests"
read -r -d '' -a manifests <<< "$found" || true

# Students of other settings in the same folder would be taken for these. What makes
# training fit a machine may change on the way.
own='--(max-duration|num-workers|num-buckets|master-port|save-every-n|keep-last-k) [0-9]+'
# All that takes its time ends with this script.
icefall-kd() { run icefall-kd "$@"; }
python=(run "${python[@]}")

if [ "$stage" -le 7 ] && [ "$stop_stage" -ge 3 ]; then
  settings="teacher $teacher_dir $teacher_epoch $teacher_avg, student $student \
$student_flags, epochs $warmup_epochs+$kd_epochs+$finetune_epochs, \
$(sed -E "s/$own *//g" <<< "$train_flags"), \
$(sed 's/#.*//' "$kd_config" | tr -s ' \n' ' ')$kd_flags"
  if [ -f "$exp_dir/.settings" ] && [ "$(cat "$exp_dir/.settings")" != "$settings" ]; then
    fail "$exp_dir holds students of other settings ($(cat "$exp_dir/.settings"))," \
      "not these ($settings): give another --exp-dir, or remove that folder"
  fi
fi

asked() {
  [ "$stage" -le "$1" ] && [ "$stop_stage" -ge "$1" ] || return 1
  log "Stage $1: $2"
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
  # shellcheck disable=SC2046,SC2086
  "${python[@]}" "./$plugged/train.py" --world-size "$world_size" --start-epoch "$first" \
    --num-epochs "$end" --exp-dir "$folder" $tokens $train_flags $ctc_flag \
    $(cat "$exp_dir/start/student_flags") "$@"
}
# begin NAME: a student that goes on from the warm-up, which is common to all.
begin() {
  local e f
  mkdir -p "$exp_dir/$1"
  for e in $(seq 1 $((1 + warmup_epochs))); do
    f=epoch-$e.pt
    if [ ! -f "$exp_dir/$1/$f" ]; then
      [ -f "$exp_dir/start/$f" ] || fail "$exp_dir/start has no $f: run stages 3 and 4"
      cp "$exp_dir/start/$f" "$exp_dir/$1/$f.tmp"
      mv "$exp_dir/$1/$f.tmp" "$exp_dir/$1/$f"
    fi
  done
  if [ -d "$exp_dir/start/log" ]; then cp -r "$exp_dir/start/log" "$exp_dir/$1/"; fi
}
ctc_flag=
if [ "$use_ctc" = 1 ]; then ctc_flag="--use-ctc 1"; fi
teacher=(--recipe "./$recipe" --exp-dir "$teacher_dir" --epoch "$teacher_epoch"
  --avg "$teacher_avg")
read -r -d '' -a token_flags <<< "$tokens" || true
read -r -d '' -a more_teacher <<< "$teacher_flags" || true

if asked 0 "what is installed, and whether teacher, tokens and cuts fit"; then
  # 1 minute
  icefall-kd doctor "${teacher[@]}" "${token_flags[@]}" \
    --cuts "$manifest_dir/${manifests[0]}" ${more_teacher[@]+"${more_teacher[@]}"}
fi

if asked 1 "a copy of $recipe with distillation plugged in, $plugged"; then
  # seconds; nothing of icefall's own is changed
  icefall-kd plug "./$recipe" "./$plugged"
fi

if asked 2 "the teacher's targets, $kd_dir"; then
  # On one V100 about 1 hour for 100 h and 9 hours for 960 h with a teacher of size L,
  # an estimate; divided by --nj. Disk for an hour of speech: 3 MB; --keep-hidden out:half
  # adds 140 MB (L) or 92 MB (M). The three speeds count each.
  [ -d "$plugged" ] || fail "there is no $asr_dir/$plugged: run stage 1 first"
  mkdir -p "$kd_dir/log"
  while read -r f; do  # what is not distilled is read from where it stands
    mkdir -p "$kd_dir/$(dirname "$f")"
    [ -e "$kd_dir/$f" ] \
      || ln -sfn "$(realpath "$manifest_dir/$f")" "$kd_dir/$f" 2>/dev/null \
      || [ -L "$kd_dir/$f" ]  # another job was faster
  done < <(cd "$manifest_dir" && find . -name "*.jsonl.gz" | sed 's|^\./||' \
    | grep -vxF "$found" || true)
  # What job $1 has to do: its share of the one manifest, or of several its own.
  dump() {
    local share=(--num-jobs "$nj" --job "$1") own=("${manifests[@]}") m i
    if [ "${#manifests[@]}" -gt 1 ]; then
      share=() own=()
      for i in "${!manifests[@]}"; do
        if [ $((i % nj)) -eq "$1" ]; then own+=("${manifests[$i]}"); fi
      done
    fi
    for m in ${own[@]+"${own[@]}"}; do
      mkdir -p "$kd_dir/$(dirname "$m")"
      if [ -L "$kd_dir/$m" ]; then rm -f "$kd_dir/$m"; fi  # not distilled before
      icefall-kd dump "${teacher[@]}" "${token_flags[@]}" --keep "$keep" \
        ${keep_lattice:+--keep-lattice "$keep_lattice"} \
        ${keep_hidden:+--keep-hidden "$keep_hidden"} \
        --max-duration "$dump_max_duration" ${share[@]+"${share[@]}"} \
        "$manifest_dir/$m" "$kd_dir/$m" ${more_teacher[@]+"${more_teacher[@]}"}
    done
  }
  if [ -n "$job" ]; then
    dump "$job"
    log "Job $job is done; go on with stage 3 when all $nj are"
    exit 0
  elif [ "$nj" -eq 1 ]; then
    dump 0
  else
    log "$nj jobs; their logs are $kd_dir/log/dump-*"
    pids=()
    read -r -a gpus <<< "$(tr ',' ' ' <<< "${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 63)}")"
    for j in $(seq 0 $((nj - 1))); do
      CUDA_VISIBLE_DEVICES=${gpus[$((j % ${#gpus[@]}))]} in_background dump "$j" \
        > "$kd_dir/log/dump-$j" 2>&1
      pids+=($!)
    done
    for j in "${!pids[@]}"; do
      wait "${pids[$j]}" || fail "job $j failed: $(tail -n 1 "$kd_dir/log/dump-$j")"
    done
  fi
fi
for m in "${manifests[@]}"; do
  if [ "$stop_stage" -lt 3 ] || [ "$stage" -gt 7 ]; then break; fi
  if [ -L "$kd_dir/$m" ]; then fail "$kd_dir/$m has no targets: run stage 2 first"; fi
  if [ ! -f "$kd_dir/$m" ] && [ "$nj" -gt 1 ] && [ "${#manifests[@]}" -eq 1 ]; then
    icefall-kd combine --num-jobs "$nj" "$manifest_dir/$m" "$kd_dir/$m"
  fi
  [ -f "$kd_dir/$m" ] || fail "there are no targets $kd_dir/$m: run stage 2 first"
done

if asked 3 "the student $student, $exp_dir"; then
  # 1 minute
  case $student in
    xl|l|m|s|kws|10m|6m|3m|1m|*-streaming) size=(--preset "$student") ;;
    [0-9]*) size=(--params "$student") ;;
    *) size=() ;;  # a name, and --student-flags say the size
  esac
  read -r -d '' -a more <<< "$student_flags" || true
  if [ -f "$exp_dir/start/epoch-1.pt" ] && [ -f "$exp_dir/.settings" ]; then
    log "$exp_dir/start has its epoch-1.pt"
  else
    icefall-kd student "${teacher[@]}" "${token_flags[@]}" --student-dir "$exp_dir/start" \
      ${size[@]+"${size[@]}"} ${more[@]+"${more[@]}"} ${more_teacher[@]+"${more_teacher[@]}"}
  fi
  echo "$settings" > "$exp_dir/.settings.tmp"
  mv "$exp_dir/.settings.tmp" "$exp_dir/.settings"
  # Weights that the targets can't serve are refused now, not behind the warm-up.
  icefall-kd doctor "${teacher[@]}" "${token_flags[@]}" --student-dir "$exp_dir/start" \
    --cuts "$kd_dir/${manifests[0]}" --kd "--kd-config $kd_config $kd_flags" \
    ${more_teacher[@]+"${more_teacher[@]}"}
fi

if asked 4 "warm-up on hard labels, $warmup_epochs epochs"; then
  # An epoch of S on 4 V100: about 4 minutes for 100 h, 40 minutes for 960 h (three
  # speeds each, an estimate).
  train "$exp_dir/start" 2 $((1 + warmup_epochs)) --manifest-dir "$kd_dir"
fi

if asked 5 "distillation, $kd_epochs epochs"; then
  # A step takes at most 10 % longer than without: benchmarks/step.py.
  read -r -d '' -a more <<< "$kd_flags" || true
  begin kd
  train "$exp_dir/kd" $((2 + warmup_epochs)) $((1 + warmup_epochs + kd_epochs)) \
    --manifest-dir "$kd_dir" --kd-config "$kd_config" ${more[@]+"${more[@]}"}
fi

if asked 6 "fine-tuning on hard labels, $finetune_epochs epochs"; then
  train "$exp_dir/kd" $((2 + warmup_epochs + kd_epochs)) "$last" \
    --manifest-dir "$kd_dir"
fi

if asked 7 "the same student without distillation"; then
  # As long as stages 5 and 6 together, with which it may run side by side, on other
  # GPUs and with another --master-port in train_flags.
  if [ "$baseline" = true ]; then
    begin no-kd
    train "$exp_dir/no-kd" $((2 + warmup_epochs)) "$last" --manifest-dir "$kd_dir"
  fi
fi

if asked 8 "decoding"; then
  # Minutes on one GPU for each method and model.
  models=("$teacher_dir:$teacher_epoch:$teacher_avg" "$exp_dir/kd:$last:$avg")
  if [ "$baseline" = true ]; then models+=("$exp_dir/no-kd:$last:$avg"); fi
  for m in "${models[@]}"; do
    IFS=: read -r folder epoch average <<< "$m"
    model_flags=$teacher_flags
    if [ "$folder" != "$teacher_dir" ]; then model_flags=$(cat "$exp_dir/start/student_flags"); fi
    for d in $decode; do
      script=${d%%:*} method=${d##*:}
      if [ "$use_ctc" != 1 ] && [ "$script" = ctc_decode.py ]; then continue; fi
      mark=$folder/$method/.epoch-$epoch-avg-$average.done
      if [ -f "$mark" ]; then log "$folder: $method is done"; continue; fi
      log "$folder: $method"
      extra= flags=$model_flags
      if [ "$script" = ctc_decode.py ]; then extra=$ctc_decode_flags; fi
      if ! grep -q -e '"--context-size"' "$recipe/$script"; then
        flags=$(sed -E 's/--context-size [0-9]+//' <<< "$flags")
      fi
      # shellcheck disable=SC2086
      "${python[@]}" "./$recipe/$script" --epoch "$epoch" --avg "$average" --exp-dir "$folder" \
        --decoding-method "$method" --manifest-dir "$manifest_dir" $tokens $ctc_flag \
        $decode_flags $extra $flags
      touch "$mark"
    done
  done
fi

if asked 9 "export of the distilled student"; then
  # Minutes, no GPU. The recipe's own scripts, which know nothing of distillation.
  for script in $export; do
    jit=
    if [ "$script" = export.py ]; then jit="--jit 1"; fi
    # shellcheck disable=SC2046,SC2086
    "${python[@]}" "./$recipe/$script" --epoch "$last" --avg "$avg" --exp-dir "$exp_dir/kd" \
      --tokens "$tokens_file" $jit $ctc_flag $(cat "$exp_dir/start/student_flags")
  done
fi

if asked 10 "report"; then
  models=(--model "teacher=$teacher_dir")
  if [ "$baseline" = true ]; then models+=(--model "without KD=$exp_dir/no-kd"); fi
  models+=(--model "with KD=$exp_dir/kd")
  for m in "${manifests[@]}"; do models+=(--targets "$kd_dir/$m"); done
  for lang in en zh; do
    icefall-kd report "${models[@]}" --manifest-dir "$manifest_dir" --unit "$unit" \
      --lang "$lang" "$exp_dir/report"
  done
fi
