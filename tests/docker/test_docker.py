"""Checks of the Dockerfiles that need no container engine."""

import fnmatch
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megamem.__main__ import COMMANDS
from megamem.tools import patch
from tests.docker.dockerfiles import DOCKER, ROOT, Step, commands, read_steps
from tests.helpers.megatron_runs import ITERATION
from tests.patches.trees import write_tree

IMAGES = {"Dockerfile": "26.06-py3", "Dockerfile.cpu": "3.12-slim-bookworm"}
# programs of the base images, and those that the steps install
PROGRAMS = {
    "Dockerfile": {"python", "git", "make", "test", "useradd", "install", "megamem", "bash"},
    "Dockerfile.cpu": {"python", "useradd", "install", "megamem", "bash"},
}
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())


@pytest.fixture(params=IMAGES)
def image(request) -> str:
    return request.param


def steps_of(image: str, name: str) -> list[Step]:
    return [step for step in read_steps(DOCKER / image) if step.name == name]


def copies(image: str) -> list[tuple[list[str], str]]:
    """(sources, destination) of every COPY."""
    return [(step.words[:-1], step.words[-1]) for step in steps_of(image, "COPY")]


def copy_into(image: str, folder: Path) -> None:
    """Copy the files of the COPY steps to another root folder."""
    for sources, destination in copies(image):
        for source in sources:
            target = folder / destination.lstrip("/")
            if (ROOT / source).is_dir():
                skip = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / source, target, dirs_exist_ok=True, ignore=skip)
            else:
                target = target / Path(source).name if destination.endswith("/") else target
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / source, target)


def test_base_image_and_its_build_argument(image):
    (base,) = steps_of(image, "FROM")
    assert base.text.endswith(f":{IMAGES[image]}")
    assert re.search(r"^FROM \S+:\$\{\w+\}", (DOCKER / image).read_text(), re.MULTILINE)


def test_what_is_copied_exists_and_is_in_the_context(image):
    ignored, *allowed = [
        line
        for line in (DOCKER / f"{image}.dockerignore").read_text().splitlines()
        if not line.startswith("#") and line != "**/__pycache__"
    ]
    assert ignored == "*" and all(line.startswith("!") for line in allowed)
    for sources, destination in copies(image):
        assert destination.startswith("/opt/megamem")
        for source in sources:
            assert (ROOT / source).exists(), source
            assert any(fnmatch.fnmatch(source, line[1:]) for line in allowed), source


def test_every_command_exists(image):
    for name in ("RUN", "CMD", "HEALTHCHECK"):
        for step in steps_of(image, name):
            for words in commands(step):
                assert words[0] in PROGRAMS[image], words
                if words[0] == "megamem":
                    assert words[1] in {*COMMANDS, "--help"}, words
                if words[:2] == ["python", "-m"]:
                    assert importlib.util.find_spec(words[2]), words
                for word in words:
                    if word.startswith("/opt/megamem/"):
                        assert (ROOT / word.removeprefix("/opt/megamem/")).exists(), word


def test_user_is_not_root_and_checked_for_health(image):
    (user,) = steps_of(image, "USER")
    (made,) = [step for step in steps_of(image, "RUN") if "useradd" in step.text]
    assert int(user.text) > 1000
    assert commands(made)[0] == ["useradd", "--create-home", "--uid", user.text, "megamem"]
    names = [step.name for step in read_steps(DOCKER / image)]
    # nothing is installed after the user has changed
    assert "RUN" not in names[names.index("USER") :]
    (check,) = steps_of(image, "HEALTHCHECK")
    # without known answers, which would need memory of the GPU during a run
    assert commands(check) == [["megamem", "doctor", "--light"]]


def test_what_is_copied_is_enough(image, tmp_path):
    copy_into(image, tmp_path)
    home = tmp_path / "opt/megamem"
    environment = {**os.environ, "PYTHONPATH": str(home)}

    def python(*words: str) -> str:
        result = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    where = python("-c", "import megamem; print(megamem.__file__)")
    assert Path(where.strip()).is_relative_to(home)
    assert python("-m", "megamem", "--version").startswith("megamem ")
    found = python("-c", "from megamem.tools import patch; print(*patch.available().values())")
    ours = {str(home / "patches" / path.name) for path in (ROOT / "patches").glob("core_v*")}
    assert set(found.split()) == ours
    metadata = python("opt/megamem/setup.py", "--quiet", "--name", "--version").split()
    assert metadata[0] == "megamem"


def test_pins_agree(tmp_path):
    arguments = dict(step.text.split("=") for step in steps_of("Dockerfile", "ARG"))
    release = re.fullmatch(r"core_v(\d+)\.(\d+)\.(\d+)", arguments["MEGATRON_TAG"])
    tree = write_tree(tmp_path, {}, minor=int(release[2]), patch=int(release[3]))
    assert patch.find_release(tree)[0] == ".".join(release.groups())
    assert re.fullmatch("[0-9a-f]{40}", arguments["MEGATRON_COMMIT"])
    pinned = (ROOT / "setup.py").read_text()
    arguments = dict(step.text.split("=") for step in steps_of("Dockerfile.cpu", "ARG"))
    assert f'"torch=={arguments["TORCH"]}"' in pinned
    assert f'"megatron-core=={arguments["MEGATRON_CORE"]}"' in pinned


def test_requirements_are_those_of_setup_that_no_image_has():
    lines = (DOCKER / "requirements.txt").read_text().splitlines()
    listed = {line for line in lines if not line.startswith("#")}
    setup = (ROOT / "setup.py").read_text()
    wanted = re.search(r"install_requires=\[(.*?)\n    \]", setup, re.DOTALL)[1]
    needed = set(re.findall(r'"([\w-]+)[^"]*"', wanted))
    theirs = {"torch", "triton", "numpy", "megatron-core"}
    assert theirs < needed and needed - theirs <= listed
    assert not listed & theirs
    run = next(step.text for step in steps_of("Dockerfile", "RUN") if "--editable" in step.text)
    assert "--no-deps" in run


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_service_can_be_built_and_started(name):
    service = COMPOSE["services"][name]
    build = service["build"]
    assert (DOCKER / build["context"]).resolve() == ROOT
    assert (ROOT / build["dockerfile"]).is_file()
    cpu = build["dockerfile"].endswith(".cpu")
    assert service["image"] == ("megamem-cpu" if cpu else "megamem")
    assert (service.get("profiles") == ["cpu"]) is cpu
    declared = {
        step.text.partition("=")[0] for step in steps_of(Path(build["dockerfile"]).name, "ARG")
    }
    assert build["args"].keys() <= declared
    program, *words = service["command"]
    assert program in {"bash", "tensorboard"}
    if program == "bash":
        assert (ROOT / words[0].removeprefix("/opt/megamem/")).is_file()
        settings = (ROOT / "examples/cluster/flags.sh").read_text()
        settings += (ROOT / "examples/cluster/torchrun.sh").read_text()
        for variable in service["environment"]:
            assert re.search(rf"\$\{{{variable}:?[-?]", settings), variable
    else:
        port = words[words.index("--port") + 1]
        assert service["ports"] == [f"{port}:{port}"]
        # TensorBoard shows the folder to which the run writes
        logs = words[words.index("--logdir") + 1]
        assert any(f":{logs}" in volume for volume in service["volumes"])
    for volume in service["volumes"]:
        default = re.match(r"\$\{\w+:-(\w+)\}:/", volume)[1]
        assert default in COMPOSE["volumes"]


def test_service_writes_where_the_volume_is():
    for service in COMPOSE["services"].values():
        if "environment" in service:
            assert service["environment"]["RUN"].startswith("/workspace/runs/")
            assert any(volume.endswith(":/workspace/runs") for volume in service["volumes"])


def test_hadolint(image):
    hadolint = Path(sys.executable).with_name("hadolint")
    result = subprocess.run([hadolint, DOCKER / image], capture_output=True, text=True)
    assert result.returncode == 0 and not result.stdout


@pytest.mark.gloo
def test_the_cpu_image_does_its_dry_run_in_a_plain_folder(tmp_path):
    copy_into("Dockerfile.cpu", tmp_path)
    (step,) = steps_of("Dockerfile.cpu", "CMD")
    words = [word.replace("/opt/", f"{tmp_path}/opt/") for word in step.words]
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment = {
        **inherited,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "VIRTUAL_ENV": str(Path(sys.executable).parents[1]),
        "PYTHONPATH": str(tmp_path / "opt/megamem"),
        "RUN": str(tmp_path / "runs"),
    }
    result = subprocess.run(
        [*words, "--train-iters", "4", "--log-interval", "1", "--num-layers", "12"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert len(ITERATION.findall(result.stdout)) == 4
    assert (tmp_path / "runs/checkpoints/latest_checkpointed_iteration.txt").read_text() == "4"
