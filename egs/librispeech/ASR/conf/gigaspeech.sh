# ./kd.sh --config conf/gigaspeech.sh --asr-dir ~/icefall/egs/gigaspeech/ASR
# 10,000 h in 1,000 manifests.
train_manifests="gigaspeech_XL_split/gigaspeech_cuts_XL.*.jsonl.gz"
train_flags="--subset XL --max-duration 700 --use-fp16 1 --lr-epochs 1"
first_epochs=1
kd_epochs=8
last_epochs=1
avg=4
decode="decode.py:greedy_search decode.py:modified_beam_search"
test_manifests=gigaspeech_cuts_TEST.jsonl.gz
decode_flags="--max-duration 1000"
