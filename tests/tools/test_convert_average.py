"""The mean of several checkpoints."""

from pathlib import Path

import pytest
import torch

from megamem.tools.convert import torch_dist
from megamem.tools.convert.lazy import LazyTensor, Region, of_tensor
from tests.helpers.checkpoints import saved_tensors
from tests.helpers.commands import command
from tests.helpers.megatron_runs import run_training

main = command("convert")
MEMORY = ("--memory-layers", 1, 2, "--memory-num-keys", 9, "--memory-topk", 4)
TABLE, PLACEMENT = "memory_values.shared.weight", "memory_values.shared.placement"


@pytest.mark.gloo
def test_a_run_loads_the_mean_of_its_checkpoints(tmp_path: Path) -> None:
    saving = ("--save", tmp_path / "saved", "--save-interval", 1, "--train-iters", 3)
    run_training("save", 1, *MEMORY, *saving)
    folders = [tmp_path / f"saved/iter_{n:07d}" for n in (1, 2, 3)]
    words = ["average", *map(str, folders), "--to", str(tmp_path / "mean")]
    assert main(words) == 0
    found, parts = saved_tensors(tmp_path / "mean/release"), [saved_tensors(x) for x in folders]
    assert found.keys() == {key for key in parts[0] if not key.startswith("optimizer")}
    for key, tensor in found.items():
        wanted = torch.stack([part[key].double() for part in parts]).mean(dim=0)
        assert tensor.double().allclose(wanted, rtol=1e-6, atol=1e-9), key
    assert not found[TABLE].equal(parts[2][TABLE])
    start = ("--load", tmp_path / "mean", "--finetune", "--train-iters", 1)
    log = run_training("mean", 1, *MEMORY, *start)
    assert log.losses and "could not be compared" not in log.stdout


def _saved(folder: Path, weight: torch.Tensor, seed: int = 0, **settings: object) -> str:
    rows = len(weight) // 2
    regions = (Region((0, 0), (rows, 4)), Region((rows, 0), (len(weight) - rows, 4)))
    table = LazyTensor((len(weight), 4), weight.dtype, regions, lambda r: weight[r.slices])
    tensors = {TABLE: table, PLACEMENT: of_tensor(torch.tensor([seed]))}
    torch_dist.write(folder, tensors, [], lambda _: None, {"format": 1, **settings})
    return str(folder)


def test_sums_are_in_fp32_and_rounded_once(tmp_path: Path) -> None:
    weights = [torch.randn(9, 4).bfloat16() for _ in range(3)]
    folders = [_saved(tmp_path / str(n), weight) for n, weight in enumerate(weights)]
    assert main(["average", *folders, "--to", str(tmp_path / "mean")]) == 0
    found = saved_tensors(tmp_path / "mean/release")[TABLE]
    assert found.equal(torch.stack(weights).float().mean(dim=0).bfloat16())


def test_what_cannot_be_averaged_is_told_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weight = torch.randn(9, 4)
    first = _saved(tmp_path / "first", weight, topk=4)

    def said(*others: str) -> str:
        assert main(["average", first, *others, "--to", str(tmp_path / "mean")]) == 2
        text = capsys.readouterr().err
        assert text.startswith("megamem: error: ") and text.count("\n") == 1, text
        assert not (tmp_path / "mean").exists()
        return text

    assert "at least two checkpoints" in said()
    other = _saved(tmp_path / "size", torch.randn(16, 4), topk=4)
    assert f"shape of {TABLE} is 16 x 4 in one and 9 x 4" in said(other)
    other = _saved(tmp_path / "dtype", weight.bfloat16(), topk=4)
    assert "is bfloat16 in one and float32" in said(other)
    other = _saved(tmp_path / "placed", weight, seed=3, topk=4)
    assert f"other places ({PLACEMENT})" in said(other)
    other = _saved(tmp_path / "topk", weight, topk=8)
    assert "topk is 8 in one and 4 in the other" in said(other)
    assert "is not a torch_dist checkpoint" in said(str(tmp_path / "nothing"))
