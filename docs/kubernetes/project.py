"""`python docs/kubernetes/project.py IMAGE FOLDER`: the project of this MLproject that runs in an image.

MLflow's Kubernetes backend wants `docker_env` in MLproject, and MLflow takes no MLproject with two environments. So it
gets a folder of its own, whose MLproject has the image in the place of conda.yaml, and in front of every command the
image's program `exec`, which undoes the quotes that MLflow puts around words. It is otherwise this one.
"""

import sys
from pathlib import Path

ENVIRONMENT = "conda_env: conda.yaml\n"
COMMAND = 'command: "python '
MLPROJECT = Path(__file__).parents[2] / "MLproject"


def in_image(mlproject: str, image: str) -> str:
    """The text of an MLproject with a Docker image as its environment.

    Raises:
        ValueError: it does not have conda.yaml as its environment, once.
    """
    if mlproject.count(ENVIRONMENT) != 1:
        raise ValueError(f"found {mlproject.count(ENVIRONMENT)} lines {ENVIRONMENT.strip()!r}, allowed: one")
    own = mlproject.replace(ENVIRONMENT, f'docker_env:\n  image: "{image}"\n')
    return own.replace(COMMAND, 'command: "exec python ')


def main(image: str, folder: str) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    text = in_image(MLPROJECT.read_text(encoding="utf-8"), image)
    Path(folder, "MLproject").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
