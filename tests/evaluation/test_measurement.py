from dataclasses import dataclass

import pyarrow as pa

from tests.evaluation.encoders import ColourEncoder
from tests.evaluation.test_evaluation_set import colour_shards
from vlm.evaluation.evaluation_set import EvaluationSet, open_evaluation_set
from vlm.evaluation.features import EvaluatedModel
from vlm.evaluation.measurement import Evaluator, Measurement, Value


@dataclass(frozen=True, kw_only=True)
class Redness:
    """The share of images that are mostly red."""

    name: str = "redness"

    def run(self, model: EvaluatedModel, data: EvaluationSet) -> Measurement:
        data, images = model.image_features(data)
        is_red = images.argmax(axis=1) == 0
        return Measurement(
            evaluator=self.name,
            data=data.name,
            data_digest=data.digest,
            num_images=len(data),
            values={"red": Value(value=float(is_red.mean()), chance=1 / 3)},
            samples=pa.table({"key": data.keys, "red": is_red.astype(float)}),
            details=self,
        )


def test_an_evaluator_needs_a_name_and_a_run_and_its_measurement_goes_into_json(tmp_path):
    data = open_evaluation_set(colour_shards(tmp_path), name="colours")
    assert isinstance(Redness(), Evaluator)
    measurement = Redness().run(EvaluatedModel(ColourEncoder()), data)
    values = measurement.to_json()
    assert values["values"] == {"red": {"value": 1 / 3, "low": None, "high": None, "chance": 1 / 3}}
    assert values["details"] == {"name": "redness"}
    assert "samples" not in values
