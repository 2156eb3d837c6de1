from icefall_kd.targets.dataset import KDDataset, TargetDataset
from icefall_kd.targets.fingerprint import Fingerprint
from icefall_kd.targets.writer import LogitWriter, TargetWriter

__all__ = ["Fingerprint", "KDDataset", "LogitWriter", "TargetDataset", "TargetWriter"]
