from icefall_kd.decode.greedy import ctc_greedy, transducer_greedy

__all__ = ["ctc_greedy", "transducer_greedy"]
