"""The cluster scripts with stand-ins for torchrun and srun, and every flag set they can make."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from megamem.planner import Plan, asked_layout, make_plan
from megamem.planner.cost import layout_cost
from megamem.planner.plan import fits
from megamem.planner.sizes import dense_parts
from megamem.tools.plan import job_from_args, parse
from tests.helpers.megatron_runs import ITERATION, ROOT

CLUSTER = ROOT / "examples" / "cluster"
SIZES = {"134m": ["1m", "4m", "16m", "64m"]}
SIZES |= dict.fromkeys(["373m", "1.3b"], SIZES["134m"]) | {"8b": ["16m"]}
ROWS = {"1m": 2**20, "4m": 2**22, "16m": 2**24, "64m": 2**26}
# millions of parameters, as the paper's tables have them
PUBLISHED = {
    ("134m", "dense"): 134.1,
    ("134m", "1m"): 937.1,
    ("373m", "dense"): 373.9,
    ("1.3b", "dense"): 1261.5,
    ("1.3b", "4m"): 9823.2,
    ("1.3b", "16m"): 35618.1,
    ("1.3b", "64m"): 138747.7,
}
SETS = [(model, rows) for model, sizes in SIZES.items() for rows in ["dense", *sizes]]
WITH_MEMORY = [(model, rows) for model, rows in SETS if rows != "dense"]
PASSED_ON = ("CUDA_DEVICE_MAX_CONNECTIONS",)


@dataclass(frozen=True)
class Started:
    """What a script handed to torchrun or srun."""

    words: list[str]
    environment: dict[str, str]

    @property
    def flags(self) -> list[str]:
        """After the training script."""
        (script,) = [place for place, word in enumerate(self.words) if word.endswith("_gpt.py")]
        return self.words[script + 1 :]

    def value(self, flag: str) -> str:
        assert self.words.count(flag) == 1, flag
        return self.words[self.words.index(flag) + 1]


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Runs a script of the cluster and returns a Started, or what it said when it refused."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("torchrun", "srun"):
        stand_in(programs / name, 'printf "%s\\0" "$@" >"$CAPTURE"; env -0 >"$CAPTURE.env"')
    stand_in(
        programs / "scontrol", 'test "$1 $2" = "show hostnames" && printf "node07\\nnode08\\n"'
    )

    def run(script: str, *words: str, **environment: object) -> Started | str:
        capture = tmp_path / "capture"
        capture.unlink(missing_ok=True)
        usual = {
            "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            # an environment is active: the script looks for no other
            "VIRTUAL_ENV": str(Path(sys.executable).parents[1]),
            "CAPTURE": str(capture),
            "DATA": "mock",
            "RUN": str(tmp_path / "run"),
        }
        settings = usual | {name: str(value) for name, value in environment.items()}
        settings = {name: value for name, value in settings.items() if value}
        result = subprocess.run(
            ["bash", str(CLUSTER / script), *words],
            cwd=tmp_path,
            env={"HOME": os.environ.get("HOME", "/"), **settings},
            capture_output=True,
            text=True,
        )
        if result.returncode:
            assert not capture.exists()
            return result.stderr
        if not capture.exists():
            return result.stdout
        pairs = (tmp_path / "capture.env").read_text().split("\0")[:-1]
        return Started(
            capture.read_text().split("\0")[:-1], dict(pair.split("=", 1) for pair in pairs)
        )

    return run


def stand_in(path: Path, body: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


def fewest(model: str, rows: str, lean: bool = False) -> int:
    """GPUs that a model's file says are needed."""
    text = (CLUSTER / "models" / f"{model}.sh").read_text()
    if rows == "dense":
        return int(re.search(r"^tensor_parallel=(\d+)", text, re.MULTILINE)[1])
    line = re.search(rf"^{'lean' if lean else 'least'}=\((.*)\)", text, re.MULTILINE)[1]
    return int(dict(re.findall(r"\[(\w+)\]=(\d+)", line))[rows])


def on(gpus: int) -> dict[str, object]:
    """The settings for so many GPUs, eight in a node."""
    return {"GPUS": min(gpus, 8), "NODES": max(1, gpus // 8), "HEAD": "node07"}


def plan_of(started: Started, world: int) -> Plan:
    return make_plan(job_from_args(parse(["--world-size", str(world), *started.flags])))


def test_the_files_of_models_are_those_tested():
    assert {path.stem for path in (CLUSTER / "models").glob("*.sh")} == SIZES.keys()


@pytest.mark.parametrize("path", sorted(CLUSTER.rglob("*.s*")), ids=lambda path: path.name)
def test_bash_reads_the_file(path):
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.parametrize(("model", "rows"), WITH_MEMORY)
def test_planner_agrees_that_the_table_fits(cluster, model, rows):
    """It does as asked for on as many GPUs as the model's file says, and on half of them not."""
    for lean in (False, True):
        least = fewest(model, rows, lean)
        started = cluster("torchrun.sh", model, rows, LEAN=int(lean), **on(least))
        plan = plan_of(started, least)
        assert fits(plan.job, plan.asked), plan.asked.bytes.total
        assert plan.job.memory.num_rows == ROWS[rows]
        assert plan.job.state.total == (10 if lean else 18)
        # nor would half of them do
        half = least // 2
        if half >= plan.job.cluster.tensor_model_parallel_size:
            fewer = ["--world-size", half, *started.flags, "--memory-group-size", half]
            job = job_from_args(parse([str(word) for word in fewer]))
            assert not fits(job, layout_cost(job, asked_layout(job)))


@pytest.mark.parametrize(("model", "rows"), SETS)
def test_planned_parameters_are_the_published_ones(cluster, model, rows):
    started = cluster("torchrun.sh", model, rows, **on(fewest(model, rows)))
    if rows == "dense":
        shape = job_from_args(parse(started.flags)).shape
        parts = dense_parts(shape)
        total = shape.num_layers * (parts.layer + parts.ffn) + parts.final_norm
        total += parts.embeddings + parts.output
    else:
        total = plan_of(started, fewest(model, rows)).parameters["total"]
    assert total / 1e6 == pytest.approx(PUBLISHED.get((model, rows), total / 1e6), abs=0.05)


def test_plain_memory_is_two_flags_away(cluster):
    readme = (ROOT / "examples/README.md").read_text()
    model, rows, *flags = re.search(r"`(1\.3b 1m --memory-variant .*?)`", readme)[1].split()
    started = cluster("torchrun.sh", model, rows, *flags, GPUS=8)
    assert plan_of(started, 8).parameters["total"] / 1e6 == pytest.approx(3377.6, abs=0.05)


def test_table_in_the_readme_is_that_of_the_files(cluster):
    readme = (ROOT / "examples/README.md").read_text()
    for model, sizes in SIZES.items():
        row = re.search(rf"^\| `{model}` \|(.*)\|$", readme, re.MULTILINE)[1]
        *counts, least, lean = [cell.strip() for cell in row.split("|")]
        assert least == " / ".join(str(fewest(model, rows)) for rows in sizes)
        assert lean == " / ".join(str(fewest(model, rows, lean=True)) for rows in sizes)
        for rows, cell in zip(["1m", "4m", "16m", "64m"], counts[1:], strict=True):
            assert bool(cell) is (rows in sizes)
            if cell:
                started = cluster("torchrun.sh", model, rows, **on(fewest(model, rows)))
                total = plan_of(started, fewest(model, rows)).parameters["total"] / 1e9
                assert total == pytest.approx(float(cell), abs=0.06 if total > 10 else 0.006)


def test_recipe_is_the_papers(cluster):
    started = cluster("torchrun.sh", "1.3b", "1m", GPUS=8)
    recipe = {
        "--lr": 1e-4,
        "--memory-lr": 1e-3,
        "--min-lr": 1e-6,
        "--lr-warmup-iters": 4000,
        "--train-iters": 128000,
        "--clip-grad": 1.0,
        "--memory-clip-grad": 1.0,
        "--adam-beta1": 0.9,
        "--adam-beta2": 0.95,
        "--adam-eps": 1e-8,
        "--weight-decay": 0.1,
        "--memory-weight-decay": 0.1,
        "--memory-heads": 4,
        "--memory-topk": 32,
    }
    assert {flag: float(started.value(flag)) for flag in recipe} == recipe
    assert started.value("--lr-decay-style") == "linear"
    # a trillion tokens
    tokens = 128000 * int(started.value("--global-batch-size")) * int(started.value("--seq-length"))
    assert 1.0e12 < tokens < 1.1e12
    layers = started.words[started.words.index("--memory-layers") + 1 :][:4]
    assert layers == ["3", "11", "19", "--memory-num-keys"]
    assert started.value("--memory-optimizer") == "adamw"


def test_every_flag_set_builds_on_the_meta_device(cluster):
    """Megatron's parser, its checks and ours, and rank 0 of the model at its full size."""
    jobs, expected = [], {}
    for model, rows in SETS:
        for lean in (False, True) if rows == "64m" else (False,):
            least = fewest(model, rows, lean)
            started = cluster("torchrun.sh", model, rows, LEAN=int(lean), **on(least))
            name = f"{model}-{rows}{'-lean' if lean else ''}"
            environment = {name: started.environment[name] for name in PASSED_ON}
            jobs.append([name, least, environment, started.flags])
            expected[name] = plan_of(started, least) if rows != "dense" else None
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.examples.dry_build"],
        input=json.dumps(jobs),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    built = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert [job["name"] for job in built] == list(expected)
    for job in built:
        model, rows, *_ = job["name"].split("-")
        plan = expected[job["name"]]
        if plan is None:
            assert not job["tables"] and set(job["layers"]) == {"MLP"}
            if fewest(model, rows) == 1:
                assert job["parameters"] / 1e6 == pytest.approx(
                    PUBLISHED.get((model, rows), job["parameters"] / 1e6), abs=0.05
                )
            continue
        places = [n for n, kind in enumerate(job["layers"]) if kind == "MemoryMLP"]
        assert places == plan.job.memory.memory_layers
        (shape,) = job["tables"].values()
        layout, memory = plan.asked.layout, plan.job.memory
        assert shape == [
            memory.num_rows // layout.row_ranks,
            memory.value_dim // layout.column_ranks,
        ]
        # what the rank holds beside its piece of the table
        if plan.job.cluster.tensor_model_parallel_size == 1:
            beside = plan.parameters["total"] - plan.parameters["value table"]
            assert job["parameters"] - shape[0] * shape[1] == beside


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
        (["1.3b", "64m"], on(64), "needs 128 GPUs of 80 GB, not 64. LEAN=1 needs 64"),
        (["1.3b", "4m"], {"GPUS": 12}, "a table over 8 ranks does not divide 12; set GROUP"),
        (["8b", "dense"], {"GPUS": 4}, "8b is cut over 8 GPUs, which 4 are no multiple of"),
        (["134m", "1m"], {"DATA": ""}, "set DATA to the prefix of a data set, or to mock"),
        (["134m", "1m"], {"DATA": "gone"}, "DATA=gone: there is no gone.idx"),
        (["134m", "1m"], {"DATA": __file__[:-3]}, "there is no"),
        (["134m", "1m"], {"MEGATRON": "gone"}, "MEGATRON=gone has no pretrain_gpt.py"),
        (["134m", "1m"], {"NODES": 2}, "NODES=2: set HEAD to the name of the first node"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(cluster, words, settings, message):
    said = cluster("torchrun.sh", *words, **settings)
    assert said.startswith("cluster: error: ") and said.count("\n") == 1
    assert message in said


def test_data_without_its_tokenizer(cluster, tmp_path):
    (tmp_path / "corpus.idx").touch()
    assert "set TOKENIZER" in cluster("torchrun.sh", "134m", "1m", DATA="corpus")


def test_plan_starts_nothing(cluster):
    said = cluster("torchrun.sh", "1.3b", "64m", PLAN=1, NODES=8, HEAD="node07")
    assert isinstance(said, str) and "What would: --world-size 72" in said


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
    assert f"submit from the checkout of megamem; {tmp_path} is not one" in said


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
