"""What a finished run leaves: the model, the ledger, the curves and the manifest."""

import json
from dataclasses import asdict

from vlm.data.shards import shards_fingerprint
from vlm.files import write_text
from vlm.manifest import Manifest, write_manifest
from vlm.models.folder import save_model_folder
from vlm.models.loading import RUN_MODEL
from vlm.train.curves import draw_curves
from vlm.train.ledger import Ledger
from vlm.train.setup import CONFIG, Session, environment
from vlm.train.telemetry import METRICS, read_metrics


def finish_run(session: Session, ledger: Ledger) -> None:
    """Write model/, ledger.json, curves.png, and last the manifest."""
    run, state, config = session.folder, session.state, session.config
    state.network.eval()
    data = shards_fingerprint(session.shards)
    save_model_folder(run / RUN_MODEL, state.model, inputs={"shards": data})
    by_shard = [
        {"shard": shard, "visits": ledger.visits.get(number, 0), "bad": ledger.bad.get(number, 0)}
        for number, shard in enumerate(session.shards)
    ]
    write_text(run / "ledger.json", json.dumps({"shards": by_shard, "examples": ledger.examples}, indent=2) + "\n")
    title = f"{run.name}: {config.model.architecture}, {state.step:,} steps of {config.batch_size:,}"
    draw_curves(read_metrics(run / METRICS), run / "curves.png", title=title)
    write_manifest(
        run,
        Manifest(
            kind="run",
            fingerprint=state.model.fingerprint,
            counts={"steps": state.step, "samples": state.position, "bad": ledger.num_bad},
            configuration=asdict(config),
            inputs={"shards": data},
            details={"environment": environment(), "repeat": f"vlm train {run / CONFIG} --run NEW"},
        ),
    )
