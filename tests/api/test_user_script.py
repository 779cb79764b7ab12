"""pyright's strict verdict on a script that uses the API."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("user_script.py")


def verdict(folder: Path, script: str) -> list[str]:
    """What pyright says in strict mode."""
    pyright = Path(sys.executable).parent / "pyright"
    if not pyright.is_file():
        pytest.skip("pyright is not installed")
    (folder / "script.py").write_text(script)
    settings = {"include": ["script.py"], "typeCheckingMode": "strict", "extraPaths": [str(ROOT)]}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [pyright, "--outputjson", "-p", folder, "--pythonpath", sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return [entry["message"] for entry in json.loads(done.stdout)["generalDiagnostics"]]


@pytest.mark.slow
def test_strict_pyright_has_nothing_to_say_of_the_users_script(tmp_path):
    assert verdict(tmp_path, SCRIPT.read_text()) == []
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    # and would, of a misspelt name, a wrong type and a misspelt option
    wrong = "import vlm\nmodel = vlm.laod('x')\nvlm.load(3)\nvlm.load('x').embed_images('x', on_eror='skip')\n"
    assert len({message.partition('"')[0] for message in verdict(tmp_path, wrong)}) >= 3
