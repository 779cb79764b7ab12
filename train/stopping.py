"""Saving or ending a run between two steps when the system or a person asks for it."""

import os
import signal
from types import FrameType

from vlm.console import say

_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """While entered, signals are remembered instead of ending the process; a second SIGINT ends it.

    SIGTERM and SIGINT: save and end. SIGUSR1: save and go on, as batch systems warn with it whether or not the end
    follows. Enter it before worker processes are forked: in these SIGUSR1 and SIGINT, which terminals and batch systems
    send to them too, then do nothing, and SIGTERM ends them.
    """

    def __init__(self) -> None:
        self.signal_name = ""
        self._is_save_wanted = False
        self._before: dict[signal.Signals, object] = {}
        self._process = os.getpid()

    def __bool__(self) -> bool:
        return bool(self.signal_name)

    @property
    def is_save_wanted(self) -> bool:
        """Whether SIGUSR1 came since the last `saved`."""
        return self._is_save_wanted

    def saved(self) -> None:
        """What SIGUSR1 asked for is done."""
        self._is_save_wanted = False

    def __enter__(self) -> "StopRequest":
        self._process = os.getpid()
        for number in _HANDLED:
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if number == signal.SIGUSR1:
            self._is_save_wanted = True
            say("\nSIGUSR1: saving after this step, and going on.")
            return
        if self.signal_name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name
        say(f"\n{self.signal_name}: saving after this step; press Ctrl-C again to stop at once without saving.")
