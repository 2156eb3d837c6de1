from icefall_kd.teacher.online import CachingTeacher, OnlineTeacher

__all__ = ["CachingTeacher", "OnlineTeacher"]
