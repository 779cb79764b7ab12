"""The line people watch while a run goes."""

from typing import Any

from vlm.console import progress

_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"


class ProgressLine:
    """One bar over the whole run: step, loss, samples/s, data wait, MFU, time left."""

    def __init__(self, *, steps: int, done: int, is_shown: bool) -> None:
        self._bar = progress(total=steps, what="training", done=done, unit="step") if is_shown else None
        if self._bar is not None:
            self._bar.bar_format = _FORMAT  # the bar's own time left forgets evaluations

    def update(self, values: dict[str, Any]) -> None:
        """Show the newest values."""
        if self._bar is not None:
            self._bar.set_postfix_str(progress_note(values), refresh=False)

    def step(self) -> None:
        """One more step is done."""
        if self._bar is not None:
            self._bar.update()

    def go_back(self, step: int) -> None:
        """The run went back to a step."""
        if self._bar is not None:
            self._bar.n = step
            self._bar.refresh()

    def __enter__(self) -> "ProgressLine":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def progress_note(values: dict[str, Any]) -> str:
    """What is shown of the values of a line.

    >>> values = {"loss": 2.5, "samples_per_second": 1234.5, "data_wait": 0.03, "mfu": 0.412, "eta_seconds": 3750}
    >>> progress_note(values)
    'loss 2.500  1,234 samples/s  data wait 3%  MFU 41%  1 h 2 min left'
    """
    parts = [
        f"loss {values['loss']:.3f}",
        f"{values['samples_per_second']:,.0f} samples/s",
        f"data wait {values['data_wait']:.0%}",
    ]
    if "mfu" in values:
        parts.append(f"MFU {values['mfu']:.0%}")
    if values.get("eta_seconds"):
        parts.append(f"{duration(values['eta_seconds'])} left")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """A time for people, in its two largest units.

    >>> [duration(seconds) for seconds in (8, 75, 3750, 200_000)]
    ['8 s', '1 min 15 s', '1 h 2 min', '2 d 7 h']
    """
    whole = round(seconds)
    for size, unit, next_size, next_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // next_size} {next_unit}"
    return f"{whole} s"
