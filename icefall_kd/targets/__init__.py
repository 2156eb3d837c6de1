from icefall_kd.targets.dataset import TargetDataset
from icefall_kd.targets.fingerprint import Fingerprint
from icefall_kd.targets.writer import TargetWriter

# Their former names.
KDDataset = TargetDataset
LogitWriter = TargetWriter

__all__ = ["Fingerprint", "KDDataset", "LogitWriter", "TargetDataset", "TargetWriter"]
