from icefall_kd.student.build import build_student

__all__ = ["build_student"]
