#!/usr/bin/env bash
# The tables of decode.py and shortcuts.py on a GPU, within ten minutes.
# Usage: benchmarks/decode_gpu.sh OUT_DIR OPTIONS
# OPTIONS are those of both: --exp-dir, --epoch, --bpe-model, --manifest, and others.
# With DEVICE=cpu and --num-cuts 8 it tries out the same on a CPU.
set -eou pipefail
cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/.."
if [ $# -lt 2 ]; then
  sed -n '2,5s/^# //p' benchmarks/decode_gpu.sh >&2
  exit 1
fi
device=${DEVICE:-cuda}
if [ "$device" = cuda ] &&
  ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "decode_gpu.sh: there is no GPU here, so nothing was measured"
  exit 0
fi
out=$1
shift
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
# A table that isn't done in its time is left out, and the other is there.
for table in decode shortcuts; do
  timeout "${SECONDS_EACH:-290}" python "benchmarks/$table.py" --device "$device" "$@" \
    --json "$out/$table.json" | tee "$out/$table.txt" ||
    echo "decode_gpu.sh: $table.py ended without a result, see above" >&2
done
