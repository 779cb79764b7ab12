"""Ending a run between two steps when the system or a person asks for it."""

import signal
from types import FrameType

from vlm.console import say


class StopRequest:
    """While entered, SIGTERM and SIGINT are remembered instead of ending the process; a second SIGINT ends it."""

    def __init__(self) -> None:
        self.signal_name = ""
        self._before: dict[signal.Signals, object] = {}

    def __bool__(self) -> bool:
        return bool(self.signal_name)

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name
        say(f"\n{self.signal_name}: saving after this step; press Ctrl-C again to stop at once without saving.")
