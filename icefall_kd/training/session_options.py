"""The ``--kd-*`` options of no term alone: the joint loss, the session, its teacher."""

from icefall_kd.terms.base import Option
from icefall_kd.terms.schedule import Curve

SESSION_OPTIONS = (
    Option(
        "hard-weight",
        "hard_weight",
        Curve,
        1.0,
        "Weight of the recipe's own loss beside the terms. It is a number such as 0.5, "
        "or numbers by epoch. Without distillation the recipe's loss keeps its weight "
        "of 1.",
    ),
    Option(
        "schedule",
        "schedule",
        str,
        "scratch",
        "How the share of distillation in the loss changes. scratch: it is 1 from the "
        "first batch on. warmup: it is 0 for the first 15 %% of the epochs, which "
        "have the recipe's own loss alone, and rises to 1 in 5 %% of them. finetune: "
        "it rises from 0 to 1 in the first 5 %% of the epochs, for a student that has "
        "converged.",
    ),
    Option(
        "last-epochs",
        "last_epochs",
        float,
        0.0,
        "The number of last epochs that go without distillation, such as 2.",
    ),
    Option(
        "condition",
        "condition",
        str,
        "none",
        "Which utterances with a transcript teach. none: all. right: those where the "
        "best labels of the teacher's CTC targets are the transcript. better: those "
        "where the teacher's CTC loss of the transcript is below the student's at this "
        "step. The others have the recipe's own loss alone, with the weight that it "
        "has everywhere; kd_taught in the log is the share of utterances that teach. "
        "n-best lists always teach.",
    ),
    Option(
        "freeze",
        "freeze",
        str,
        "",
        "Submodules of the student that don't train, with spaces. A number after a "
        "colon is how many epochs of this training they stay frozen: 'encoder_embed "
        "encoder.0:1.5 decoder:2', where encoder.0 is the first stack. It also works "
        "without distillation.",
    ),
    Option(
        "int8-from",
        "int8_from",
        str,
        "",
        "The number of epochs after which the student's linear layers compute in "
        "training with weights and activations rounded as onnxruntime's "
        "quantize_dynamic rounds them: 0 from the first batch on, 1.5 from the middle "
        "of the second epoch on. Without a value they never do. Validation and the "
        "checkpoints stay in float32. It also works without distillation.",
    ),
    Option(
        "int8-scales",
        "int8_scales",
        str,
        "tensor",
        "With --kd-int8-from: how many scales a rounded weight has, as `icefall-kd "
        "export --int8-scales` will write it. tensor: one. channel: one for each "
        "channel that comes out, so that outliers of one do not cost the others.",
    ),
    Option(
        "missing",
        "missing",
        str,
        "refuse",
        "What happens to training cuts without targets. refuse: the training ends with "
        "an error. hard: they are trained on by the recipe's own loss alone, and "
        "kd_frames in the log is the share of frames that have targets.",
    ),
    Option(
        "time-warp",
        "time_warp",
        str,
        "off",
        "What happens to SpecAugment's time warp, which moves frames away from stored "
        "targets and from those of --kd-teacher-clean. off: it is switched off. "
        "follow: CTC targets, simple targets and hidden targets are warped alike.",
    ),
    Option(
        "stored-ranges",
        "stored_ranges",
        bool,
        False,
        "Whether the recipe's own pruned loss takes the label positions of each frame "
        "from the stored lattices, in place of the student's own pruning: true or "
        "false.",
    ),
    Option(
        "teacher-exp-dir",
        "exp_dir",
        str,
        "",
        "Experiment folder of a teacher that runs in the training process, in place of "
        "stored targets, such as zipformer/exp. The outputs of several teachers, with "
        "commas, are averaged.",
    ),
    Option(
        "teacher-epoch",
        "epoch",
        int,
        30,
        "The number N of the teacher's checkpoint epoch-N.pt.",
        bounds=(0, 10**6),
    ),
    Option(
        "teacher-iter",
        "iteration",
        int,
        0,
        "The number N of the teacher's checkpoint-N.pt, which is taken in place of an "
        "epoch, such as 8000; 0 for the epoch.",
        bounds=(0, 10**9),
    ),
    Option(
        "teacher-avg",
        "avg",
        int,
        1,
        "The number of checkpoints of the teacher that are averaged, such as 9.",
        bounds=(1, 10_000),
    ),
    Option(
        "teacher-use-averaged-model",
        "use_averaged_model",
        bool,
        True,
        "Whether the teacher is averaged over all steps between the first and the last "
        "checkpoint, as decode.py does: true or false. Give false for a checkpoint "
        "that has no model_avg.",
    ),
    Option(
        "teacher-bpe-model",
        "bpe_model",
        str,
        "",
        "The teacher's bpe.model, or the folder of its tokens.txt: for a checkpoint "
        "that holds parameters alone, such as a released pretrained.pt.",
    ),
    Option(
        "teacher-model-flags",
        "model_flags",
        str,
        "",
        "The model options of the teacher's decode.py, in one text, for such a "
        "checkpoint: '--num-encoder-layers 2,2 --encoder-dim 192,256'.",
    ),
    Option(
        "teacher-recipe",
        "recipe",
        str,
        "",
        "Folder with the train.py of the teacher. Without it, the folder of this "
        "script.",
    ),
    Option(
        "teacher-s-range",
        "s_range",
        int,
        5,
        "With --kd-teacher-exp-dir: the number of label positions of the teacher's "
        "lattice at each frame, 2 or more; 0 for all of them, the full lattice.",
        bounds=(0, 1000),
    ),
    Option(
        "teacher-path-only",
        "path_only",
        bool,
        False,
        "With --kd-teacher-exp-dir: whether the lattice has the nodes of the teacher's "
        "best alignment alone: true or false.",
    ),
    Option(
        "teacher-clean",
        "clean",
        bool,
        False,
        "With --kd-teacher-exp-dir: whether the teacher hears the features before the "
        "dataset's transforms, without SpecAugment's masks, while the student hears "
        "them with these: true or false. --kd-time-warp says what happens to the time "
        "warp. Noise and changes of speed stay in both. With CR-CTC and with "
        "--kd-teacher-cache-dir the teacher hears clean features in any case.",
    ),
    Option(
        "teacher-cache-dir",
        "cache_dir",
        str,
        "",
        "With --kd-teacher-exp-dir: folder such as data/kd in which the first epoch "
        "stores the teacher's CTC targets (and simple targets, where the simple term "
        "has a weight) of each cut; the later epochs read them. At "
        "the end each process leaves a manifest of its cuts there, such as "
        "cuts.jsonl.gz.",
    ),
    Option(
        "teacher-keep",
        "keep",
        str,
        "dense",
        "With --kd-teacher-cache-dir: the form in which targets are stored, such as "
        "top:8; see `icefall-kd dump --keep`.",
    ),
)
