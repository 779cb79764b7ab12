import pytest

from vlm.data.corpus import Source, open_corpus
from vlm.data.sample_ledger import Ledger
from vlm.errors import VlmError
from vlm.train.logger import check_bad_sample_limit


@pytest.mark.parametrize(
    ("limit", "replaced", "is_refused"),
    [(0.0, 0, False), (0.0, 1, True), (0.01, 10, False), (0.01, 11, True), (0.5, 50, False), (0.5, 51, True)],
)
def test_ten_bad_samples_are_allowed_at_first_but_none_where_the_limit_is_0(scene_shards, limit, replaced, is_refused):
    corpus = open_corpus([Source(data=str(scene_shards / "train"), name="scenes")])
    failure = {"key": "k", "offset": 512, "reason": "no image", "detail": "why"}
    ledger = Ledger(failures={(0, 3): failure}, num_requested=100, num_replaced=replaced)
    if not is_refused:
        check_bad_sample_limit(ledger, limit, corpus)
        return
    with pytest.raises(VlmError, match=rf"^{replaced} of 100 samples cannot be used, .*'k'.*--max-bad"):
        check_bad_sample_limit(ledger, limit, corpus)
