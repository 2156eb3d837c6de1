#!/usr/bin/env bash
# To be sourced by kd.sh: jobs by a launcher such as Kaldi's run.pl, slurm.pl or queue.pl.
# It is called as
#
#   LAUNCHER [OPTION ...] JOB=1:N FOLDER/NAME.JOB.log bash FOLDER/NAME.sh JOB
#
# and runs the command N times with JOB replaced by the numbers from 1 on. It ends when
# all have ended, with another status than 0 if one of them had. NAME.sh is written here:
# kd.sh again, with the same options, for one task. Slurm's array numbers tasks from 1,
# and icefall_kd numbers jobs from 0; NAME.sh translates.

# check_launcher: a launcher, and what it can't be used with, is refused before the work.
check_launcher() {
  local folder
  split cmd
  [ "${#words[@]}" -gt 0 ] && command -v "${words[0]}" > /dev/null || fail "--cmd is" \
    "'$cmd', and there is no such program: give the path of a launcher as Kaldi's" \
    "run.pl or slurm.pl, with its options"
  [ -z "$job" ] || fail "--job is $job and --cmd '$cmd', which gives out all jobs: give" \
    "one of the two"
  # Kaldi's launchers hand names to a shell without quotes, and put a number for each JOB.
  for folder in "$PWD" "$targets_dir" "$exp_dir"; do
    [[ $folder =~ ^[A-Za-z0-9_./@%+,=:-]+$ && $folder != *JOB* ]] || fail "the folder" \
      "$folder has a space or another special character in its name, or JOB, which" \
      "launchers take otherwise: name it otherwise, or leave --cmd out"
  done
}

# launch NAME FOLDER STAGE TASK...: all tasks at the same time, each "FUNCTION WORD...";
# their logs and the script are in FOLDER. Fails if one of them did.
launch() {
  local name=$1 folder=$2 stage_of_tasks=$3 file=$2/$1.sh
  shift 3
  mkdir -p "$folder"
  write_job_script "$stage_of_tasks" "$@" > "$file.tmp"
  mv "$file.tmp" "$file"
  split cmd
  log "$# jobs by $cmd; their logs are $folder/$name.*.log"
  in_group "${words[@]}" JOB=1:$# "$folder/$name.JOB.log" bash "$file" JOB || fail "a job" \
    "of $cmd failed: correct what its log $asr_dir/$folder/$name.*.log says, and give the" \
    "same command again; what is done is not done again"
}

# write_job_script STAGE TASK...: to stdout. A queue may start it without this
# environment, so the variables that find programs are in it.
write_job_script() {
  local name first=$1
  shift
  echo "#!/usr/bin/env bash"
  echo "# Written by kd.sh. bash FILE N does task N, from 1 on."
  printf 'tasks=('
  printf '%q ' "$@"
  printf ')\ncd %q\n' "$caller"
  for name in PATH PYTHONPATH LD_LIBRARY_PATH; do
    if [ -n "${!name-}" ]; then printf 'export %s=%q\n' "$name" "${!name}"; fi
  done
  # A queue gives a job its GPU. Jobs on one machine see all, and take them in turn.
  echo 'IFS=, read -r -a gpus <<< "${CUDA_VISIBLE_DEVICES-$(nvidia-smi \'
  echo '  --query-gpu=index --format=csv,noheader 2>/dev/null | paste -sd,)}"'
  echo '[ "${#gpus[@]}" -lt 2 ] \'
  echo '  || export CUDA_VISIBLE_DEVICES=${gpus[$((($1 - 1) % ${#gpus[@]}))]}'
  printf 'exec bash'
  printf ' %q' "$script" "${arguments[@]}"
  printf ' --cmd "" --stage %s --stop-stage %s --task "${tasks[$(($1 - 1))]}"\n' \
    "$first" "$first"
}

# do_task: that of this job. The script ends with it.
do_task() {
  local parts
  read -r -a parts <<< "$task"
  "${parts[0]}_job" "${parts[@]:1}"
  log "$task is done"
  exit 0
}

# in_group COMMAND ...: in a process group of its own. When this script ends, so does the
# group: a launcher that is killed would leave its jobs behind.
in_group() {
  local status=0
  set -m
  "$@" &
  group=$!
  set +m
  trap 'kill -- "-$group" 2>/dev/null || true; stop_jobs' EXIT
  wait "$group" || status=$?
  trap stop_jobs EXIT
  return "$status"
}
