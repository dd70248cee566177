"""Parses Dockerfiles, as far as docker/ needs it."""

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"


@dataclass(frozen=True)
class Step:
    """An instruction, with joined lines, without comments, and with build arguments inserted."""

    name: str
    text: str

    @property
    def words(self) -> list[str]:
        """The words of the text, from a JSON list or split like a shell does."""
        return json.loads(self.text) if self.text.startswith("[") else shlex.split(self.text)


def read_steps(path: Path) -> list[Step]:
    """The instructions of a Dockerfile, in order."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    steps, defaults = [], {}
    for line in joined.splitlines():
        if not line.strip():
            continue
        name, _, text = line.partition(" ")
        if name == "ARG":
            key, _, value = text.partition("=")
            defaults[key] = value
        for key, value in defaults.items():
            text = text.replace("${" + key + "}", value)
        assert "${" not in text, f"{path.name}: {text} names an argument that is not declared"
        steps.append(Step(name, text))
    return steps


def commands(step: Step) -> list[list[str]]:
    """The commands of a RUN, CMD or HEALTHCHECK, split at &&, without options before CMD."""
    text = step.text.partition("CMD ")[2] if step.name == "HEALTHCHECK" else step.text
    if text.startswith("["):
        return [json.loads(text)]
    return [shlex.split(part) for part in text.split("&&")]
