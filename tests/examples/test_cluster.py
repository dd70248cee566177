"""What the scripts of examples/cluster start, and what they refuse."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.examples.cluster_scripts import CLUSTER, SIZES, Started, on, stand_in, stand_ins
from tests.helpers.megatron_runs import ITERATION, ROOT


@pytest.fixture
def cluster(tmp_path):
    return stand_ins(tmp_path)


def test_the_files_of_models_are_those_tested():
    assert {path.stem for path in (CLUSTER / "models").glob("*.sh")} == SIZES.keys()


@pytest.mark.parametrize("path", sorted(CLUSTER.rglob("*.s*")), ids=lambda path: path.name)
def test_bash_reads_the_file(path):
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_one_gpu(cluster):
    started = cluster("torchrun.sh", "373m", "1m", "--train-iters", "7")
    assert started.words[:5] == ["--standalone", "--nproc-per-node", "1", "-m", "megamem.run"]
    assert started.words[5] == str(ROOT / "examples/pretrain_gpt.py")
    # what follows overrules
    assert started.words[-2:] == ["--train-iters", "7"]
    assert started.value("--memory-group-size") == "1"


def test_one_node(cluster):
    started = cluster("torchrun.sh", "1.3b", "1m", GPUS=8)
    assert started.words[:3] == ["--standalone", "--nproc-per-node", "8"]
    # two GPUs would hold it, a node is as easy to reach
    assert started.value("--memory-group-size") == "8"
    narrow = cluster("torchrun.sh", "1.3b", "1m", GPUS=8, GROUP=2)
    assert narrow.value("--memory-group-size") == "2"


def test_many_nodes(cluster):
    started = cluster("torchrun.sh", "1.3b", "64m", NODES=16, HEAD="node07", PORT=4711, JOB="x")
    words = "--nnodes 16 --rdzv-backend c10d --rdzv-endpoint node07:4711 --rdzv-id x"
    assert started.words[:10] == [*words.split(), "--nproc-per-node", "8"]
    assert started.value("--memory-group-size") == "128"


def test_eight_billion_are_cut_over_a_node(cluster):
    started = cluster("torchrun.sh", "8b", "16m", NODES=8, HEAD="node07")
    assert started.value("--tensor-model-parallel-size") == "8"
    assert "--sequence-parallel" in started.words
    assert started.environment["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"


def test_checkout_of_megatron(cluster, tmp_path):
    (tmp_path / "Megatron LM").mkdir()
    (tmp_path / "Megatron LM/pretrain_gpt.py").touch()
    started = cluster("torchrun.sh", "134m", "1m", MEGATRON="Megatron LM", RUN="runs/x")
    assert started.words[5] == str(tmp_path / "Megatron LM/pretrain_gpt.py")
    # its own megatron is found there, and checkpoints stay where they were asked for
    assert started.environment["PWD"] == str(tmp_path / "Megatron LM")
    assert started.value("--save") == started.value("--load") == f"{tmp_path}/runs/x/checkpoints"


def test_data_of_ones_own(cluster, tmp_path):
    (tmp_path / "corpus.idx").touch()
    started = cluster("torchrun.sh", "134m", "1m", DATA="corpus", TOKENIZER="org/tokenizer")
    assert started.value("--data-path") == str(tmp_path / "corpus")
    assert started.value("--tokenizer-model") == "org/tokenizer"
    assert "--mock-data" not in started.words


@pytest.mark.parametrize(
    ("words", "settings", "message"),
    [
        ([], {}, "MODEL '' is not one of: 1.3b 134m 373m 8b"),
        (["2b"], {}, "MODEL '2b' is not one of: 1.3b"),
        (["134m"], {}, "ROWS of 134m '' is not one of: dense 1m 4m 16m 64m"),
        (["8b", "1m"], {}, "ROWS of 8b '1m' is not one of: dense 16m"),
        (["1.3b", "64m"], on(64), "of 80 GB, but there are 64. With LEAN=1 it needs 64"),
        (["1.3b", "4m"], {"GPUS": 12}, "the 8 ranks of a table do not divide 12; set GROUP"),
        (["8b", "dense"], {"GPUS": 4}, "tensor-parallel size 8, of which 4 GPUs are not a"),
        (["134m", "1m"], {"DATA": ""}, "set it to the prefix of a data set, or to mock"),
        (
            ["134m", "1m"],
            {"DATA": "gone"},
            "DATA=gone is not the prefix of a data set: no gone.idx",
        ),
        (["134m", "1m"], {"DATA": __file__[:-3]}, "test_cluster.idx exists"),
        (["134m", "1m"], {"MEGATRON": "gone"}, "MEGATRON=gone has no pretrain_gpt.py"),
        (["134m", "1m"], {"NODES": 2}, "NODES=2 needs HEAD; set it to the name of the first node"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(cluster, words, settings, message):
    said = cluster("torchrun.sh", *words, **settings)
    assert said.startswith("cluster: error: ") and said.count("\n") == 1
    assert message in said


def test_data_without_its_tokenizer(cluster, tmp_path):
    (tmp_path / "corpus.idx").touch()
    assert "TOKENIZER is not set" in cluster("torchrun.sh", "134m", "1m", DATA="corpus")


def test_plan_starts_nothing(cluster):
    said = cluster("torchrun.sh", "1.3b", "64m", PLAN=1, NODES=8, HEAD="node07")
    assert isinstance(said, str) and "Use --world-size 72" in said


def slurm(cluster, nodes: int, *words: str, **settings: object) -> Started | str:
    """slurm.sbatch as Slurm would start it on the first of its nodes."""
    job = {"SLURM_NTASKS": nodes * 8, "SLURM_JOB_NODELIST": "node[07-08]", "SLURM_JOB_ID": 1234567}
    return cluster("slurm.sbatch", *words, **({"SLURM_SUBMIT_DIR": ROOT} | job | settings))


def test_slurm_starts_a_task_for_each_gpu(cluster):
    started = slurm(cluster, 16, "1.3b", "64m", "--train-iters", "7")
    assert started.words[:3] == ["--kill-on-bad-exit=1", "--label", "bash"]
    assert started.words[-2:] == ["--train-iters", "7"]
    assert started.value("--memory-group-size") == "128"
    found = {name: started.environment[name] for name in ("MASTER_ADDR", "WORLD_SIZE")}
    assert found == {"MASTER_ADDR": "node07", "WORLD_SIZE": "128"}
    assert 20000 <= int(started.environment["MASTER_PORT"]) < 30000
    directives = re.findall(r"^#SBATCH (\S+)", (CLUSTER / "slurm.sbatch").read_text(), re.M)
    assert {"--ntasks-per-node=8", "--gpus-per-node=8", "--requeue"} <= set(directives)


def test_slurm_task_finds_its_rank(cluster, tmp_path):
    """The command that srun starts, started as its fourth task."""
    started = slurm(cluster, 1, "1.3b", "1m")
    place = {"SLURM_PROCID": "3", "SLURM_LOCALID": "3", "SLURM_NTASKS_PER_NODE": "8"}
    stand_in(
        tmp_path / "bin/python", 'echo "$RANK $LOCAL_RANK $LOCAL_WORLD_SIZE $WORLD_SIZE"; echo "$*"'
    )
    command = started.words[started.words.index("bash") :]
    said = subprocess.run(
        command, env=started.environment | place, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert said[0] == "3 3 8 8"
    assert said[1].startswith(f"-m megamem.run {ROOT}/examples/pretrain_gpt.py --num-layers 22")


def test_slurm_container(cluster, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/corpus.idx").touch()
    (tmp_path / "Megatron-LM").mkdir()
    (tmp_path / "Megatron-LM/pretrain_gpt.py").touch()
    mine = {"CONTAINER": "megamem.sqsh", "MOUNTS": "/scratch:/scratch", "TOKENIZER": "t"}
    where = {"MEGATRON": "Megatron-LM", "DATA": "data/corpus"}
    started = slurm(cluster, 1, "1.3b", "1m", **mine, **where)
    options = dict(word.split("=", 1) for word in started.words if word.startswith("--container"))
    assert options["--container-image"] == "megamem.sqsh"
    assert options["--container-workdir"] == str(tmp_path / "Megatron-LM")
    mounts = options["--container-mounts"].split(",")
    folders = [ROOT, *(tmp_path / name for name in ("run", "Megatron-LM", "data")), "/scratch"]
    assert mounts == [f"{folder}:{folder}" for folder in folders]
    # pyxis mounts what exists
    assert (tmp_path / "run").is_dir()


def test_slurm_is_submitted_from_the_checkout(cluster, tmp_path):
    said = slurm(cluster, 1, "1.3b", "1m", SLURM_SUBMIT_DIR=tmp_path)
    assert f"{tmp_path} is not a checkout of megamem; run sbatch in one" in said


TINY = "--hidden-size 64 --num-layers 12 --train-iters 3 --log-interval 1 --num-attention-heads 4"


@pytest.mark.gloo
@pytest.mark.slow
def test_two_agents_of_torchrun_train_together(tmp_path):
    """The many-node command line, two nodes on one machine."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        **{
            "NODES": "2",
            "GPUS": "1",
            "HEAD": "127.0.0.1",
            "PORT": "29641",
            "JOB": str(os.getpid()),
        },
        "RUN": str(tmp_path),
    }
    command = ["bash", str(CLUSTER / "dry_run.sh"), *TINY.split(), "--save-interval", "3"]
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    nodes = [subprocess.Popen(command, env=environment, cwd=ROOT, **piped) for _ in range(2)]
    said = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said[0][-2000:] + said[1][-2000:]
    # the last rank logs, whichever agent has it
    assert len(ITERATION.findall("".join(said))) == 3
    assert (tmp_path / "checkpoints/latest_checkpointed_iteration.txt").read_text() == "3"
