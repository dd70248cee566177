"""What the set-up command refuses to do."""

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_environment_of_another_checkout_is_left_alone(tmp_path: Path) -> None:
    """A link in place of .venv would let `venv --clear` empty the folder that it points to."""
    checkout, other = tmp_path / "checkout", tmp_path / "other/.venv"
    (checkout / "examples").mkdir(parents=True)
    shutil.copy(ROOT / "setup.py", checkout)
    shutil.copy(ROOT / "examples/setup.sh", checkout / "examples")
    other.mkdir(parents=True)
    (other / "kept").touch()
    (checkout / ".venv").symlink_to(other)
    done = subprocess.run(
        ["bash", checkout / "examples/setup.sh"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert f"{checkout}/.venv is a symbolic link" in done.stderr and str(other) in done.stderr
    assert (other / "kept").exists()
