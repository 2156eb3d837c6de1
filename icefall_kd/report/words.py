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
    "seed": ("seed", "随机种子"),
    "steps": ("training steps", "训练步数"),
    "seconds": ("training seconds", "训练秒数"),
    "rtf_axis": ("RTF of decoding", "解码的 RTF"),
    "decoding_axis": ("seconds of decoding", "解码秒数"),
    "costs_text": (
        "The same {unit} against the number of parameters, the time of decoding and "
        "the time of training until the decoded checkpoint, as far as the logs tell. "
        "Times can be compared where the machine was the same.",
        "同样的 {unit}，分别对参数量、解码时间以及到被解码 checkpoint 为止的训练时间"
        "作图（日志中有记录的部分）。机器相同时，时间才可以比较。",
    ),
    "pictures": ("Pictures", "图"),
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
    "interval_text": (
        "In square brackets: 95 % intervals by the bootstrap (Bisani and Ney, 2004, as "
        "in Kaldi's compute-wer-bootci). {draws} times as many utterances as the set "
        "has are drawn from it with replacement, and the interval holds the middle "
        "95 % of the {unit}s of these draws. It says how far the {unit} would vary on "
        "other utterances like these, and not how far it would vary if the model were "
        "trained again. {sizes}.",
        "方括号中是 bootstrap 的 95 % 置信区间（Bisani 与 Ney，2004；与 Kaldi 的 "
        "compute-wer-bootci 相同）：从测试集有放回地抽取同样多的句子，共 {draws} 次，"
        "区间包含这些抽样的 {unit} 的中间 95 %。它表示换成另一些同类句子时 {unit} "
        "会变化多少，不表示重新训练模型时会变化多少。{sizes}。",
    ),
    "speakers_text": (
        "In square brackets: 95 % intervals by the blockwise bootstrap (Liu and Peng, "
        "2020). {draws} times as many speakers as the set has are drawn from it with "
        "replacement, each with all utterances, as the utterances of a speaker depend "
        "on each other; the interval holds the middle 95 % of the {unit}s of these "
        "draws. It says how far the {unit} would vary with other speakers like these, "
        "and not how far it would vary if the model were trained again. Few speakers "
        "give wide intervals that are still too narrow, and too small a p: in "
        "simulations, 85 % of the intervals held the true rate with 6 speakers and "
        "92 % with 20, and 15 % and 8 % of equal models had a p below 0.05. {sizes}.",
        "方括号中是分块 bootstrap 的 95 % 置信区间（Liu 与 Peng，2020）：同一说话人的"
        "句子互相关联，因此从测试集有放回地抽取同样多的说话人，每人连同其全部句子，"
        "共 {draws} 次，区间包含这些抽样的 {unit} 的中间 95 %。它表示换成另一些同类"
        "说话人时 {unit} 会变化多少，不表示重新训练模型时会变化多少。说话人少则区间宽，"
        "但仍然偏窄，p 也偏小：模拟中 6 个说话人的区间有 85 % 包含真值，20 个的有 "
        "92 %；相同的模型有 15 % 和 8 % 的 p 小于 0.05。{sizes}。",
    ),
    "size_words": ("{set} has {words} words", "{set} 有 {words} 个词"),
    "size_characters": ("{set} has {words} characters", "{set} 有 {words} 个字"),
    "size_units": (" in {count:,} utterances", "，{count:,} 句"),
    "size_speakers": (" of {count:,} speakers", "，{count:,} 个说话人"),
    "seeds_rates": ("{unit} (%) of each seed", "每个随机种子的 {unit}（%）"),
    "mean": ("mean", "平均"),
    "deviation": ("standard deviation", "标准差"),
    "seeds": ("seeds", "各个种子"),
    "seeds_text": (
        "A model that was given with several folders has the mean {unit} of its "
        "seeds, everywhere. In its interval the seeds share each draw of utterances, "
        "and the {unit} of a draw is the mean over the seeds. So the interval does not "
        "hold the variation of seeds; the standard deviation tells it.",
        "给出多个实验目录的模型，其 {unit} 处处是各种子的平均。区间的每次抽样对所有"
        "种子相同，一次抽样的 {unit} 是各种子的平均，因此区间不包含种子之间的变化；"
        "这一变化见标准差。",
    ),
    "differences": (
        "Against {baseline}, on the same utterances",
        "与“{baseline}”在相同句子上比较",
    ),
    "points": ("difference (points)", "差（百分点）"),
    "ratio": ("ratio", "比值"),
    "p": ("p", "p 值"),
    "improvement": ("probability of improvement", "改进的概率"),
    "seeds_error": (
        "standard error by seeds (points)",
        "种子造成的标准误差（百分点）",
    ),
    "differences_text": (
        "Of each draw the {unit}s of both models are taken, and in square brackets are "
        "the middle 95 % of their differences and of their ratios: a difference below "
        "0, and a ratio below 1, mean that the model is better. p is two-sided, twice "
        "the smaller of the shares of draws with no gain and with no loss, at least "
        "2/{draws}; it is of this one comparison, and among many some fall below 0.05 "
        "by chance. The probability of improvement is the share of draws in which the "
        "model is better, as in Kaldi.{seeds}",
        "每次抽样取两个模型的 {unit}，方括号中是其差和比值的中间 95 %：差小于 0、比值"
        "小于 1 表示该模型更好。p 是双侧的，是没有变好与没有变差的抽样比例中较小者的"
        "两倍，最小为 2/{draws}；它只对应一次比较，比较多了总有一些会偶然小于 0.05。"
        "改进的概率是该模型更好的抽样所占的比例，与 Kaldi 相同。{seeds}",
    ),
    "differences_seeds": (
        " All of these are about the trained models at hand. Whether other seeds would "
        "differ alike is told by the standard error of the difference by seeds: a "
        "difference that is not well above it may turn round with other seeds, "
        "whatever p is.",
        "以上都只关于这些已经训练好的模型。换成别的种子是否仍有同样的差别，要看种子造成的"
        "标准误差：差若不明显大于它，无论 p 多小，换种子后都可能反转。",
    ),
    "equal_steps": ("{unit} (%) at equal steps", "相同步数时的 {unit}（%）"),
    "equal_seconds": ("{unit} (%) at equal seconds", "相同秒数时的 {unit}（%）"),
    "steps_text": (
        "Of each student the last result within the steps of the one that trained for "
        "the fewest. A dash: no result is that early; decode an earlier checkpoint.",
        "每个学生模型取步数不超过训练最短者的最后一个结果。横线：没有这么早的结果，"
        "请解码更早的 checkpoint。",
    ),
    "seconds_text": (
        "Of each student the last result within the seconds of the one that trained "
        "the shortest. Seconds are those between the time stamps of the training logs, "
        "each start from the first entry of its log; neither pauses between starts "
        "count nor batches that were trained again, nor making the targets. They "
        "compare only trainings on equal machines that were equally busy. A dash: no "
        "result is that early; decode an earlier checkpoint.",
        "每个学生模型取秒数不超过训练最短者的最后一个结果。秒数取自训练日志的时间戳，"
        "每次启动从日志的第一条记录算起；不含两次启动之间的停顿、重新训练的 batch 和"
        "生成目标的时间。只有机器相同且同样忙时才可比较。横线：没有这么早的结果，"
        "请解码更早的 checkpoint。",
    ),
    "exports": (
        "Exported files, against the model in torch",
        "导出的文件与 torch 模型的比较",
    ),
    "exports_text": (
        "What `icefall-kd export --check` found in EXP_DIR/export. same tokens: in how "
        "many utterances the form gives those of torch. MB (10^6 bytes) of its files; "
        "RTF: seconds for a second of audio on one thread. "
        "A form is wrong where fp32 differs from torch, or where the {unit} of a "
        "smaller form is more than 0.2 points higher.",
        "`icefall-kd export --check` 对 EXP_DIR/export 的检查结果。token 相同："
        "该形式与 torch 给出相同 token 的句数。MB（10^6 字节）为其文件大小；RTF："
        "单线程每秒音频所需的秒数。fp32 与 torch 不同，或更小的形式 {unit} 高出 0.2 "
        "个百分点以上时，该形式为错误。",
    ),
    "export_form": ("form", "导出形式"),
    "head": ("head", "输出头"),
    "verdict": ("verdict", "结论"),
    "same_tokens": ("same tokens", "token 相同"),
    "same_of": ("{same} of {cuts}", "{same} / {cuts}"),
    "right": ("right", "正确"),
    "wrong": ("wrong", "错误"),
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
    "batch_seconds": ("seconds in a batch", "每个 batch 的秒数"),
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
    "no_transcript": (
        "{model}: no interval, as {folder} has no {first}; decode again to have it.",
        "{model}：{folder} 中没有 {first}，因此没有置信区间；重新解码即可得到。",
    ),
    "no_transcripts": (
        "{model}: {count} results without an interval, as {folder} has no {first} and "
        "others; decode again to have them.",
        "{model}：{count} 个结果没有置信区间，因为 {folder} 中没有 {first} 等文件；"
        "重新解码即可得到。",
    ),
    "no_transcript_of_setting": (
        "{model}, {method}, {set}: no interval, as of {count} settings there are no "
        "transcripts of the best one, {setting}; decode with it alone to have them.",
        "{model}，{method}，{set}：{count} 种设置中最好的一种（{setting}）没有识别"
        "文本，因此没有置信区间；只用这一种设置解码即可得到。",
    ),
    "same_seed": (
        "{model}: by their logs not all runs have seeds of their own ({seeds}).",
        "{model}：日志显示各次训练的随机种子并非各不相同（{seeds}）。",
    ),
    "other_checkpoints": (
        "{model}, {method}: the seeds were decoded at different checkpoints "
        "({checkpoints}).",
        "{model}，{method}：各种子解码的 checkpoint 不同（{checkpoints}）。",
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
        "No RTF, as the log has no times: {models}.",
        "日志中没有时间，因此没有 RTF：{models}。",
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
