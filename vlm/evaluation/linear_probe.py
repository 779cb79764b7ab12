"""Linear probe: multinomial logistic regression on frozen features, as CLIP measures them (Radford et al. 2021, A.3).

scikit-learn's logistic regression by L-BFGS, at most 1,000 iterations. The strength λ of regularisation is searched
between 10⁻⁶ and 10⁶ on validation images: first at every second power of ten, then around the best in steps halved
until there are eight a decade. The classifier of the best λ is then fitted to training and validation images together.
"""

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from vlm.errors import UsageError
from vlm.evaluation.evaluation_set import EvaluationSet
from vlm.evaluation.features import EvaluatedModel, Layer
from vlm.evaluation.labelled_features import (
    LabelledFeatures,
    expected_hits,
    hold_out,
    measure_classifier,
    read_probe_data,
)
from vlm.evaluation.measurement import Measurement
from vlm.tensor_types import Array, Float, Float64, Int64

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

MAX_ITERATIONS = 1000
# powers of ten
_WEAKEST = -6.0
_STRONGEST = 6.0
_FIRST_STEP = 2.0
_LAST_STEP = 1 / 8


@dataclass(frozen=True, kw_only=True)
class LinearClassifier:
    """A fitted probe: scores of an image are weights · features + biases.

    strength: λ of Σ cross-entropy + λ/2 ‖weights‖²; the biases are free.
    is_converged: whether the fit ended before the limit of iterations.
    """

    weights: Float64[Array, "K D"]
    biases: Float64[Array, " K"]
    strength: float
    is_converged: bool

    def scores(self, features: Float[Array, "N D"]) -> Float64[Array, "N K"]:
        """Logits of each image's classes; -inf for those without a training image."""
        return features.astype(np.float64) @ self.weights.T + self.biases


def fit_linear(data: LabelledFeatures, *, strength: float, max_iterations: int = MAX_ITERATIONS) -> LinearClassifier:
    """Logistic regression of the classes on the features.

    Raises:
        UsageError: scikit-learn is missing, the strength is not above 0, or there are images of one class only.
    """
    if not strength > 0:
        raise UsageError(f"A strength of {strength:g} is not above 0: CLIP's probes use 1e-6 to 1e6.")
    present = np.unique(data.labels)
    if len(present) < 2:
        raise UsageError(f"All {len(data):,} training images are of one class; a probe needs two or more.")
    # neither moves the optimum: the biases are free, and the penalty is scaled with the weights; but unit vectors as
    # they are have gradients so small that the solver would take its start for the end
    origin = data.features.mean(axis=0, dtype=np.float64)
    centred = data.features.astype(np.float64) - origin
    spread = float(np.sqrt(np.mean(centred**2)))
    # of equal features nothing but rounding is left
    scale = spread if spread > 1e-7 * float(np.abs(origin).max()) else 1.0
    # from zero each time: begun at another strength's weights, the solver stops there where the gradient is small, and
    # strengths could not be told apart
    regression = _regression()(C=scale**2 / strength, max_iter=max_iterations)
    with warnings.catch_warnings():
        # told by is_converged: a weak strength in a search need not converge to lose
        warnings.simplefilter("ignore")
        regression.fit(centred / scale, data.labels)
    return _classifier(regression, origin, scale, data, strength=strength, max_iterations=max_iterations)


def _regression() -> "type[LogisticRegression]":
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise UsageError("A linear probe needs scikit-learn: pip install 'vlm-pipeline[evaluation]'.") from error
    return LogisticRegression


def _classifier(
    regression: "LogisticRegression",
    origin: Float64[Array, " D"],
    scale: float,
    data: LabelledFeatures,
    *,
    strength: float,
    max_iterations: int,
) -> LinearClassifier:
    fitted = np.asarray(regression.coef_, np.float64) / scale
    intercepts = np.asarray(regression.intercept_, np.float64) - fitted @ origin
    if len(fitted) == 1:
        # of two classes it keeps the difference of their logits
        fitted = np.concatenate([np.zeros_like(fitted), fitted])
        intercepts = np.concatenate([np.zeros_like(intercepts), intercepts])
    # a class without a training image can be no answer, whatever its weights
    weights = np.zeros((len(data.classes), data.features.shape[1]))
    biases = np.full(len(data.classes), -np.inf)
    weights[regression.classes_] = fitted
    biases[regression.classes_] = intercepts
    return LinearClassifier(
        weights=weights,
        biases=biases,
        strength=strength,
        is_converged=bool(np.max(regression.n_iter_) < max_iterations),
    )


def log_loss(scores: Float64[Array, "N K"], labels: Int64[Array, " N"]) -> float:
    """Mean cross-entropy in nats of the scores as logits."""
    # a softmax does not change by it, and no exponential overflows
    shifted = scores - scores.max(axis=1, keepdims=True)
    normaliser = np.log(np.exp(shifted).sum(axis=1))
    return float((normaliser - shifted[np.arange(len(labels)), labels]).mean())


@dataclass(frozen=True, kw_only=True)
class StrengthTrial:
    """A strength that was tried, with the accuracy and the cross-entropy (nats) of the validation images."""

    strength: float
    accuracy: float
    log_loss: float


def search_strength(train: LabelledFeatures, validation: LabelledFeatures) -> tuple[StrengthTrial, ...]:
    """The strengths tried, best first: by accuracy on the validation images, equal ones by cross-entropy.

    Raises: as `fit_linear`.
    """

    def trial_at(exponent: float) -> StrengthTrial:
        scores = fit_linear(train, strength=10.0**exponent).scores(validation.features)
        return StrengthTrial(
            strength=10.0**exponent,
            accuracy=float(expected_hits(scores, validation.labels).mean()),
            log_loss=log_loss(scores, validation.labels),
        )

    trials = halving_search(trial_at)
    return tuple(sorted(trials.values(), key=_worse))


def halving_search(trial_at: Callable[[float], StrengthTrial]) -> dict[float, StrengthTrial]:
    """CLIP's search over exponents of ten: every second one, then around the best in halved steps."""
    trials: dict[float, StrengthTrial] = {}
    for exponent in np.arange(_WEAKEST, _STRONGEST + 1, _FIRST_STEP).tolist():
        trials[exponent] = trial_at(exponent)
    step = _FIRST_STEP / 2
    while step >= _LAST_STEP:
        best = min(trials, key=lambda exponent: _worse(trials[exponent]))
        # the stronger one first: of equals the one tried first stays the best
        for exponent in (best + step, best - step):
            if _WEAKEST <= exponent <= _STRONGEST and exponent not in trials:
                trials[exponent] = trial_at(exponent)
        step /= 2
    return trials


def _worse(trial: StrengthTrial) -> tuple[float, float]:
    return (-trial.accuracy, trial.log_loss)


@dataclass(frozen=True, kw_only=True)
class FittedProbe:
    """The probe fitted to all training images, and how its strength was chosen; no trials where it was given."""

    classifier: LinearClassifier
    trials: tuple[StrengthTrial, ...]


def fit_probe(
    train: LabelledFeatures,
    validation: LabelledFeatures | None,
    *,
    rng: np.random.Generator,
    strength: float | None = None,
    validation_share: float = 0.2,
) -> FittedProbe:
    """The probe of CLIP: strength chosen on validation images, then fitted to training and validation images.

    validation: None holds `validation_share` of each class's training images out for the search.
    strength: None searches it.

    Raises: as `hold_out` and `fit_linear`.
    """
    trials: tuple[StrengthTrial, ...] = ()
    if strength is None:
        fitted_on = train
        if validation is None:
            fitted_on, held_out = hold_out(train, share=validation_share, rng=rng)
        else:
            held_out = validation
        trials = search_strength(fitted_on, held_out)
        strength = trials[0].strength
    # once the strength is chosen, these images may be learned from as well
    if validation is not None:
        train = LabelledFeatures(
            features=np.concatenate([train.features, validation.features]),
            labels=np.concatenate([train.labels, validation.labels]),
            classes=train.classes,
        )
    return FittedProbe(classifier=fit_linear(train, strength=strength), trials=trials)


@dataclass(frozen=True, kw_only=True)
class LinearProbe:
    """Accuracy of logistic regression on frozen features, as CLIP measures it.

    train, validation: images to fit it to and to choose its strength on; without validation images,
        `validation_share` of each class's training images.
    layer: features before the projection, as CLIP reads its ViTs (pooled), or after it (projected).
    strength: λ, not searched but set. seed: of the validation split and the intervals.
    """

    train: EvaluationSet
    validation: EvaluationSet | None = None
    layer: Layer = "pooled"
    strength: float | None = None
    validation_share: float = 0.2
    seed: int = 0

    @property
    def name(self) -> str:
        """As it stands in reports."""
        return f"linear-probe-{self.layer}"

    def run(self, model: EvaluatedModel, data: EvaluationSet) -> Measurement:
        """Measure a model on test images.

        Raises: as `read_probe_data` and `fit_probe`.
        """
        probe = read_probe_data(model, self.train, data, layer=self.layer)
        validation = None
        if self.validation is not None:
            validation = read_probe_data(model, self.train, self.validation, layer=self.layer).test
        rng = np.random.default_rng(self.seed)
        fitted = fit_probe(
            probe.train, validation, rng=rng, strength=self.strength, validation_share=self.validation_share
        )
        warnings: list[str] = []
        if not fitted.classifier.is_converged:
            warnings.append(
                f"The probe had not converged after {MAX_ITERATIONS:,} iterations; its accuracy may be lower than it "
                "could be."
            )
        if fitted.trials and fitted.trials[0].strength in (10.0**_WEAKEST, 10.0**_STRONGEST):
            warnings.append(
                f"The best strength, {fitted.trials[0].strength:g}, lies at the end of the search: the best of all may "
                "lie beyond it."
            )
        trials = [asdict(trial) for trial in fitted.trials]
        return measure_classifier(
            self.name,
            data,
            probe,
            fitted.classifier.scores(probe.test.features),
            layer=self.layer,
            settings={"strength": fitted.classifier.strength, "trials": trials},
            rng=rng,
            warnings=warnings,
        )
