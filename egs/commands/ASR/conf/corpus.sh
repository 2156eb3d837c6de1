# To be sourced by the digits recipe's run.sh: what differs in this recipe.
corpus=commands
num_train=2000
num_dev=500
num_test=800
vocab_size=120
teacher_set="encoder-dim=64,128,128 encoder-unmasked-dim=48,96,96 feedforward-dim=128,256,256 decoder-dim=128 joiner-dim=128"
teacher_epochs=25
student_set="embed-channels=8,16,32 encoder-dim=32,32,32 encoder-unmasked-dim=32,32,32 num-encoder-layers=1,1,1 feedforward-dim=64,64,64 decoder-dim=48 joiner-dim=48 num-heads=3,3,3"
student_init=random
student_epochs=60
patience=6
avg=3
train_flags="--max-duration 15 --lr-epochs 3.5 --enable-spec-aug true"
