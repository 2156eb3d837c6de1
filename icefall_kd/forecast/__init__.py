"""Whether distillation is worth its training: measures, and a verdict from them.

:mod:`~icefall_kd.forecast.measures` has the numbers, which
:mod:`~icefall_kd.forecast.measure` takes from models and cuts, and of which
:mod:`~icefall_kd.forecast.verdict` makes sentences without any model.
"""
