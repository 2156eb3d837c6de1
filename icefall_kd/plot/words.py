"""The words of the pictures, in English and in Chinese."""

from typing import Dict

LANGUAGES = ("en", "zh")

# Each in the order of LANGUAGES.
_WORDS = {
    "teacher": ("teacher", "教师"),
    # The lattice
    "ranges": ("pruning ranges", "剪枝范围"),
    "best_path": ("best path", "最优路径"),
    "start": ("(start)", "（开始）"),
    "frame_axis": ("frame ({ms} ms each)", "帧（每帧 {ms} ms）"),
    "last_token": ("last token emitted", "最近输出的 token"),
    "occupancy": (
        "probability that the path passes",
        "路径经过该节点的概率",
    ),
    # Spikes
    "filter": ("mel filter", "mel 滤波器"),
    "seconds_axis": ("seconds", "秒"),
    "spikes_note": (
        "Shades: 1 - p(blank) of the CTC head, with its tokens. Triangles: tokens of "
        "the transducer.\nDashed: spikes of the teacher.",
        "阴影：CTC 头的 1 - p(blank) 及其 token；三角：transducer 的 token；"
        "虚线：教师的尖峰。",
    ),
    # Where the KL lies
    "p_blank": ("teacher's\np(blank)", "教师的\np(blank)"),
    "kl_axis": ("KL(teacher ||\nstudent), nats", "KL（教师 || 学生），\nnat"),
    "blank": ("blank", "空白"),
    "neighbour": ("beside a spike", "尖峰旁"),
    "spike": ("spike", "尖峰"),
    "of_frames": ("frames", "帧数"),
    "of_kl": ("KL, {name}", "KL，{name}"),
    "share_axis": ("% over {cuts} cuts", "占比 %（{cuts} 个 cut）"),
    "mean_axis": ("mean KL a frame, nats", "每帧平均 KL，nat"),
    "blank_part": ("blank or not", "是否空白"),
    "token_part": ("which token", "哪个 token"),
    # The data's way
    "box_recipe": ("recipe\ntrain.py", "配方\ntrain.py"),
    "box_cuts": ("cuts\nwith features", "cut\n及其特征"),
    "box_teacher": ("teacher's\ncheckpoint", "教师\ncheckpoint"),
    "box_copy": ("copy of the recipe\nthat distils", "能蒸馏的\n配方副本"),
    "box_targets": ("cuts with the\nteacher's targets", "带教师目标\n的 cut"),
    "box_start": ("student\nbefore training", "训练前的\n学生模型"),
    "box_student": ("student: ordinary\ncheckpoints", "学生模型：\n普通 checkpoint"),
    "box_results": ("transcripts,\nerror rates, time", "识别结果、\n错误率、时间"),
    "box_files": (
        "TorchScript, ONNX,\nint8, checked",
        "TorchScript、\nONNX、int8",
    ),
    "box_report": ("report\nand pictures", "报告\n和图"),
}


def words_of(lang: str) -> Dict[str, str]:
    """The words of one language.

    Args:
      lang: One of :data:`LANGUAGES`.
    """
    number = LANGUAGES.index(lang)
    return {key: words[number] for key, words in _WORDS.items()}
