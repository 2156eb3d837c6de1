from icefall_kd.losses.ctc import ctc_kd_loss
from icefall_kd.losses.hidden import hidden_kd_loss
from icefall_kd.losses.joint import JointKDLoss
from icefall_kd.losses.transducer import transducer_kd_loss

__all__ = ["JointKDLoss", "ctc_kd_loss", "hidden_kd_loss", "transducer_kd_loss"]
