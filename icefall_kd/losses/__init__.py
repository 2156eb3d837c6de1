from icefall_kd.losses.ctc import ctc_kd_loss
from icefall_kd.losses.joint import JointKDLoss

__all__ = ["JointKDLoss", "ctc_kd_loss"]
