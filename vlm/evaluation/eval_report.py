"""`vlm eval --out`: an evaluation as a page."""

from dataclasses import dataclass
from pathlib import Path

from vlm.evaluation.caption_accuracy import CaptionTruth
from vlm.evaluation.caption_evaluator import CaptionReport
from vlm.evaluation.retrieval_metrics import RetrievalResult
from vlm.evaluation.zero_shot import ZeroShot
from vlm.files import write_text
from vlm.pages import Provenance, render
from vlm.results import Result


@dataclass(frozen=True, kw_only=True)
class Evaluation(Result):
    """Everything measured of one model; None where it was not requested."""

    model: str
    fingerprint: str
    retrieval: RetrievalResult | None = None
    zero_shot: ZeroShot | None = None
    caption_truth: CaptionTruth | None = None
    captions: CaptionReport | None = None


@dataclass(frozen=True, kw_only=True)
class EvalData:
    """The data sets of an evaluation, as given on the command line; empty where unknown."""

    retrieval: str = ""
    zero_shot: str = ""
    captions: str = ""


def evaluation_page(evaluation: Evaluation, *, data: EvalData, provenance: Provenance | None = None) -> str:
    """The page: a section for each kind of measurement, with the data set it was made on."""
    return render(
        "evaluation.html",
        provenance=provenance,
        title=f"Evaluation of {evaluation.model}",
        evaluation=evaluation,
        data=data,
    )


def write_report(evaluation: Evaluation, path: Path, *, data: EvalData, provenance: Provenance | None = None) -> None:
    """Write `evaluation_page` to a file, atomically."""
    write_text(path, evaluation_page(evaluation, data=data, provenance=provenance))
