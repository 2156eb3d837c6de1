# To be sourced by the digits recipe's run.sh: what differs in this recipe.
corpus=commands
num_train=6000
num_dev=500
num_test=800
vocab_size=120
teacher_set="embed-channels=8,24,64 encoder-dim=64,128,128 encoder-unmasked-dim=48,96,96 feedforward-dim=128,256,256 decoder-dim=128 joiner-dim=128 ctc-loss-scale=0.2 ref-duration=10 lr-batches=500 lr-epochs=1.5 max-duration=30"
teacher_epochs=12
student_set="embed-channels=8,16,32 encoder-dim=32,32,32 encoder-unmasked-dim=32,32,32 num-encoder-layers=1,1,1 feedforward-dim=64,64,64 decoder-dim=48 joiner-dim=48 num-heads=3,3,3"
student_init=random
student_epochs=12
patience=3
avg=2
train_flags="--max-duration 15 --ctc-loss-scale 1 --ref-duration 2 --lr-batches 2000 --lr-epochs 2 --enable-spec-aug true --save-every-n 1000000"
