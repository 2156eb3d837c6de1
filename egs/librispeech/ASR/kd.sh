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
teacher_flags=                # its size, where its checkpoint holds parameters alone
tokens="--bpe-model data/lang_bpe_500/bpe.model"
tokens_file=data/lang_bpe_500/tokens.txt
student=s                     # of `icefall-kd student --list`, or a size such as 5M
train_manifests=librispeech_cuts_train-clean-100.jsonl.gz  # in manifest_dir
train_flags="--full-libri 0 --max-duration 1000 --use-fp16 1"

# To change if you like.
world_size=1                  # GPUs to train on
student_flags=                # of `icefall-kd student`, such as --channels important
warmup_epochs=3               # on hard labels, before distillation
kd_epochs=24                  # with distillation
finetune_epochs=3             # on hard labels again, behind it
avg=9                         # epochs that the student's decoding averages
kd_config=                    # weights of the losses; default: conf/kd*.yaml by heads
kd_flags=                     # go before it, such as --kd-temperature 2
keep=adaptive:0.999:16        # how targets are kept, of the heads that there are:
keep_lattice=adaptive:0.999:16  # icefall-kd dump --help
keep_hidden=                  # out:half, for the hidden-weight of kd_config: large
dump_max_duration=600
chunk_size=16                 # of causal models, teacher or student: for targets,
left_context_frames=128       # decoding and export
baseline=true                 # also train the student without distillation
decode="decode.py:greedy_search decode.py:modified_beam_search ctc_decode.py:ctc-greedy-search"
decode_flags="--max-duration 600"
ctc_decode_flags=             # of ctc_decode.py alone
export=                       # default: export.py and the export-onnx*.py that suits
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
here=$(dirname "$(realpath "${BASH_SOURCE[0]}")")

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
. "$here/local/flags.sh"

log() {
  echo "$(date '+%Y-%m-%d %H:%M:%S') (kd.sh) $*"
}

for path in asr_dir recipe teacher_dir tokens_file manifest_dir kd_dir exp_dir; do
  while [[ ${!path} == ?*/ ]]; do printf -v "$path" %s "${!path%/}"; done
  [[ ${!path} != -* ]] || fail "--${path//_/-} is '${!path}', which programs take for" \
    "an option: give ./${!path}"
done
[ -n "$asr_dir" ] || fail "--asr-dir is missing, icefall's folder egs/librispeech/ASR"
[ -d "$asr_dir" ] || asr_dir=$caller/$asr_dir
[ -d "$asr_dir/$recipe" ] || fail "$asr_dir has no folder $recipe: give --asr-dir" \
  "icefall's egs/librispeech/ASR, and --recipe the folder of train.py in it"
if [ -n "$kd_config" ]; then kd_config=$(find_file "$kd_config") || exit 1; fi
asr_dir=$(realpath "$asr_dir")
cd "$asr_dir"
icefall=$(realpath ../../..)
[[ $icefall != *:* ]] || fail "the folder $icefall has a colon in its name, where" \
  "PYTHONPATH ends a path: rename it"
export PYTHONPATH=$icefall${PYTHONPATH:+:$PYTHONPATH}
[ -d "$teacher_dir" ] || fail "$asr_dir has no folder $teacher_dir: give --teacher-dir" \
  "the --exp-dir of the teacher's training"
command -v icefall-kd > /dev/null || fail "there is no command icefall-kd: activate" \
  "icefall's environment, and install icefall_kd in it (README.md)"
if command -v "$python" > /dev/null; then words=("$python"); else split python; fi
command -v "${words[0]-}" > /dev/null || fail "--python is '$python', and there is no" \
  "such program: give the Python of icefall's environment"
python=("${words[@]}")
plugged=${recipe}_kd
exp_dir=${exp_dir:-$plugged/exp-$student}

for number in teacher_epoch teacher_avg warmup_epochs kd_epochs finetune_epochs avg nj \
  world_size stage stop_stage; do
  [[ ${!number} =~ ^[0-9]+$ ]] || fail "--${number//_/-} is '${!number}', not a number"
done
for number in chunk_size left_context_frames; do
  [[ ${!number} =~ ^(-1|[0-9]+)$ ]] || fail "--${number//_/-} is '${!number}', and" \
    "must be one number of frames at 50 Hz, or -1 for all"
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
case " $teacher_flags" in
  *" --chunk-size"*|*" --left-context-frames"*) fail "--teacher-flags is" \
    "'$teacher_flags': give --chunk-size and --left-context-frames to kd.sh itself" ;;
esac
split train_manifests
manifests=()
for pattern in ${words[@]+"${words[@]}"}; do
  matches=$pattern
  if [ ! -e "$manifest_dir/$pattern" ]; then
    matches=$(cd "$manifest_dir" 2>/dev/null && compgen -G "$pattern" | sort) || true
  fi
  [ -n "$matches" ] || fail "$asr_dir/$manifest_dir has no $pattern: run the recipe's" \
    "prepare.sh first, or mend --manifest-dir and --train-manifests"
  while IFS= read -r m; do manifests+=("$m"); done <<< "$matches"
done
[ "${#manifests[@]}" -gt 0 ] || fail "--train-manifests is empty: name those of" \
  "$asr_dir/$manifest_dir that the student trains on"

split tokens
token_flags=(${words[@]+"${words[@]}"})
teacher=(--recipe "./$recipe" --exp-dir "$teacher_dir" --epoch "$teacher_epoch"
  --avg "$teacher_avg" ${words[@]+"${words[@]}"})
split teacher_flags
teacher_size=(${words[@]+"${words[@]}"})
split train_flags
train_words=(${words[@]+"${words[@]}"})
chunks=(--chunk-size "$chunk_size" --left-context-frames "$left_context_frames")

# All that takes its time ends with this script.
icefall-kd() { run icefall-kd "$@"; }
python=(run "${python[@]}")

asked() {
  [ "$stage" -le "$1" ] && [ "$stop_stage" -ge "$1" ] || return 1
  log "Stage $1: $2"
}

# Size, heads and whether it is causal are known to the teacher's checkpoint: stage 0
# writes them down, and a later one that finds them missing or of another teacher.
identity="$teacher_dir $teacher_epoch $teacher_avg $teacher_flags"
is_unknown() {
  [ "$stage" -le 8 ] && [ "$stop_stage" -ge 2 ] || return 1
  [ "$(cat "$kd_dir/.teacher" 2>/dev/null)" != "$identity" ] \
    || [ "$teacher_dir/epoch-$teacher_epoch.pt" -nt "$kd_dir/.teacher" ]
}
if asked 0 "what is installed, and whether teacher, tokens and cuts fit" \
  || is_unknown; then
  # 1 minute
  mkdir -p "$kd_dir"
  icefall-kd doctor "${teacher[@]}" --cuts "$manifest_dir/${manifests[0]}" \
    --write-flags "$kd_dir/.teacher_flags" ${teacher_size[@]+"${teacher_size[@]}"}
  echo "$identity" > "$kd_dir/.teacher"
fi
read_flags "$kd_dir/.teacher_flags"
teacher_model=(--epoch "$teacher_epoch" --avg "$teacher_avg"
  ${teacher_size[@]+"${teacher_size[@]}"} ${words[@]+"${words[@]}"})
# The flags of a teacher that is heard as it will be decoded.
chunked=(${teacher_size[@]+"${teacher_size[@]}"})
if is_causal "${teacher_model[@]}"; then chunked+=("${chunks[@]}"); fi
# A head that the teacher lacks has no targets and no losses.
heads=
if ! has_ctc "${teacher_model[@]}"; then heads=-transducer keep=none; fi
if ! has_transducer "${teacher_model[@]}"; then heads=-ctc keep_lattice=; fi
kd_config=${kd_config:-$here/conf/kd$heads.yaml}
case $student in
  *-streaming) is_causal "${teacher_model[@]}" || [ "$stop_stage" -lt 2 ] \
    || [[ $student_flags == *"--init random"* ]] || fail "the student $student is" \
    "causal and its teacher is not, so it can't start from the teacher's layers: give" \
    "--student-flags \"--init random\", or another --student" ;;
esac

# Students of other settings in the same folder would be taken for these. What makes
# training fit a machine may change on the way.
own='--(max-duration|num-workers|num-buckets|master-port|save-every-n|keep-last-k) [0-9]+'

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
  read_flags "$exp_dir/start/student_flags"
  "${python[@]}" "./$plugged/train.py" --world-size "$world_size" \
    --start-epoch "$first" --num-epochs "$end" --exp-dir "$folder" \
    --manifest-dir "$kd_dir" ${token_flags[@]+"${token_flags[@]}"} \
    ${train_words[@]+"${train_words[@]}"} ${words[@]+"${words[@]}"} "$@" \
    || fail "the training in $asr_dir/$folder stopped: mend what it says above, and" \
      "give the same command again; it goes on behind the last whole epoch"
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
  while IFS= read -r f; do  # what is not distilled is read from where it stands
    mkdir -p "$kd_dir/$(dirname "$f")"
    [ -e "$kd_dir/$f" ] \
      || ln -sfn "$(realpath "$manifest_dir/$f")" "$kd_dir/$f" 2>/dev/null \
      || [ -L "$kd_dir/$f" ]  # another job was faster
  done < <(cd "$manifest_dir" && find . -name "*.jsonl.gz" | sed 's|^\./||' \
    | grep -vxF "$(printf '%s\n' "${manifests[@]}")" || true)
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
      icefall-kd dump "${teacher[@]}" --keep "$keep" \
        ${keep_lattice:+--keep-lattice "$keep_lattice"} \
        ${keep_hidden:+--keep-hidden "$keep_hidden"} \
        --max-duration "$dump_max_duration" ${share[@]+"${share[@]}"} \
        "$manifest_dir/$m" "$kd_dir/$m" ${chunked[@]+"${chunked[@]}"}
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
  split student_flags
  if [ -f "$exp_dir/start/epoch-1.pt" ] && [ -f "$exp_dir/.settings" ]; then
    log "$exp_dir/start has its epoch-1.pt"
  else
    # Without chunks: those are for decoding, and a student trains with several.
    icefall-kd student "${teacher[@]}" --student-dir "$exp_dir/start" \
      ${size[@]+"${size[@]}"} ${words[@]+"${words[@]}"} \
      ${teacher_size[@]+"${teacher_size[@]}"}
  fi
  echo "$settings" > "$exp_dir/.settings.tmp"
  mv "$exp_dir/.settings.tmp" "$exp_dir/.settings"
  # Weights that the targets can't serve are refused now, not behind the warm-up.
  icefall-kd doctor "${teacher[@]}" --student-dir "$exp_dir/start" \
    --cuts "$kd_dir/${manifests[0]}" \
    --kd "--kd-config '${kd_config//\'/\'\\\'\'}' $kd_flags" \
    ${chunked[@]+"${chunked[@]}"}
fi

if [ "$stage" -le 9 ] && [ "$stop_stage" -ge 4 ]; then
  [ -f "$exp_dir/start/student_flags" ] || fail "there is no student in" \
    "$exp_dir/start: run stage 3 first"
  read_flags "$exp_dir/start/student_flags"
  student_model=(--epoch "$last" --avg "$avg" ${words[@]+"${words[@]}"})
  if [ -z "$export" ]; then
    export=export-onnx
    if is_causal "${student_model[@]}"; then export+=-streaming; fi
    if ! has_transducer "${student_model[@]}"; then export+=-ctc; fi
    export="export.py $export.py"
  fi
  # What would stop stages 8 and 9 is said before days of training.
  decodings=() scripts=()
  split decode
  for d in ${words[@]+"${words[@]}"}; do
    if suits "${d%%:*}" "${student_model[@]}"; then decodings+=("$d"); fi
  done
  [ "${#decodings[@]}" -gt 0 ] || [ "$stop_stage" -lt 8 ] || fail "--decode is" \
    "'$decode', and the student has no such head: give" \
    "ctc_decode.py:ctc-greedy-search or decode.py:greedy_search"
  split export
  if [ "$stop_stage" -ge 8 ]; then scripts+=("${decodings[@]%%:*}"); fi
  if [ "$stop_stage" -ge 9 ]; then scripts+=(${words[@]+"${words[@]}"}); fi
  for script in ${scripts[@]+"${scripts[@]}"}; do
    [ -f "$recipe/$script" ] || fail "$asr_dir/$recipe has no $script: give --decode" \
      "(now $decode) and --export (now $export) scripts that it has"
  done
fi

if asked 4 "warm-up on hard labels, $warmup_epochs epochs"; then
  # An epoch of S on 4 V100: about 4 minutes for 100 h, 40 minutes for 960 h (three
  # speeds each, an estimate).
  train "$exp_dir/start" 2 $((1 + warmup_epochs))
fi

if asked 5 "distillation, $kd_epochs epochs"; then
  # A step takes at most 10 % longer than without: benchmarks/step.py.
  split kd_flags
  kd_words=(${words[@]+"${words[@]}"})
  begin kd
  train "$exp_dir/kd" $((2 + warmup_epochs)) $((1 + warmup_epochs + kd_epochs)) \
    --kd-config "$kd_config" ${kd_words[@]+"${kd_words[@]}"}
fi

if asked 6 "fine-tuning on hard labels, $finetune_epochs epochs"; then
  train "$exp_dir/kd" $((2 + warmup_epochs + kd_epochs)) "$last"
fi

if asked 7 "the same student without distillation"; then
  # As long as stages 5 and 6 together, with which it may run side by side, on other
  # GPUs and with another --master-port in train_flags.
  if [ "$baseline" = true ]; then
    begin no-kd
    train "$exp_dir/no-kd" $((2 + warmup_epochs)) "$last"
  fi
fi

# decode_model FOLDER EPOCH AVG FLAG...: by each method that the model has a head for.
decode_model() {
  local folder=$1 name d script method mark i flags
  name=.epoch-$2-avg-$3
  shift 3
  flags=("$@")
  if is_causal "$@"; then
    flags+=("${chunks[@]}")
    name+=-chunk-$chunk_size-left-$left_context_frames
  fi
  for d in "${decodings[@]}"; do
    script=${d%%:*} method=${d##*:}
    suits "$script" "$@" || continue
    mark=$folder/$method/$name.done
    if [ -f "$mark" ]; then log "$folder: $method is done"; continue; fi
    log "$folder: $method"
    split decode_flags
    if [ "$script" = ctc_decode.py ]; then
      more=(--lang-dir "$(dirname "$tokens_file")" ${words[@]+"${words[@]}"})
      split ctc_decode_flags
      words=("${more[@]}" ${words[@]+"${words[@]}"})
    fi
    words=("${flags[@]}" ${words[@]+"${words[@]}"})
    if ! grep -q -e '"--context-size"' "$recipe/$script"; then
      for i in "${!words[@]}"; do
        if [ "${words[$i]-}" = --context-size ]; then
          unset "words[$i]" "words[$((i + 1))]"
        fi
      done
    fi
    "${python[@]}" "./$recipe/$script" --exp-dir "$folder" --decoding-method "$method" \
      --manifest-dir "$manifest_dir" ${token_flags[@]+"${token_flags[@]}"} \
      "${words[@]}" || fail "$script can't decode $asr_dir/$folder by $method: mend what" \
      "it says above, and go on with --stage 8"
    touch "$mark"
  done
}
if asked 8 "decoding"; then
  # Minutes on one GPU for each method and model.
  decode_model "$teacher_dir" "$teacher_epoch" "$teacher_avg" "${teacher_model[@]}"
  decode_model "$exp_dir/kd" "$last" "$avg" "${student_model[@]}"
  if [ "$baseline" = true ]; then
    decode_model "$exp_dir/no-kd" "$last" "$avg" "${student_model[@]}"
  fi
fi

if asked 9 "export of the distilled student"; then
  # Minutes, no GPU. The recipe's own scripts, which know nothing of distillation.
  if is_causal "${student_model[@]}"; then student_model+=("${chunks[@]}"); fi
  split export
  for script in ${words[@]+"${words[@]}"}; do
    jit=()
    if [ "$script" = export.py ]; then jit=(--jit 1); fi
    "${python[@]}" "./$recipe/$script" --exp-dir "$exp_dir/kd" --tokens "$tokens_file" \
      "${student_model[@]}" ${jit[@]+"${jit[@]}"} || fail "$script can't export" \
      "$asr_dir/$exp_dir/kd: mend what it says above (export-onnx*.py need pip install" \
      "onnx onnxruntime), and go on with --stage 9"
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
