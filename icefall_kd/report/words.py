"""The report's words, in English and in Chinese."""

from typing import Dict

LANGUAGES = ("en", "zh")

# Each in the order of LANGUAGES.
_WORDS = {
    "lang": ("en", "zh-CN"),
    "title": (
        "Knowledge distillation: teacher, student without KD, student with KD",
        "知识蒸馏：教师模型、不蒸馏的学生模型、蒸馏的学生模型",
    ),
    "compared": (
        'Compared: {students} with "{baseline}", the student without KD; the '
        'teacher is "{teacher}".',
        "比较：{students} 与不蒸馏的学生模型“{baseline}”；教师模型是“{teacher}”。",
    ),
    "models": ("Models", "模型"),
    "model": ("model", "模型"),
    "exp": ("experiment folder", "实验目录"),
    "parameters": ("parameters", "参数量"),
    "of_teacher": ("{share} % of the teacher's", "教师的 {share} %"),
    "distillation": ("distillation", "蒸馏"),
    "off": ("off", "无"),
    "epochs": ("epochs trained", "训练的 epoch"),
    "epoch_axis": ("epochs", "epoch"),
    "base_lr": ("base learning rate", "基础学习率"),
    "batch": ("seconds of audio in a training batch", "每个训练 batch 的音频秒数"),
    "rtf": ("RTF, {method}", "RTF，{method}"),
    "rates": ("{unit} (%) on the test sets", "测试集上的 {unit}（%）"),
    "set": ("test set", "测试集"),
    "method": ("decoding method", "解码方法"),
    "change": ("{student} against {baseline}", "{student} 相对 {baseline}"),
    "closed": ("share of the gap closed", "弥补差距的比例"),
    "change_text": (
        'In brackets: the relative change of the {unit} against "{baseline}"; '
        "below 0 distillation helps, above 0 it harms.",
        "括号中是 {unit} 相对“{baseline}”的变化；小于 0 表示蒸馏有益，"
        "大于 0 表示蒸馏有害。",
    ),
    "closed_text": (
        "The change is relative: below 0 distillation helps, above 0 it harms. The "
        'share of the gap closed is how far the {unit} of "{student}" has come '
        'from that of "{baseline}" to that of "{teacher}": below 0 it moved away '
        "from it, above 100 % past it; a dash means that there is no gap, as "
        '"{baseline}" is no worse than the teacher.',
        "变化是相对值：小于 0 表示蒸馏有益，大于 0 表示蒸馏有害。弥补差距的比例："
        "“{student}”的 {unit} 从“{baseline}”向“{teacher}”走了多远；"
        "小于 0 表示离教师更远，大于 100 % 表示超过教师；"
        "“{baseline}”不比教师差时没有差距，记为横线。",
    ),
    "targets": ("Targets", "教师目标"),
    "manifest": ("manifest", "清单"),
    "cuts": ("cuts with targets", "有目标的 cut"),
    "hours": ("hours of speech", "语音小时数"),
    "bytes": ("bytes", "字节"),
    "parts": ("of which", "其中"),
    "mb_hour": ("MB (10^6 bytes) an hour", "每小时语音的 MB（10^6 字节）"),
    "form": ("form", "存储形式"),
    "losses": ("Losses", "损失"),
    "losses_table": (
        "Where training ended, training loss / validation loss:",
        "训练结束时，训练损失 / 验证损失：",
    ),
    "loss": ("loss", "损失"),
    "losses_text": (
        "Losses are per frame, as icefall logs them: training losses are decaying "
        "means of about the last 200 batches, begun anew in each epoch; validation "
        "losses are over the whole validation set. With distillation the training "
        '"loss" holds the weighted KD terms too, so it is not to be compared with '
        'that of a model without; the validation "loss" is that of the recipe.',
        "损失按帧平均，与 icefall 日志一致：训练损失是大约最近 200 个 batch 的"
        "衰减平均，每个 epoch 重新开始；验证损失是整个验证集上的。蒸馏时训练的 "
        "loss 还包含加权的 KD 各项，不能与不蒸馏的模型直接比较；"
        "验证的 loss 是配方自己的。",
    ),
    "plots_text": (
        "Lines are training losses, without the first batch of later epochs; "
        "markers are validation losses. Where the largest value is more than 20 "
        "times the smallest, the axis is logarithmic. At most {points} points of a "
        "curve are drawn, and {markers} markers.",
        "线是训练损失（第一个 epoch 之后不画每个 epoch 的第一个 batch），"
        "标记是验证损失。"
        "最大值超过最小值 20 倍时用对数坐标。每条曲线最多画 {points} 个点、"
        "{markers} 个标记。",
    ),
    "weights": ("Weights", "权重"),
    "weights_text": (
        "The weight of each term of the loss, as it was in force: hard is the "
        "recipe's own loss.",
        "损失中每一项当时生效的权重；hard 是配方自己的损失。",
    ),
    "decodings": ("Decodings", "解码"),
    "decodings_text": (
        "Shown is the last decoding of each method: the highest epoch, and of "
        "equal ones the newest; not that with the best {unit}, which would choose "
        "the model on the test set.",
        "表中是每种解码方法的最后一次解码：epoch 最大者，相同时取最新者；"
        "而不是 {unit} 最低者，否则就是在测试集上选模型。",
    ),
    "others": ("Other decodings", "其他解码结果"),
    "checkpoint": ("checkpoint", "checkpoint"),
    "options": ("options", "选项"),
    "device": ("device", "设备"),
    "seconds": ("seconds in a batch", "每个 batch 的秒数"),
    "result": ("result (%)", "结果（%）"),
    "date": ("date", "日期"),
    "notes": ("Notes", "说明"),
    "no_training": (
        "{model}: no training log in {folder}, so no curves.",
        "{model}：{folder} 中没有训练日志，因此没有曲线。",
    ),
    "no_batches": (
        "{model}: the training logs in {folder} have no batch.",
        "{model}：{folder} 中的训练日志没有任何 batch。",
    ),
    "skipped": (
        "{model}: {count} entries of its logs have an impossible date, and "
        "were left out.",
        "{model}：日志中有 {count} 条记录的日期不存在，已略去。",
    ),
    "no_kd": (
        "{model}: its logs have no settings, so whether it was distilled is unknown.",
        "{model}：日志中没有设置，不知道是否蒸馏。",
    ),
    "no_decoding": (
        "{model}: no decoding results in {folder}; run decode.py there.",
        "{model}：{folder} 中没有解码结果；请在那里运行 decode.py。",
    ),
    "best_setting": (
        "{model}, {method}, {set}: the best of {count} settings, {setting}, which "
        "icefall's summary puts first.",
        "{model}，{method}，{set}：{count} 种设置中最好的一种，{setting}，"
        "即 icefall 的汇总中排在第一的。",
    ),
    "other_options": (
        "{method}: the models were decoded with different options ({options}); "
        "their rates differ for that too.",
        "{method}：各模型解码的选项不同（{options}），结果的差别也与此有关。",
    ),
    "rtf_text": (
        "RTF: seconds of decoding by seconds of audio, below 1 faster than speech. "
        "The seconds are those between the time stamps of the decoding log, from "
        "the moment when the model is ready to the moment when the transcripts are "
        "stored, so reading features and starting workers count; all settings of a "
        "method together. Device and batches are those of the table of decodings; "
        "only where they are the same may RTFs be compared.",
        "RTF：解码秒数除以音频秒数，小于 1 表示快于实时。秒数取自解码日志的时间戳，"
        "从模型就绪到文本写完，因此包含读取特征和启动 worker 的时间；"
        "一种方法的所有设置合在一起。设备和 batch 见解码表；"
        "只有两者相同时 RTF 才可比较。",
    ),
    "rtf_needs": (
        "No RTF, as the seconds of audio are not known: give --manifest-dir the "
        "folder of the test sets' manifests, such as data/fbank.",
        "没有 RTF：不知道音频秒数；请用 --manifest-dir 给出测试集清单的目录，"
        "如 data/fbank。",
    ),
    "rtf_no_manifest": (
        "No RTF of {set}: {folder} has no manifest cuts_{set}.jsonl.gz.",
        "没有 {set} 的 RTF：{folder} 中没有清单 cuts_{set}.jsonl.gz。",
    ),
    "rtf_several": (
        "No RTF of {set}: {folder} has several of it, {paths}.",
        "没有 {set} 的 RTF：{folder} 中有它的多个清单：{paths}。",
    ),
    "rtf_no_log": (
        "No RTF of {model}, {method}: its log has no times.",
        "没有 {model}，{method} 的 RTF：日志中没有时间。",
    ),
    "no_targets": (
        "{manifest}: no cut has targets; make them by icefall-kd dump.",
        "{manifest}：没有 cut 带有目标；请用 icefall-kd dump 生成。",
    ),
    "some_targets": (
        "{manifest}: {cuts} of {all} cuts have targets.",
        "{manifest}：{all} 个 cut 中有 {cuts} 个带有目标。",
    ),
    "no_store": (
        "{manifest}: the store {store} can't be read, so its forms are unknown.",
        "{manifest}：无法得知目标库 {store} 的存储形式。",
    ),
    "baseline_distilled": (
        'By its logs "{baseline}" was distilled itself, so the changes are not '
        "those against a student without KD.",
        "日志显示“{baseline}”本身就是蒸馏的，因此变化不是相对不蒸馏的学生模型。",
    ),
    "unlike": (
        '"{student}" and "{baseline}" differ in more than distillation, {what}: '
        "the changes come of that too.",
        "“{student}”与“{baseline}”不只是蒸馏与否的不同（{what}），变化也与此有关。",
    ),
    "no_weights": (
        "No model was distilled by its logs, so there are no weights.",
        "日志中没有蒸馏的模型，因此没有权重。",
    ),
    "footer": (
        "Made by icefall-kd report {version}.",
        "由 icefall-kd report {version} 生成。",
    ),
    "and": (", ", "、"),
    "quote": (
        ('"{}"'),
        "“{}”",
    ),
    "term": ("term", "项"),
}


def words_of(lang: str) -> Dict[str, str]:
    """The words of one language.

    Args:
      lang: One of :data:`LANGUAGES`.
    """
    number = LANGUAGES.index(lang)
    return {key: words[number] for key, words in _WORDS.items()}
