from icefall_kd.targets.dataset import KDDataset
from icefall_kd.targets.fingerprint import Fingerprint
from icefall_kd.targets.writer import LogitWriter

__all__ = ["Fingerprint", "KDDataset", "LogitWriter"]
