"""examples/generate.py against complete forwards without a cache, on one rank and on several."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megamem.config import ConfigurationError
from tests.helpers.megatron_runs import ROOT, TrainingLog, command_line, launch_warm
from tests.helpers.warm_ranks import environment_of_runs

EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))

import generate  # noqa: E402

GENERATE, GREEDY = EXAMPLES / "generate.py", ROOT / "tests/helpers/greedy.py"
MODEL = (
    *("--memory-layers", 1, 2, "--memory-num-keys", 16, "--memory-heads", 2, "--memory-topk", 4),
    *("--untie-embeddings-and-output-weights", "--swiglu", "--normalization", "RMSNorm"),
)
# of different lengths, the longest first
PROMPTS = ("9 8 7 6 5 4 3 2 1 100 101 102", "3 1 4 1 5", "2 7", "11", "64 32 16 8 4 2 1", "5 5 5")
LONGEST = 9
# two prompts at a time
TAKE = ("--num-tokens-to-generate", LONGEST, "--inference-max-requests", 2)
TP2 = ("--tensor-model-parallel-size", 2)
WIDE = ("--memory-group-size", 2)
HYBRID = (
    *("--hybrid-layer-pattern", "*-*-", "--num-layers", 4, "--memory-layers", 1, 3),
    *("--spec", "megatron.core.models.hybrid.hybrid_layer_specs", "hybrid_stack_spec"),
)
PEER = ("--memory-variant", "peer", "--memory-key-dim", 16)


@dataclass(frozen=True)
class Saved:
    """A random model and what it writes after each of PROMPTS."""

    checkpoint: Path
    flags: tuple[object, ...]
    written: list[list[int]]


def _saved(folder: Path, *flags: object) -> Saved:
    file, checkpoint = folder / "written.json", folder / "checkpoint"
    own = ("--save", checkpoint, "--save-interval", 1, "--greedy-file", file)
    own += ("--longest", LONGEST, "--prompts", *PROMPTS)
    launch_warm("saved", 1, *command_line(*MODEL, *flags, *own, script=GREEDY))
    written = json.loads(file.read_text())
    lengths = {len(tokens) for tokens in written}
    # texts that end early, at different places, and texts that are cut
    assert LONGEST in lengths and len(lengths) > 2, written
    return Saved(checkpoint, (*MODEL, *flags), written)


@pytest.fixture(scope="module")
def memory_plus(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return _saved(tmp_path_factory.mktemp("memory_plus"))


def _generate(ranks: int, *words: object, check: bool = True) -> TrainingLog:
    return launch_warm("generate", ranks, *command_line(*words, script=GENERATE), check=check)


def _check(saved: Saved, ranks: int, folder: Path, *flags: object) -> TrainingLog:
    output = folder / "texts.jsonl"
    asked = ("--load", saved.checkpoint, "--prompt", *PROMPTS, "--output", output)
    log = _generate(ranks, *saved.flags, *flags, *TAKE, *asked)
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [one["prompt"] for one in found] == list(PROMPTS)
    assert [one["tokens"] for one in found] == saved.written
    for one in found:
        assert one["text"].split() == [str(token) for token in one["tokens"]]
        assert one["ended"] == (len(one["tokens"]) < LONGEST)
        assert f"{one['prompt']}\n    ->{one['text']}\n" in log.stdout
    return log


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        pytest.param(1, (), id="one rank"),
        pytest.param(2, TP2, id="tp"),
        pytest.param(2, (*TP2, "--sequence-parallel"), id="tp, sequence parallel"),
        pytest.param(2, ("--pipeline-model-parallel-size", 2), id="pp"),
        pytest.param(2, (), id="replicas of the model"),
        pytest.param(2, WIDE, id="rows over replicas"),
        pytest.param(
            2,
            (*WIDE, "--memory-mode", "column"),
            id="columns over replicas",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_it_writes_what_complete_forwards_write(
    memory_plus: Saved, tmp_path: Path, ranks: int, flags: tuple
) -> None:
    log = _check(memory_plus, ranks, tmp_path, *flags)
    assert ("--sequence-parallel is off" in log.stdout) == ("--sequence-parallel" in flags)
    assert ("one that has finished joins in" in log.stdout) == ("--memory-group-size" in flags)


@pytest.mark.gloo
def test_experts_of_one_unit_over_replicas(tmp_path: Path) -> None:
    _check(_saved(tmp_path, *PEER), 2, tmp_path, *WIDE)


@pytest.mark.gloo
def test_plain_memories_and_learned_positions(tmp_path: Path) -> None:
    flags = ("--memory-variant", "memory", "--memory-pool", "layer", "--memory-keep-ffn")
    saved = _saved(tmp_path, *flags, "--position-embedding-type", "learned_absolute")
    _check(saved, 2, tmp_path, *TP2)


@pytest.mark.gloo
@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(
            ("--memory-variant", "ultramem", "--memory-layers", 0, 2, "--memory-skip", 1),
            id="ultramem, added behind later layers",
        ),
        pytest.param(
            ("--memory-variant", "ultramem-v2", "--memory-layers", 0, 1, 2, 3),
            marks=pytest.mark.slow,
            id="ultramem-v2",
        ),
    ],
)
def test_tucker_scores(tmp_path: Path, flags: tuple) -> None:
    _check(_saved(tmp_path, *flags), 2, tmp_path, *TP2)


@pytest.mark.gloo
def test_a_hybrid_model(tmp_path: Path) -> None:
    pytest.importorskip("megatron.core.models.hybrid", reason="hybrid models came in 0.18")
    _check(_saved(tmp_path, *HYBRID), 1, tmp_path)


@pytest.mark.gloo
def test_a_replica_without_prompts_and_a_file_of_prompts(
    memory_plus: Saved, tmp_path: Path
) -> None:
    file, output = tmp_path / "prompts.txt", tmp_path / "texts.jsonl"
    file.write_text(f"{PROMPTS[1]}\n\n")
    asked = ("--load", memory_plus.checkpoint, "--prompts-file", file, "--output", output)
    _generate(2, *MODEL, *WIDE, *TAKE, *asked)
    assert [json.loads(line)["tokens"] for line in output.read_text().splitlines()] == [
        memory_plus.written[1]
    ]


@pytest.mark.gloo
@pytest.mark.slow
def test_samples_are_those_of_one_process(memory_plus: Saved, tmp_path: Path) -> None:
    """Tensor-parallel ranks draw the same tokens, which are not the likeliest ones.

    pytest -m slow tests/examples/test_generate.py
    """
    drawn = []
    for number, (ranks, flags) in enumerate([(1, ()), (2, TP2)]):
        output = tmp_path / f"{number}.jsonl"
        asked = ("--load", memory_plus.checkpoint, "--prompt", *PROMPTS, "--output", output)
        _generate(ranks, *MODEL, *flags, *TAKE, *asked, "--top-k", 20, "--temperature", 1.5)
        drawn.append([json.loads(line)["tokens"] for line in output.read_text().splitlines()])
    assert drawn[0] == drawn[1] != memory_plus.written


@pytest.mark.gloo
def test_the_error_of_a_run_is_one_line(memory_plus: Saved) -> None:
    log = _generate(1, *MODEL, "--prompt", "1 2", check=False)
    assert log.returncode == 2 and "Traceback" not in log.stdout
    assert "megamem: error: --load is missing; give the folder" in log.stdout
    words = ("--load", memory_plus.checkpoint, "--prompt", "1 2", " ".join(["7"] * 30))
    log = _generate(1, *MODEL, *words, "--num-tokens-to-generate", 4, check=False)
    assert log.returncode == 2 and "Traceback" not in log.stdout
    assert (
        "megamem: error: prompt 2 ('7 7 7 7 7 7 7 7 7 7 7 7 7 7 7 7 7 7 7...') has 30 tokens; with "
        "--max-position-embeddings 32 and --num-tokens-to-generate 4 it may have 28; shorten it, "
        "or generate less\n"
    ) in log.stdout


def _args(**given: Any) -> Namespace:
    usual: dict[str, Any] = dict.fromkeys(generate.UNSUPPORTED, 1)
    usual |= {"load": None, "num_tokens_to_generate": 4, "inference_max_requests": 8}
    usual |= {"output": None, "temperature": None, "top_k": None, "top_p": None}
    usual |= {"padded_vocab_size": 128, "prompt": [], "prompts_file": None}
    return Namespace(**usual | given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"load": "/nowhere"}, r"--load /nowhere: no checkpoint there"),
        ({"context_parallel_size": 2}, r"--context-parallel-size 2 does not work with generation"),
        ({"num_tokens_to_generate": 0}, r"--num-tokens-to-generate 0: choose at least 1"),
        ({"inference_max_requests": 0}, r"--inference-max-requests 0: choose at least 1"),
        ({"output": Path("/nowhere/texts")}, r"--output /nowhere/texts: there is no such folder"),
        ({"temperature": 0.0}, r"--temperature 0.0: choose more than 0"),
        ({"top_k": 129}, r"--top-k 129: choose 1 to 128"),
        ({"top_p": 1.5}, r"--top-p 1.5: choose more than 0 and at most 1"),
        ({"top_k": 4, "top_p": 0.5}, r"--top-k and --top-p do not work together"),
    ],
)
def test_flags_that_cannot_work_are_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        generate.check_args(_args(**given))


def test_prompts_that_are_not_there(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    with pytest.raises(ConfigurationError, match="there is no prompt; give --prompt TEXT"):
        generate.read_prompts(_args())
    with pytest.raises(ConfigurationError, match=f"--prompts-file {file}: there is no such file"):
        generate.read_prompts(_args(prompts_file=file))
    file.write_text("\n \n")
    with pytest.raises(ConfigurationError, match=f"--prompts-file {file} is empty"):
        generate.read_prompts(_args(prompts_file=file))
    file.write_text("b\nc\n")
    assert generate.read_prompts(_args(prompt=["a"], prompts_file=file)) == ["a", "b", "c"]


def _ask(port: int, path: str, method: str, question: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/{path}",
        data=json.dumps(question).encode(),
        headers={"Content-Type": "application/json"},
        method=method,
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_for(port: int, server: subprocess.Popen) -> None:
    for _ in range(600):
        assert server.poll() is None, "the server ended"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    pytest.fail("the server does not listen")


@pytest.mark.gloo
@pytest.mark.skipif("MEGATRON_LM" not in os.environ, reason="MEGATRON_LM names no checkout")
@pytest.mark.parametrize(("ranks", "flags"), [(1, ()), (2, TP2)], ids=["one rank", "tp"])
def test_the_server_of_a_checkout(
    memory_plus: Saved, tmp_path: Path, ranks: int, flags: tuple
) -> None:
    """MEGATRON_LM=/path/to/Megatron-LM pytest tests/examples/test_generate.py -k server"""
    script = Path(os.environ["MEGATRON_LM"]) / "tools/run_text_generation_server.py"
    port = _free_port()
    words = command_line(
        *(*MODEL, *flags, "--load", memory_plus.checkpoint, "--port", port), script=script
    )
    torchrun = ("torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m")
    command = [sys.executable, "-m", *(torchrun if ranks > 1 else ()), "megamem.run", *words]
    said = tmp_path / "said.txt"
    with said.open("w") as output:
        server = subprocess.Popen(
            [str(word) for word in command],
            cwd=tmp_path,
            env=environment_of_runs(),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_for(port, server)
        ends = [
            " ".join([prompt, *map(str, tokens)])
            for prompt, tokens in zip(PROMPTS, memory_plus.written, strict=True)
        ]
        asked = {"prompts": PROMPTS, "tokens_to_generate": LONGEST, "top_k": 1}
        assert _ask(port, "api", "PUT", asked)["text"] == ends
        asked = {"prompt": PROMPTS[1], "max_tokens": LONGEST, "temperature": 0}
        (choice,) = _ask(port, "completions", "POST", asked)["choices"]
        assert PROMPTS[1] + choice["text"] == ends[1]
        # the engine refuses what is longer than the model's positions, and goes on
        long = {"prompts": ["1 2"], "tokens_to_generate": 99, "top_k": 1}
        said_so = "Maximum allowed sequence length was set to 32 tokens"
        assert said_so in _ask(port, "api", "PUT", long)
        assert _ask(port, "api", "PUT", long | {"tokens_to_generate": 2})["tokens"]
    except BaseException:
        sys.stderr.write(said.read_text()[-6000:])
        raise
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
