"""What a finished run leaves: the model, the ledger, the curves and the manifest."""

from dataclasses import asdict

from vlm.data.ledger import Ledger
from vlm.data.shards import shards_fingerprint
from vlm.manifest import Manifest, write_manifest
from vlm.models.folder import save_model_folder
from vlm.models.loading import RUN_MODEL
from vlm.train.accounts import write_ledger
from vlm.train.curves import draw_curves
from vlm.train.setup import CONFIG, Session, environment
from vlm.train.telemetry import METRICS, read_metrics


def finish_run(session: Session, ledger: Ledger) -> None:
    """Write model/, ledger.json, curves.png, and last the manifest."""
    run, state, config = session.folder, session.state, session.config
    state.network.eval()
    data = shards_fingerprint(session.corpus.shards)
    save_model_folder(run / RUN_MODEL, state.model, inputs={"shards": data})
    everything = range(len(session.corpus.shards))
    write_ledger(run / "ledger.json", session.corpus, ledger.by_shard(), ledger, shards=everything)
    title = f"{run.name}: {config.model.architecture}, {state.step:,} steps of {config.batch_size:,}"
    draw_curves(read_metrics(run / METRICS), run / "curves.png", title=title)
    write_manifest(
        run,
        Manifest(
            kind="run",
            fingerprint=state.model.fingerprint,
            counts={"steps": state.step, "samples": state.position, "bad": ledger.num_replaced},
            configuration=asdict(config),
            inputs={"shards": data, "sequence": session.corpus.fingerprint},
            details={
                "sources": [asdict(source) for source in session.corpus.sources],
                "environment": environment(),
                "repeat": f"vlm train {run / CONFIG} --run NEW",
            },
        ),
    )
