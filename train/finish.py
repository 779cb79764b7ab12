"""What a finished run leaves: the model, the ledger, the curves and the manifest."""

from dataclasses import asdict, replace

import torch
from torch import nn

from vlm.data.ledger import Ledger
from vlm.data.shards import shards_fingerprint
from vlm.manifest import Manifest, write_manifest
from vlm.models.encoder import VisionLanguageModel
from vlm.models.folder import save_model_folder
from vlm.models.loading import RUN_MODEL
from vlm.models.network import build_network
from vlm.tensors import Tensor
from vlm.train.accounts import write_ledger
from vlm.train.checkpoints.sharded import whole
from vlm.train.session import Session
from vlm.train.setup import CONFIG, environment
from vlm.train.state import TrainState
from vlm.train.telemetry.clock import Utilisation
from vlm.train.telemetry.curves import draw_curves
from vlm.train.telemetry.metrics import METRICS, read_metrics


def finish_run(session: Session, ledger: Ledger, utilisation: Utilisation) -> None:
    """Write model/ (with the mean of the weights where one is kept), ledger.json, curves.png, and last the manifest."""
    weights = final_weights(session.state)
    if session.accelerator.is_main_process:
        _write_run(session, ledger, utilisation, final_model(session.state.model, weights))


def final_weights(state: TrainState) -> dict[str, Tensor]:
    """The weights that are left behind, whole and on the CPU; all processes call it."""
    held = state.average if state.average is not None else state.network.state_dict()
    return {name: whole(tensor).detach().cpu() for name, tensor in held.items()}


def final_model(model: VisionLanguageModel, weights: dict[str, Tensor]) -> VisionLanguageModel:
    """The model with these weights, in a network as it is loaded from a folder."""
    network = build_network(model.config)
    if "logit_bias" in weights and getattr(network, "logit_bias", None) is None:
        network.register_parameter("logit_bias", nn.Parameter(torch.zeros_like(weights["logit_bias"])))
    kinds = network.state_dict()
    network.load_state_dict({name: tensor.to(kinds[name].dtype) for name, tensor in weights.items()})
    return replace(model, network=network.eval(), device=torch.device("cpu"))


def _write_run(session: Session, ledger: Ledger, utilisation: Utilisation, model: VisionLanguageModel) -> None:
    run, state, config = session.folder, session.state, session.config
    data = shards_fingerprint(session.corpus.shards)
    save_model_folder(run / RUN_MODEL, model, inputs={"shards": data})
    everything = range(len(session.corpus.shards))
    write_ledger(run / "ledger.json", session.corpus, ledger.by_shard(), ledger, shards=everything)
    title = f"{run.name}: {config.model.architecture}, {state.step:,} steps of {config.batch_size:,}"
    draw_curves(read_metrics(run / METRICS), run / "curves.png", title=title)
    write_manifest(
        run,
        Manifest(
            kind="run",
            fingerprint=model.fingerprint,
            counts={"steps": state.step, "samples": state.position, "bad": ledger.num_replaced},
            configuration=asdict(config),
            inputs={"shards": data, "sequence": session.corpus.fingerprint},
            details={
                "sources": [asdict(source) for source in session.corpus.sources],
                "environment": environment(),
                "utilisation": utilisation.facts(),
                "skipped": state.skipped,
                "repeat": f"vlm train {run / CONFIG} --run NEW",
            },
        ),
    )
