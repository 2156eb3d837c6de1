# To be sourced, after shared/stoppable.sh.

# train FOLDER FIRST LAST FLAGS: those of the epochs FIRST to LAST that are not done.
train() {
  local folder=$1 first=$2 last=$3
  shift 3
  while [ -f "$folder/epoch-$first.pt" ]; do first=$((first + 1)); done
  # With --patience the dev cuts may not be decoded yet after the last one.
  if [ "$first" -gt "$last" ] && [ "${patience:-0}" -eq 0 ]; then
    echo "$folder has its epoch $last"
    return
  fi
  echo "$folder: training from epoch $first to $last"
  run ./zipformer/train.py --exp-dir "$folder" --start-epoch "$first" \
    --num-epochs "$last" "$@"
}

# copy_student FROM TO: the checkpoint last, as a sign that all is copied.
copy_student() {
  mkdir -p "$2"
  cp "$1/student_flags" "$2/"
  cp "$1/epoch-1.pt" "$2/.tmp.epoch-1.pt"
  mv "$2/.tmp.epoch-1.pt" "$2/epoch-1.pt"
}

# last_epoch FOLDER EPOCH: the best epoch of a training to the end, or else EPOCH.
last_epoch() {
  if [ -f "$1/best-epoch" ]; then cat "$1/best-epoch"; else echo "$2"; fi
}

# averaged EPOCH: how many epochs up to this one are averaged; zipformer/dev_wer.py
# averages as many.
averaged() {
  if [ "$1" -gt "$avg" ]; then echo "$avg"; else echo $(($1 > 1 ? $1 - 1 : 1)); fi
}

# average_flags FOLDER EPOCH: the options with which a model is loaded. A folder with one
# checkpoint, epoch-99.pt, holds a released model, as icefall users name it.
average_flags() {
  if [ "$2" -eq 99 ] && [ ! -f "$1/epoch-98.pt" ]; then
    echo "--avg 1 --use-averaged-model 0"
  else
    echo "--avg $(averaged "$2")"
  fi
}
