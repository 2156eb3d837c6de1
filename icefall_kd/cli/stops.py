"""How a command ends that is stopped by Ctrl-C, `kill` or a closed terminal."""

import signal

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # the last is unknown to Windows
_STOPS = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]


def clean_up_when_stopped() -> None:
    """Let signals that stop the program raise, so that it leaves nothing behind.

    One that is ignored, as SIGHUP is under nohup, stays so.
    """
    for number in _STOPS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _stop)


def _stop(number, frame) -> None:
    # What follows must not break off the cleaning: a script that is stopped by Ctrl-C
    # passes it on as another signal. A second Ctrl-C does.
    for signal_number in _STOPS:
        if signal.getsignal(signal_number) is _stop:
            signal.signal(signal_number, signal.SIG_IGN)
    # A queue stops the processes that read features at the same time (scancel), and
    # torch's handler would raise that they died.
    if hasattr(signal, "SIGCHLD"):  # unknown to Windows
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if number == signal.SIGINT:
        signal.signal(number, signal.default_int_handler)
        raise KeyboardInterrupt
    raise SystemExit(128 + number)
