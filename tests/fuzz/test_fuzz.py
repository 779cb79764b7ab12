from tests.fuzz.run import fuzz


def test_mutated_tars_neither_crash_nor_hang_nor_lose_a_sample_without_a_word():
    outcomes, peak = fuzz(100_000, 200)
    assert [outcome for outcome in outcomes if outcome.fault] == []
    assert {outcome.kind for outcome in outcomes} == {"whole", "incidents", "damaged", "refused"}
    assert peak < 1 << 30
