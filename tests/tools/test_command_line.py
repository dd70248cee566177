"""The flags and ranks of pasted command lines."""

import pytest

from megamem.tools.command_line import RunCommand, pasted, read

FLAGS = ["--num-layers", "4", "--save", "/a b"]


@pytest.mark.parametrize(
    ("text", "ranks"),
    [
        ("--num-layers 4 --save '/a b'", None),
        ("python pretrain_gpt.py --num-layers 4 --save '/a b' > log 2>&1", None),
        ("A=1 B='x y' torchrun --nproc-per-node=8 x/train.py --num-layers 4 --save '/a b'", 8),
        ("N=4 torchrun --nnodes $N --nproc_per_node 8 train.py --num-layers $N --save '/a b'", 32),
        # what a value stands for matters only before the end of the command
        (
            "torchrun --nproc-per-node gpu train.py --num-layers 4 --save '/a b' | tee log.$JOB",
            None,
        ),
        (
            "torchrun --nproc-per-node 2 -m m.run train.py --num-layers 4 --save '/a b' && ls",
            2,
        ),
        ("python train.py \\\n  --num-layers 4 \\\n  --save '/a b'  # the end", None),
    ],
)
def test_of_a_command_only_the_flags_are_read(text: str, ranks: int | None) -> None:
    assert read([text]) == RunCommand(FLAGS, ranks)


def test_words_that_a_shell_has_split_are_read_alike() -> None:
    words = ["torchrun", "--nproc-per-node", "8", "train.py", *FLAGS]
    assert read(words) == RunCommand(FLAGS, 8)
    assert read(FLAGS) == RunCommand(FLAGS)


def test_a_command_among_other_words() -> None:
    words = [
        "--gpu",
        "h200",
        "torchrun --nproc-per-node 8 train.py --num-layers 4",
        "--fill",
        "0.5",
    ]
    between = ["--world-size=8", "--num-layers", "4"]
    assert pasted(words) == ["--gpu", "h200", *between, "--fill", "0.5"]
    assert pasted(["--save", "/a b"]) == ["--save", "/a b"]
