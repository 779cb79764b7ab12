"""States small enough to save in milliseconds."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.train.checkpoint.small_state import small_state
from vlm.train.state import TrainState


@pytest.fixture
def make_state() -> Callable[..., TrainState]:
    """A function from a seed to a state whose optimizer has made a step."""
    return small_state


@pytest.fixture
def tensors() -> Callable[[TrainState], dict[str, Any]]:
    """A function from a state to copies of all its tensors by file and name."""
    from vlm.train.checkpoint.checkpoint_files import state_tensors

    return lambda state: {
        f"{file}:{name}": tensor.clone() for file, held in state_tensors(state).items() for name, tensor in held.items()
    }


@pytest.fixture
def s3_bucket(monkeypatch) -> Iterator[str]:
    """A bucket of an S3 emulator."""
    pytest.importorskip("moto", reason="the S3 emulator is not installed: pip install 'moto[s3]' flask flask-cors")
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install s3fs")
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer

    from vlm import storage as remote

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    emulator = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    emulator.start()
    host, port = emulator.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    remote.clear_file_systems()
    system, _ = remote.open_system("s3://copies/x")
    system.mkdir("copies")
    yield "copies"
    emulator.stop()
