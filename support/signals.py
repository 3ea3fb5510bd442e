"""SIGTERM and SIGINT (Ctrl-C): the step in hand is finished and saved, then the run ends. A second one ends it now."""

import signal

asked = 0  # the number of the signal that came; 0: none


def hear(handler) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup and the like
            signal.signal(number, handler)


def note(number: int, frame) -> None:
    global asked
    asked = number
    hear(signal.SIG_DFL)
