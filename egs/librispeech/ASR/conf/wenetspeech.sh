# ./kd.sh --config conf/wenetspeech.sh --asr-dir ~/icefall/egs/wenetspeech/ASR
# 10,000 h.
teacher_epoch=12
teacher_avg=4
tokens="--lang-dir data/lang_char"
tokens_file=data/lang_char/tokens.txt
train_manifests=cuts_L_fixed.jsonl.gz
train_flags="--training-subset L --max-duration 450 --use-fp16 1 --lr-epochs 1.5"
first_epochs=1
kd_epochs=8
last_epochs=1
avg=4
decode="decode.py:greedy_search decode.py:modified_beam_search"
test_manifests="cuts_TEST_NET.jsonl.gz cuts_TEST_MEETING.jsonl.gz"
unit=CER
