# ./kd.sh --config conf/wenetspeech.sh --asr-dir ~/icefall/egs/wenetspeech/ASR
# 10,000 h.
recipe=zipformer
teacher_dir=zipformer/exp
teacher_epoch=12
teacher_avg=4
teacher_flags=
tokens="--lang-dir data/lang_char"
tokens_file=data/lang_char/tokens.txt
student=s
train_manifests=cuts_L_fixed.jsonl.gz
train_flags="--training-subset L --max-duration 450 --use-fp16 1 --lr-epochs 1.5"
use_ctc=0
warmup_epochs=1
kd_epochs=8
finetune_epochs=1
avg=4
kd_config=conf/kd-transducer.yaml
keep=none
decode="decode.py:greedy_search decode.py:modified_beam_search"
unit=CER
