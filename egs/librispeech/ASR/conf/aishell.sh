# ./kd.sh --config conf/aishell.sh --asr-dir ~/icefall/egs/aishell/ASR
# The transducer of icefall's RESULTS.md: 170 h and their three speeds.
teacher_epoch=55
teacher_avg=17
tokens="--lang-dir data/lang_char"
tokens_file=data/lang_char/tokens.txt
train_manifests=aishell_cuts_train.jsonl.gz
train_flags="--max-duration 1000 --use-fp16 1 --lr-batches 7500 --lr-epochs 18"
decode="decode.py:greedy_search decode.py:modified_beam_search"
test_manifests=aishell_cuts_test.jsonl.gz
unit=CER
