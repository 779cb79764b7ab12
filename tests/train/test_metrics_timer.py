import pytest

from vlm.train.metrics import PeakFlops, SampleFlops, StepTimer, Utilisation, progress_note, reduce_over_processes


class Hand:
    """A clock moved by hand."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def slow_items(hand, number, seconds):
    for item in range(number):
        hand.seconds += seconds
        yield item


def test_a_reading_is_of_the_steps_since_the_last():
    hand = Hand()
    clock = StepTimer(32, now=hand, peak=PeakFlops(flops=1000.0, source="test"))
    for _ in clock.timed(slow_items(hand, 4, 0.5)):
        hand.seconds += 1.5
        clock.tick(decoded=16, flops=500.0)
    first = clock.read()
    assert first["samples_per_second"] == pytest.approx(4 * 32 / 8)
    assert first["images_per_second"] == pytest.approx(4 * 16 / 8)
    assert first["data_wait"] == pytest.approx(0.25)
    assert first["mfu"] == pytest.approx(4 * 500 / 8 / 1000)
    assert first["memory_bytes"] > 1e6
    hand.seconds += 2
    clock.tick()
    second = clock.read()
    assert second["samples_per_second"] == pytest.approx(16)
    assert second["data_wait"] == 0
    assert "mfu" not in second  # nothing was counted


def test_evaluation_is_left_out_of_the_speed():
    hand = Hand()
    clock = StepTimer(10, now=hand)
    hand.seconds += 1
    clock.tick()
    hand.seconds += 99
    clock.exclude_time(99)
    assert clock.read()["samples_per_second"] == pytest.approx(10)


def test_no_utilisation_without_a_peak_or_with_uncounted_flops():
    hand = Hand()
    clock = StepTimer(10, now=hand)
    hand.seconds += 1
    clock.tick(flops=5.0)
    assert "mfu" not in clock.read()
    clock = StepTimer(10, now=hand, peak=PeakFlops(flops=1.0, source="test"))
    hand.seconds += 1
    clock.tick(flops=float("nan"))
    assert "mfu" not in clock.read()


def test_a_peak_that_is_exceeded_is_no_peak(caplog):
    hand = Hand()
    clock = StepTimer(10, now=hand, peak=PeakFlops(flops=4e12, source="measured while others computed"))
    for flops in (5e12, 1e12):
        hand.seconds += 1
        clock.tick(flops=flops)
        assert "mfu" not in clock.read()
    (record,) = caplog.records
    assert "5 TFLOP/s, more than its device's peak of 4 (measured while others computed)" in record.message
    assert "--peak-tflops" in record.message


def test_the_time_left_forgets_the_start_up_and_counts_evaluations():
    hand = Hand()
    clock = StepTimer(10, steps=100, done=40, now=hand)
    hand.seconds += 30  # compiling
    clock.tick()
    assert clock.read()["eta_seconds"] == pytest.approx(59 * 30)
    for _ in range(9):
        hand.seconds += 1
        clock.tick()
    hand.seconds += 9
    clock.exclude_time(9)
    assert clock.read()["eta_seconds"] == pytest.approx(50 * 2)
    for _ in range(50):
        clock.tick()
    assert clock.read()["eta_seconds"] == 0
    assert "eta_seconds" not in StepTimer(10, now=hand).read()


def test_one_process_s_reading_is_that_of_all():
    reading = {"samples_per_second": 3.0, "images_per_second": 2.0, "data_wait": 0.5, "memory_bytes": 7.0}
    assert reduce_over_processes(reading) == reading


def test_processes_are_summed_averaged_or_the_largest(monkeypatch):
    import vlm.train.metrics as module

    other = {"samples_per_second": 3.0, "images_per_second": 4.0, "data_wait": 0.1, "memory_bytes": 9.0, "mfu": 0.2}
    monkeypatch.setattr(module, "gather_objects", lambda readings: [*readings, other])
    own = {"samples_per_second": 3.0, "images_per_second": 2.0, "data_wait": 0.5, "memory_bytes": 7.0, "mfu": 0.4}
    merged = reduce_over_processes(own)
    assert merged == pytest.approx(
        {"samples_per_second": 3.0, "images_per_second": 6.0, "data_wait": 0.3, "memory_bytes": 9.0, "mfu": 0.3}
    )


def test_the_assumed_peak_is_named():
    sample = SampleFlops(forward=14.8e9, backward=29.3e9)
    peak = PeakFlops(flops=989e12, source="NVIDIA H200, data sheet, bf16 dense")
    used = Utilisation(sample=sample, peak=peak, processes=8)
    assert used.summary() == (
        "MFU is of 8 × 989 TFLOP/s (NVIDIA H200, data sheet, bf16 dense); "
        "a sample takes 14.8 GFLOP forward and 29.3 backward."
    )
    assert used.to_values()["peak_source"] == peak.source
    assert "cannot be counted" in Utilisation(sample=None, peak=peak, processes=1).summary()


def test_the_progress_line_leaves_out_what_is_not_known():
    values = {"loss": 1.0, "samples_per_second": 10.0, "data_wait": 0.5}
    assert progress_note(values) == "loss 1.000  10 samples/s  data wait 50%"
