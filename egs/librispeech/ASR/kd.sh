#!/usr/bin/env bash
# From a trained teacher to a distilled student, in your own icefall. See README.md.
#
#   ./kd.sh --asr-dir ~/icefall/egs/librispeech/ASR --student s
#
# Set the options here, in a file that you name by --config, or on the command line:
# --teacher-epoch 50 sets teacher_epoch. For other recipes: --config conf/aishell.sh, ...
set -eou pipefail

# Options
asr_dir=                      # icefall's egs/librispeech/ASR, with its data/
recipe=zipformer              # the folder of train.py in asr_dir
teacher_exp_dir=zipformer/exp # the --exp-dir of the teacher's training
teacher_epoch=30              # the --epoch that you give to decode.py
teacher_avg=9                 # and the --avg
teacher_flags=                # model flags, where the checkpoint has parameters alone
tokens="--bpe-model data/lang_bpe_500/bpe.model"  # or "--lang-dir data/lang_char"
tokens_file=data/lang_bpe_500/tokens.txt  # for ctc_decode.py and the recipe's export scripts
student=s                     # a preset of `icefall-kd student --list`, or a size: 5M
train_manifests=librispeech_cuts_train-clean-100.jsonl.gz  # in manifest_dir
unlabelled_manifests=         # speech without transcripts, in manifest_dir, which the teacher
                              # labels; it is mixed into the first of train_manifests
train_flags="--full-libri 0 --max-duration 1000 --use-fp16 1"  # of train.py
# The options above are yours to fill in; those below have defaults that work.
world_size=1                  # number of GPUs to train on
student_flags=                # of `icefall-kd student`, such as --channels important
first_epochs=3                # epochs on hard labels alone, before distillation
kd_epochs=24                  # epochs with distillation
last_epochs=3                 # epochs on hard labels alone, after distillation
avg=9                         # epochs that the decoding of a student averages
kd_config=                    # weights of the losses; default: conf/kd*.yaml, by heads
kd_flags=                     # override kd_config, such as --kd-temperature 2
keep=adaptive:0.999:16        # form of the stored CTC targets; see icefall-kd dump --help
keep_lattice=adaptive:0.999:16  # form of the stored lattices, or none
keep_hidden=none              # out:half stores the encoder output, which is large
keep_simple=none              # form of the simple joiner's targets, for --kd-simple-weight
label_flags=                  # of icefall-kd label, such as "--decoding-method modified_beam_search"
filter_flags="--max-repeats 4"  # of icefall-kd filter, such as --min-score -0.1
mix_weights=                  # such as "3 1": three of four cuts with transcripts, one
                              # with labels; by default each cut once
dump_max_duration=600         # seconds of audio in a batch of the teacher
chunk_size=16                 # stack frames (50 Hz) of a causal model's chunk, for targets,
                              # decoding and export
left_context_frames=128       # stack frames (50 Hz) of its left context, likewise
baseline=true                 # true: also train the student without distillation
decode="decode.py:greedy_search decode.py:modified_beam_search ctc_decode.py:ctc-greedy-search"  # SCRIPT:METHOD ...
                              # icefall-kd:METHOD decodes by icefall-kd
test_manifests="librispeech_cuts_test-clean.jsonl.gz librispeech_cuts_test-other.jsonl.gz"  # for icefall-kd; the first one also for --export
decode_flags="--max-duration 600"  # of the decoding scripts
ctc_decode_flags=             # flags of ctc_decode.py alone
export=icefall-kd             # or the recipe's scripts, such as "export.py export-onnx.py"
export_flags="--num-cuts 200" # of icefall-kd export, such as --int8 encoder; it compares
                              # its files with the model on so many test cuts
unit=WER                      # CER for a recipe whose tokens are characters
manifest_dir=data/fbank       # manifests of the recipe
targets_dir=data/kd           # targets, and the manifests whose cuts point at them
exp_dir=                      # experiment folders of students; default: RECIPE_kd/exp-STUDENT
python=python3                # the Python of icefall's environment
num_jobs=1                    # number of jobs in stage 2, each on one GPU
cmd=                          # a launcher as Kaldi's that runs the jobs of stages 2 and 8, such
                              # as "slurm.pl --gpu 1"; by default they run here
job=                          # run this job alone (Slurm): 0 to num_jobs - 1
stage=0                       # first stage
stop_stage=10                 # last stage
config=                       # a file that sets some of these options

help_message="Usage: $0 [--config FILE] [--option value ...]
Stages: 0 checks, 1 plug, 2 targets, 3 student, 4 first epochs, 5 distillation,
  6 last epochs, 7 student without distillation, 8 decoding, 9 export, 10 report.
A stage continues where it was stopped. Example:
  $0 --asr-dir ~/icefall/egs/librispeech/ASR --student s --stop-stage 2"
renamed="teacher_dir:teacher_exp_dir kd_dir:targets_dir nj:num_jobs
  warmup_epochs:first_epochs finetune_epochs:last_epochs"

task=  # what a job of --cmd does, such as "dump 0"; local/launcher.sh sets it
arguments=("$@")
caller=$PWD
script=$(realpath "${BASH_SOURCE[0]}")
script_dir=$(dirname "$script")

fail() {
  echo "kd.sh: error: $*" >&2
  exit 1
}

log() {
  echo "$(date '+%Y-%m-%d %H:%M:%S') (kd.sh) $*"
}

# find_file PATH: from the working folder, or from this script's folder.
find_file() {
  local f
  for f in "$1" "$caller/$1" "$script_dir/$1"; do
    [ -f "$f" ] && { realpath "$f"; return; }
  done
  fail "the file $1 does not exist"
}

# read_config PATH: a file of options; former names are refused, as on the command line.
read_config() {
  local file pair
  file=$(find_file "$1") || exit 1
  for pair in $renamed; do unset "${pair%:*}"; done
  . "$file"
  for pair in $renamed; do
    [ ! -v "${pair%:*}" ] || fail "$1 sets ${pair%:*}, which is now called ${pair#*:}"
  done
}

. "$script_dir/shared/threads.sh"
. "$script_dir/shared/stoppable.sh"

# The file first, so that options on the command line override it.
previous=
for word in "$@"; do
  if [ "$previous" = --config ]; then read_config "$word"; fi
  previous=$word
done
. "$script_dir/shared/parse_options.sh"
. "$script_dir/shared/check_options.sh"
. "$script_dir/local/words.sh"
. "$script_dir/local/models.sh"
. "$script_dir/local/unlabelled.sh"
. "$script_dir/local/launcher.sh"

# Check the options.
for path in asr_dir recipe teacher_exp_dir tokens_file manifest_dir targets_dir exp_dir; do
  while [[ ${!path} == ?*/ ]]; do printf -v "$path" %s "${!path%/}"; done
  [[ ${!path} != -* ]] || fail "--${path//_/-} is '${!path}', which programs take for" \
    "an option: give ./${!path}"
done
check_numbers 0 teacher_epoch teacher_avg first_epochs last_epochs avg world_size \
  stage stop_stage
check_numbers 1 kd_epochs num_jobs
check_switch baseline
for number in chunk_size left_context_frames; do
  [[ ${!number} =~ ^(-1|[0-9]+)$ ]] || fail "--${number//_/-} is '${!number}', and" \
    "must be one number of stack frames (50 Hz), or -1 for all"
done
[[ -z $job || ( $job =~ ^[0-9]+$ && $job -lt $num_jobs ) ]] \
  || fail "--job is $job and --num-jobs $num_jobs: give --job 0 to $((num_jobs - 1))"
last=$((1 + first_epochs + kd_epochs + last_epochs))  # epoch-1.pt is untrained
[ "$avg" -ge 1 ] && [ "$avg" -lt "$last" ] || fail "--avg is $avg and the student has" \
  "$((last - 1)) epochs to average: give 1 to $((last - 1))"
case " $teacher_flags" in
  *" --chunk-size"*|*" --left-context-frames"*) fail "--teacher-flags is" \
    "'$teacher_flags': give --chunk-size and --left-context-frames to kd.sh itself" ;;
esac

# Check the folders and programs, and go to icefall's folder.
[ -n "$asr_dir" ] || fail "--asr-dir is missing, icefall's folder egs/librispeech/ASR"
[ -d "$asr_dir" ] || fail "there is no folder $asr_dir: give --asr-dir icefall's" \
  "egs/librispeech/ASR"
[ -d "$asr_dir/$recipe" ] || fail "$asr_dir has no folder $recipe: give --asr-dir" \
  "icefall's egs/librispeech/ASR, and --recipe the folder of train.py in it"
if [ -n "$kd_config" ]; then kd_config=$(find_file "$kd_config") || exit 1; fi
asr_dir=$(realpath "$asr_dir")
cd "$asr_dir"
icefall=$(realpath ../../..)
[[ $icefall != *:* ]] || fail "the folder $icefall has a colon in its name, where" \
  "PYTHONPATH ends a path: rename it"
export PYTHONPATH=$icefall${PYTHONPATH:+:$PYTHONPATH}
[ -d "$teacher_exp_dir" ] || fail "$asr_dir has no folder $teacher_exp_dir: give" \
  "--teacher-exp-dir the --exp-dir of the teacher's training"
command -v icefall-kd > /dev/null || fail "there is no command icefall-kd: activate" \
  "icefall's environment, and install icefall_kd in it (README.md)"
if command -v "$python" > /dev/null; then words=("$python"); else split python; fi
command -v "${words[0]-}" > /dev/null || fail "--python is '$python', and there is no" \
  "such program: give the Python of icefall's environment"
python_words=("${words[@]}")
plugged=${recipe}_kd
exp_dir=${exp_dir:-$plugged/exp-$student}

if [ -n "$cmd" ]; then check_launcher; fi

# The training manifests that the patterns name.
expand_manifests train_manifests
manifests=("${expanded[@]}")
[ "${#manifests[@]}" -gt 0 ] || fail "--train-manifests is empty: name those of" \
  "$asr_dir/$manifest_dir that the student trains on"

expand_manifests unlabelled_manifests
unlabelled=("${expanded[@]}")
mixture=
if [ "${#unlabelled[@]}" -gt 0 ]; then
  check_unlabelled
  mixture="${manifests[0]}, unlabelled ${unlabelled[*]}, label $label_flags, filter \
$filter_flags, weights $mix_weights"
fi

# Options of several words, as arrays.
split tokens
token_flags=("${words[@]}")
teacher=(--recipe "./$recipe" --exp-dir "$teacher_exp_dir" --epoch "$teacher_epoch"
  --avg "$teacher_avg" "${token_flags[@]}")
split teacher_flags
teacher_size=("${words[@]}")
split train_flags
train_words=("${words[@]}")
chunks=(--chunk-size "$chunk_size" --left-context-frames "$left_context_frames")

# What takes long runs by `run`, so that it ends with this script.
icefall-kd() { run icefall-kd "$@"; }
python=(run "${python_words[@]}")

# between FIRST LAST: whether a stage from FIRST to LAST is asked for.
between() {
  [ "$stage" -le "$2" ] && [ "$stop_stage" -ge "$1" ]
}
# is_due N TITLE: whether stage N is asked for; if so, log its title.
is_due() {
  between "$1" "$1" && log "Stage $1: $2"
}

# Size, heads and causality of the teacher are read from its checkpoint in stage 0, or in
# a later one if the file of flags is missing or belongs to another teacher.
identity="$teacher_exp_dir $teacher_epoch $teacher_avg $teacher_flags"
teacher_is_unknown() {
  between 2 8 || return 1
  [ "$(cat "$targets_dir/.teacher" 2>/dev/null)" != "$identity" ] \
    || [ "$teacher_exp_dir/epoch-$teacher_epoch.pt" -nt "$targets_dir/.teacher" ]
}
if is_due 0 "what is installed, and whether teacher, tokens and cuts fit" \
  || teacher_is_unknown; then
  # 1 minute
  mkdir -p "$targets_dir"
  icefall-kd doctor "${teacher[@]}" --cuts "$manifest_dir/${manifests[0]}" \
    --write-flags "$targets_dir/.teacher_flags" "${teacher_size[@]}"
  echo "$identity" > "$targets_dir/.teacher"
fi
read_flags "$targets_dir/.teacher_flags"
teacher_model=(--epoch "$teacher_epoch" --avg "$teacher_avg" "${teacher_size[@]}"
  "${words[@]}")
# The flags with which the teacher computes targets: in chunks, if it is causal.
chunked=("${teacher_size[@]}")
if is_causal "${teacher_model[@]}"; then chunked+=("${chunks[@]}"); fi
# A head that the teacher lacks has no targets and no losses.
losses=kd.yaml
if ! has_ctc "${teacher_model[@]}"; then
  losses=kd-transducer.yaml
  keep=none
fi
if ! has_transducer "${teacher_model[@]}"; then
  losses=kd-ctc.yaml
  keep_lattice=none
fi
kd_config=${kd_config:-$script_dir/conf/$losses}
case $student in
  *-streaming) is_causal "${teacher_model[@]}" || [ "$stop_stage" -lt 2 ] \
    || [[ $student_flags == *"--init random"* ]] || fail "the student $student is" \
    "causal and its teacher is not, so it can't start from the teacher's layers: give" \
    "--student-flags \"--init random\", or another --student" ;;
esac

# Students of other settings in the same folder would be taken for these. What makes
# training fit a machine may change later.
machine='--(max-duration|num-workers|num-buckets|master-port|save-every-n|keep-last-k) [0-9]+'
if between 3 7; then
  settings="teacher $teacher_exp_dir $teacher_epoch $teacher_avg, student $student \
$student_flags, epochs $first_epochs+$kd_epochs+$last_epochs, \
$(sed -E "s/$machine *//g" <<< "$train_flags"), \
$(sed 's/#.*//' "$kd_config" | tr -s ' \n' ' ')$kd_flags${mixture:+, mixture $mixture}"
  if [ -f "$exp_dir/.settings" ] && [ "$(cat "$exp_dir/.settings")" != "$settings" ]; then
    fail "$exp_dir holds students of other settings ($(cat "$exp_dir/.settings"))," \
      "not these ($settings): give another --exp-dir, or remove that folder"
  fi
fi

if is_due 1 "a copy of $recipe with distillation plugged in, $plugged"; then
  # seconds; nothing of icefall's own is changed
  icefall-kd plug "./$recipe" "./$plugged"
fi

if is_due 2 "the teacher's targets, $targets_dir"; then
  # On one V100 about 1 hour for 100 h and 9 hours for 960 h with a teacher of size L,
  # an estimate; divided by --num-jobs. Disk for an hour of speech: 3 MB; --keep-hidden
  # out:half adds 140 MB (L) or 92 MB (M). The three speeds count each.
  [ -d "$plugged" ] || fail "there is no $asr_dir/$plugged: run stage 1 first"
  mkdir -p "$targets_dir/log"
  if [ -n "$task" ]; then do_task; fi
  link_other_manifests
  if [ -n "$job" ]; then
    dump_job "$job"
    log "Job $job is done; continue with stage 3 when all $num_jobs are"
    exit 0
  fi
  if [ -n "$mixture" ]; then
    # Decoding takes a few times as long as the targets of the same speech.
    log "The teacher labels ${unlabelled[*]}"
    in_jobs label
    filter_labels
  fi
  in_jobs dump
  if [ -n "$mixture" ]; then mix_parts; fi
fi
if between 3 7; then
  if [ "$(cat "$targets_dir/.mixture" 2>/dev/null)" != "$mixture" ]; then
    fail "$targets_dir/${manifests[0]} is mixed otherwise than these options say" \
      "(${mixture:-no --unlabelled-manifests}): run stage 2 with them, in another" \
      "--targets-dir if they have changed"
  fi
  for m in "${manifests[@]}"; do
    if [ -L "$targets_dir/$m" ]; then
      fail "$targets_dir/$m has no targets: run stage 2 first"
    fi
    if [ ! -f "$targets_dir/$m" ] && [ "$num_jobs" -gt 1 ] \
      && [ "${#manifests[@]}" -eq 1 ]; then
      icefall-kd combine --num-jobs "$num_jobs" "$manifest_dir/$m" "$targets_dir/$m"
    fi
    [ -f "$targets_dir/$m" ] \
      || fail "there are no targets $targets_dir/$m: run stage 2 first"
  done
fi

if is_due 3 "the student $student, $exp_dir"; then
  # 1 minute
  case $student in
    xl|l|m|s|kws|10m|6m|3m|1m|*-streaming) size=(--preset "$student") ;;
    [0-9]*) size=(--params "$student") ;;
    *) size=() ;;  # a name; --student-flags hold the size
  esac
  split student_flags
  if [ -f "$exp_dir/start/epoch-1.pt" ] && [ -f "$exp_dir/.settings" ]; then
    log "$exp_dir/start has its epoch-1.pt"
  else
    # Without chunks: those are for decoding, and a student trains with several.
    icefall-kd student "${teacher[@]}" --student-dir "$exp_dir/start" "${size[@]}" \
      "${words[@]}" "${teacher_size[@]}"
  fi
  echo "$settings" > "$exp_dir/.settings.tmp"
  mv "$exp_dir/.settings.tmp" "$exp_dir/.settings"
  # Weights that the targets can't serve are refused before any training.
  icefall-kd doctor "${teacher[@]}" --student-dir "$exp_dir/start" \
    --cuts "$targets_dir/${manifests[0]}" \
    --kd "--kd-config '${kd_config//\'/\'\\\'\'}' $kd_flags" "${chunked[@]}"
fi

if between 4 9; then
  # What would stop stages 8 and 9 is refused before days of training.
  [ -f "$exp_dir/start/student_flags" ] || fail "there is no student in" \
    "$exp_dir/start: run stage 3 first"
  read_flags "$exp_dir/start/student_flags"
  student_model=(--epoch "$last" --avg "$avg" "${words[@]}")
  choose_scripts
fi

if is_due 4 "the first $first_epochs epochs, on hard labels alone"; then
  # An epoch of S on 4 V100: about 4 minutes for 100 h, 40 minutes for 960 h (three
  # speeds each, an estimate).
  train "$exp_dir/start" 2 $((1 + first_epochs))
fi

if is_due 5 "distillation, $kd_epochs epochs"; then
  # A step takes at most 10 % longer than without: benchmarks/step.py.
  split kd_flags
  kd_words=("${words[@]}")
  copy_start kd
  train "$exp_dir/kd" $((2 + first_epochs)) $((1 + first_epochs + kd_epochs)) \
    --kd-config "$kd_config" "${kd_words[@]}"
fi

if is_due 6 "the last $last_epochs epochs, on hard labels alone"; then
  train "$exp_dir/kd" $((2 + first_epochs + kd_epochs)) "$last"
fi

if is_due 7 "the same student without distillation"; then
  # As long as stages 5 and 6 together. It may run at the same time as these, on other
  # GPUs and with another --master-port in train_flags.
  if [ "$baseline" = true ]; then
    copy_start no-kd
    train "$exp_dir/no-kd" $((2 + first_epochs)) "$last"
  fi
fi

if is_due 8 "decoding"; then
  # Minutes on one GPU for each method and model.
  if [ -n "$task" ]; then do_task; fi
  decode_models
fi

if is_due 9 "export of the distilled student"; then
  # Minutes, no GPU. The recipe's own scripts only if --export names them.
  if is_causal "${student_model[@]}"; then student_model+=("${chunks[@]}"); fi
  split export
  for script_name in "${words[@]}"; do
    if [ "$script_name" = icefall-kd ]; then export_by_icefall_kd; continue; fi
    jit=()
    if [ "$script_name" = export.py ]; then jit=(--jit 1); fi
    "${python[@]}" "./$recipe/$script_name" --exp-dir "$exp_dir/kd" \
      --tokens "$tokens_file" "${student_model[@]}" "${jit[@]}" \
      || fail "$script_name can't export $asr_dir/$exp_dir/kd: correct what its message names" \
        "(export-onnx*.py need pip install onnx onnxruntime), and go on with --stage 9"
  done
fi

if is_due 10 "report"; then
  models=(--model "teacher=$teacher_exp_dir")
  if [ "$baseline" = true ]; then models+=(--model "without KD=$exp_dir/no-kd"); fi
  models+=(--model "with KD=$exp_dir/kd")
  for m in "${manifests[@]}"; do models+=(--targets "$targets_dir/$m"); done
  for lang in en zh; do
    icefall-kd report "${models[@]}" --manifest-dir "$manifest_dir" --unit "$unit" \
      --lang "$lang" "$exp_dir/report"
  done
  log "Done. The report is in $asr_dir/$exp_dir/report, the student in $exp_dir/kd, and" \
    "what was exported of it in $exp_dir/kd/export"
fi
