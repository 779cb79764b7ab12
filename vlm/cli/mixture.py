"""`vlm mixture`: how much of each source to train on, from small runs."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from vlm.cli.options import JsonOption, PresetArgument, preset_defaults
from vlm.console import percent, quoted, show_json, show_table
from vlm.train.run_config import TrainConfig

if TYPE_CHECKING:
    from vlm.train.mixture_weights import MixtureReport, Probe

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Choose the weights of the sources of a mixture: small runs with drawn weights, a Lasso of their scores over the
    sources, runs of the recommended weights against equal ones.

    PRESET and the options are those of vlm train, for a probe: a small --architecture and few --steps. --data is a
    mixture file (.toml) with a [[source]] table for each source, whose weights are not used; --run is the folder of all
    the runs. Repeat the command to go on after an interruption, or with more --probes: finished runs are read.
    """

    preset: PresetArgument

    probes: int = 16
    """Runs with drawn weights; two more than there are sources at the least, four for each source are better."""

    seeds: int = 2
    """Runs of the recommended weights, and of equal ones, with the seeds --seed + 1, …; 0 checks nothing."""

    metric: str = "loss"
    """Score on --val to improve: loss, the contrastive loss of the held-out data; or a recall, as of vlm scale."""

    concentration: float = 1.0
    """Of the Dirichlet distribution that weights are drawn from: below 1 few sources a probe, above 1 most of all."""

    json: JsonOption = False

    config: tyro.conf.OmitArgPrefixes[TrainConfig] = field(default_factory=TrainConfig)

    @classmethod
    def defaults(cls, words: list[str]) -> "Mixture":
        """The configuration of the preset, as for `vlm train`."""
        return cls(**preset_defaults(words))

    def run(self) -> None:
        """Train or read the probes, fit, check, draw, show."""
        from vlm.api.training import fit_mixture

        report = fit_mixture(
            self.config, probes=self.probes, seeds=self.seeds, metric=self.metric, concentration=self.concentration
        )
        if self.json:
            show_json(report)
            return
        _show(report)
        if report.fit.is_useful:
            print(f"Train with them: vlm train {quoted(self.preset)} --data {quoted(report.mixture)} --run DIR")
        logger.info(f"Figure: {Path(self.config.run) / 'mixture.png'}")


def _show(report: "MixtureReport") -> None:
    rows: list[list[object]] = []
    for number, probe in enumerate(report.probes):
        rows.append([str(number), *_cells(report, probe)])
    for name, probes in (("recommended", report.recommended), ("equal", report.equal)):
        rows += [[name, *_cells(report, probe)] for probe in probes]
    show_table(["run", *report.fit.weights(), report.metric], rows)
    fits: list[list[object]] = []
    for source in report.fit.sources:
        interval = f"{percent(source.low)} to {percent(source.high)}"
        fits.append([source.name, f"{source.coefficient:+.2f}", percent(source.weight), interval])
    show_table(["source", "coefficient of √weight", "recommended weight", "95%"], fits)
    print(report.verdict())


def _cells(report: "MixtureReport", probe: "Probe") -> list[object]:
    from vlm.train.history import format_metric

    weights = [f"{weight:.2f}" if weight else "–" for weight in probe.weights.values()]
    return [*weights, format_metric(report.metric, probe.score)]
