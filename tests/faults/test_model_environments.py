"""A logged model in a new virtual environment with nothing but its requirements: the answers are those of the run.

Every Python of 3.11 to 3.13 that is there is tried, directly and over HTTP. Downloads gigabytes.
"""

import json
import os
import shutil
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, only_full, run_pipeline, wait_for
from server import HOST, free_port

TRAININGS = {
    "mmoe": ["train_mmoe", "--config", "configs/mtl_mmoe.yaml", "--max_steps", "60", "--data.embedded.rows", "20000"],
    "visobert": ["train_visobert", "--config", "configs/config_multi_embedded.yaml", "--max_steps", "20",
                 "--data.embedded.rows", "300"],
}  # fmt: skip
PYTHONS = [
    name
    for name in ("python3.11", "python3.12", "python3.13")
    if shutil.which(name) and not subprocess.run([name, "--version"], capture_output=True, check=False).returncode
]
ASK = """
import json, sys
import mlflow
model = mlflow.pyfunc.load_model(sys.argv[1])
print(json.dumps(model.predict(model.input_example).to_dict(orient="list")))
"""

pytestmark = [pytest.mark.faults, only_full]


@pytest.fixture(scope="module", params=list(TRAININGS))
def logged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pd.DataFrame]:
    """The folder of a trained and logged model, and what it answers in this project."""
    import mlflow

    folder = tmp_path_factory.mktemp(request.param)
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    command = [str(ROOT / part) if part.startswith("configs/") else part for part in TRAININGS[request.param]]
    done = run_pipeline(*command, "--data.cache" if request.param == "visobert" else "--output_dir",
                        str(folder / "own"), cwd=folder, MLFLOW_TRACKING_URI=uri)  # fmt: skip
    assert done.returncode == 0, done.stderr
    (found,) = mlflow.MlflowClient(uri).search_logged_models(["0"])
    path = Path(found.artifact_location)
    model = mlflow.pyfunc.load_model(str(path))
    return path, model.predict(model.input_example)


def assert_same(answers: dict[str, list[Any]], expected: pd.DataFrame) -> None:
    assert list(answers) == list(expected.columns)
    for name, values in answers.items():
        if expected[name].dtype == float:
            np.testing.assert_allclose(np.array(values, float), expected[name], atol=1e-6, rtol=0)
        else:
            assert values == expected[name].tolist()


@pytest.mark.parametrize("python", PYTHONS)
def test_new_environment_answers_as_the_run_did(python: str, logged: tuple[Path, pd.DataFrame], tmp_path: Path) -> None:
    model, expected = logged
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MLFLOW_"))}

    def run(*command: str) -> bytes:
        return subprocess.run(
            command, cwd=tmp_path, env=outside, check=True, stdout=subprocess.PIPE, timeout=1800
        ).stdout

    run(python, "-m", "venv", "venv")
    own = str(tmp_path / "venv" / "bin" / "python")
    run(own, "-m", "pip", "install", "--quiet", "-r", str(model / "requirements.txt"))
    installed = run(own, "-m", "pip", "list", "--format=freeze").decode().lower()
    assert "focal" not in installed
    assert "numba" not in installed
    assert_same(json.loads(run(own, "-c", ASK, str(model))), expected)

    port = free_port()
    server = subprocess.Popen(
        [own, "-m", "mlflow", "models", "serve", "--model-uri", str(model), "--env-manager", "local", "--host", HOST,
         "--port", str(port)], cwd=tmp_path, env=outside | {"PATH": f"{Path(own).parent}:{os.environ['PATH']}"},
        start_new_session=True,
    )  # fmt: skip
    try:
        wait_for(lambda: answers(f"http://{HOST}:{port}/ping"))
        asked = urllib.request.Request(
            f"http://{HOST}:{port}/invocations", (model / "serving_input_example.json").read_bytes(),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        rows = json.loads(urllib.request.urlopen(asked, timeout=300).read())["predictions"]
    finally:
        os.killpg(server.pid, 9)
        server.wait(60)
    assert_same({name: [row[name] for row in rows] for name in expected.columns}, expected)


def answers(address: str) -> bool:
    try:
        return bool(urllib.request.urlopen(address, timeout=5).status == 200)
    except (urllib.error.URLError, OSError):
        return False
