from icefall_kd.losses.ctc import ctc_kd_loss
from icefall_kd.losses.full_sum import full_sum_kd_loss
from icefall_kd.losses.hidden import hidden_kd_loss
from icefall_kd.losses.sequence import nbest_ctc_loss, nbest_transducer_loss
from icefall_kd.losses.transducer import transducer_kd_loss

__all__ = [
    "ctc_kd_loss",
    "full_sum_kd_loss",
    "hidden_kd_loss",
    "nbest_ctc_loss",
    "nbest_transducer_loss",
    "transducer_kd_loss",
]
