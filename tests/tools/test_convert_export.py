"""Export of tables to safetensors and import, however the checkpoint was sharded."""

import json
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from megamem.reference.placement import place_rows
from megamem.tools.convert import lazy, torch_dist
from megamem.tools.convert.lazy import LazyTensor, Region, of_tensor
from megamem.tools.convert.safetensors import INDEX, read_folder, write_file
from tests.helpers.checkpoints import saved_tensors
from tests.helpers.commands import command
from tests.helpers.megatron_runs import run_training

main = command("convert")
N, WIDTH, SEED = 9, 64, 5
TABLE = "memory_values.shared.weight"
PLACEMENT = "memory_values.shared.placement"
MEMORY = (
    *("--memory-layers", 1, 2, "--memory-num-keys", N, "--memory-topk", 4),
    *("--memory-placement-seed", SEED),
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two ranks, with 40 and 41 rows."""
    folder = tmp_path_factory.mktemp("saved")
    saving = ("--save", folder, "--save-interval", 2, "--train-iters", 2)
    run_training("save", 2, *MEMORY, *saving, "--tensor-model-parallel-size", 2)
    return folder


def _model(folder: Path) -> dict[str, Tensor]:
    tensors = saved_tensors(folder)
    return {key: tensor for key, tensor in tensors.items() if not key.startswith("optimizer")}


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for key, tensor in a.items():
        assert tensor.dtype == b[key].dtype, key
        assert torch.equal(tensor.view(torch.uint8), b[key].view(torch.uint8)), key


@pytest.mark.gloo
def test_out_and_back_bit_by_bit(saved: Path, tmp_path: Path) -> None:
    assert main(["export", str(saved), "--to", str(tmp_path / "out"), "--shard-size", "5e-5"]) == 0
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and {file.name for file in files} == set(index["weight_map"].values())
    plain: dict[str, Tensor] = {}
    for file in files:
        plain |= load_file(file)
    model = _model(saved / "iter_0000002")
    assert plain.keys() == model.keys() - {PLACEMENT}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in plain.values())
    # row i * N + j is the value of the pair (i, j)
    assert torch.equal(plain[TABLE], model[TABLE][place_rows(torch.arange(N * N), N, SEED)])

    back = ("--memory-placement-seed", str(SEED))
    assert main(["import", str(tmp_path / "out"), "--to", str(tmp_path / "back"), *back]) == 0
    _same(_model(tmp_path / "back/release"), model)

    # under another placement every pair still has its value
    assert main(["import", str(tmp_path / "out"), "--to", str(tmp_path / "other")]) == 0
    other = _model(tmp_path / "other/release")
    assert int(other[PLACEMENT]) == 0
    assert torch.equal(plain[TABLE], other[TABLE][place_rows(torch.arange(N * N), N, 0)])
    assert not torch.equal(other[TABLE], model[TABLE])


@pytest.mark.gloo
def test_a_run_goes_on_from_an_import(saved: Path, tmp_path: Path) -> None:
    """The first loss is that of a run from the checkpoint itself, under either placement."""
    assert main(["export", str(saved), "--to", str(tmp_path / "out")]) == 0
    start = ("--finetune", "--train-iters", 1)
    whole = run_training("itself", 1, *MEMORY, *start, "--load", saved).losses
    for seed in (SEED, 0):
        folder = tmp_path / str(seed)
        words = ["import", str(tmp_path / "out"), "--to", str(folder)]
        assert main([*words, "--memory-placement-seed", str(seed)]) == 0
        flags = (*MEMORY, "--memory-placement-seed", seed, *start)
        log = run_training("import", 1, *flags, "--load", folder)
        assert log.losses == whole and "could not be compared" not in log.stdout
    # the settings went out and came back
    flags = (*MEMORY, "--memory-placement-seed", 0, *start, "--memory-topk", 2)
    log = run_training("other", 1, *flags, "--load", tmp_path / "0", check=False)
    assert log.returncode != 0 and "--memory-topk 2 differs from 4" in log.stdout


def test_an_import_of_other_files_says_what_it_cannot_compare(saved: Path, tmp_path: Path) -> None:
    assert main(["export", str(saved), "--to", str(tmp_path / "out")]) == 0
    [file] = (tmp_path / "out").glob("*.safetensors")
    # as another program writes it, without the settings
    save_file(load_file(file), file)
    words = ["import", str(tmp_path / "out"), "--to", str(tmp_path / "back")]
    assert main([*words, "--memory-placement-seed", str(SEED)]) == 0
    start = ("--finetune", "--train-iters", 1, "--load", tmp_path / "back")
    log = run_training("import", 1, *MEMORY, *start)
    assert "could not be compared" in log.stdout and "--memory-topk" in log.stdout


class Runs:
    """Runs when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_among_the_arguments_is_not_run(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ckpt"
    shutil.copytree(saved, folder)
    state = dist_checkpointing.load_common_state_dict(str(folder / "iter_0000002"))
    state["args"].sneaky = Runs(tmp_path / "ran")
    # a file of its own comes first, as older releases of Megatron write it
    torch.save(state, folder / "iter_0000002/common.pt")
    assert main(["export", str(folder), "--to", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "ran").exists()
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["memory_settings"])["topk"] == 4


@pytest.mark.parametrize(
    "cuts", [((0, 30, 81), (0, 64)), ((0, 81), (0, 24, 64)), ((0, 7, 50, 81), (0, 16, 64))]
)
def test_tables_saved_by_rows_columns_or_both(
    tmp_path: Path, cuts: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each chunk is read once, and its rows and columns are written where they belong."""
    values = torch.randn(N * N, WIDTH)
    boxes = [
        Region((r0, c0), (r1 - r0, c1 - c0))
        for r0, r1 in zip(cuts[0], cuts[0][1:], strict=False)
        for c0, c1 in zip(cuts[1], cuts[1][1:], strict=False)
    ]
    read: list[Region] = []

    def piece(region: Region) -> Tensor:
        read.append(region)
        return values[region.slices]

    source = {
        TABLE: LazyTensor((N * N, WIDTH), values.dtype, tuple(boxes), piece),
        PLACEMENT: of_tensor(torch.tensor([SEED])),
        "embedding.word_embeddings.weight": of_tensor(torch.randn(8, 16)),
        "decoder.layers.0.mlp.memory.keys.sub_keys": of_tensor(torch.randn(2, 1, N, 4)),
    }
    written: list[int] = []
    torch_dist.write(tmp_path / "ckpt", source, [], written.append)
    assert read == boxes and sum(written) == sum(t.num_bytes for t in source.values())
    monkeypatch.setattr("megamem.tools.convert.safetensors.ROWS_AT_ONCE", 7)
    assert main(["export", str(tmp_path / "ckpt"), "--to", str(tmp_path / "out")]) == 0
    out = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(out[TABLE], values[place_rows(torch.arange(N * N), N, SEED)])

    monkeypatch.setattr(lazy, "REGION_BYTES", 1000)
    words = ["import", str(tmp_path / "out"), "--to", str(tmp_path / "back")]
    assert main([*words, "--memory-placement-seed", str(SEED)]) == 0
    back = torch_dist.TorchDist(tmp_path / "back")
    assert len(back.tensors[TABLE].regions) > 20
    assert torch.equal(saved_tensors(tmp_path / "back/release")[TABLE], values)


def test_every_dtype_is_read_and_written_as_the_library_does(tmp_path: Path) -> None:
    wide, narrow = torch.arange(12.0).view(3, 4), torch.arange(5)
    floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    eights = (torch.float8_e4m3fn, torch.float8_e5m2)
    whole = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    tensors = {str(dtype): wide.to(dtype) for dtype in (*floats, *eights)}
    tensors |= {str(dtype): narrow.to(dtype) for dtype in whole}
    tensors |= {"empty": torch.empty(0, 4), "scalar": torch.tensor(3.0)}
    ours = {name: of_tensor(tensor) for name, tensor in tensors.items()}
    write_file(tmp_path / "model.safetensors", ours, {"a": "b"}, lambda count: None)
    theirs = load_file(tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"a": "b"}
    (tmp_path / "theirs").mkdir()
    save_file(tensors, tmp_path / "theirs/x.safetensors", metadata={"c": "d"})
    read, remarks = read_folder(tmp_path / "theirs")
    assert remarks == {"c": "d"}
    for found in (theirs, read):
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
            assert torch.equal(found[name].double(), tensor.double())


def test_memory_holds_a_region_not_a_tensor(tmp_path: Path) -> None:
    """Writing and reading a table needs no memory beside the pages of the file."""
    rows, width, region_rows = 2**15, 512, 2**9
    regions = [Region((start, 0), (region_rows, width)) for start in range(0, rows, region_rows)]

    def number(region: Region) -> Tensor:
        first = region.offsets[0]
        return torch.arange(first, first + region_rows).float()[:, None].repeat(1, width)

    table = LazyTensor((rows, width), torch.float32, tuple(regions), number)
    beside: list[int] = []

    def note(_: object) -> None:
        status = Path("/proc/self/status").read_text()
        kilobytes = re.search(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)
        assert kilobytes
        beside.append(1024 * int(kilobytes[1]))

    note("before")
    write_file(tmp_path / "x.safetensors", {"table": table}, {}, note)
    read = read_folder(tmp_path)[0]["table"]
    note("read")
    # reads every page without allocating memory
    assert read.min() == 0 and read.max() == rows - 1
    note("used")
    assert torch.equal(read[[rows - 1, 7]][:, 5], torch.tensor([rows - 1.0, 7.0]))
    assert len(beside) == len(regions) + 3
    assert max(beside) - beside[0] < table.num_bytes / 4


def _header(path: Path, header: object, numbers: bytes = bytes(16)) -> None:
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    path.write_bytes(struct.pack("<Q", len(text)) + text + numbers)


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"[]",
        {"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 20]}},
        {"x": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}},
        {"x": {"dtype": "F31", "shape": [4], "data_offsets": [0, 16]}},
        {"x": {"dtype": "F32", "shape": [4]}},
        {"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "__metadata__": [1]},
        {"x": 3},
    ],
)
def test_files_that_are_no_safetensors(
    tmp_path: Path, capsys: pytest.CaptureFixture, header: object
) -> None:
    _header(tmp_path / "model.safetensors", header)
    assert main(["import", str(tmp_path), "--to", str(tmp_path / "to")]) == 2
    said = capsys.readouterr().err
    assert "is not a safetensors file" in said and said.count("\n") == 1


def test_numbers_need_not_be_aligned(tmp_path: Path) -> None:
    """Some writers do not pad the header."""
    header = json.dumps({"x": {"dtype": "F64", "shape": [2], "data_offsets": [0, 16]}}).encode()
    for padding in range(8):
        numbers = struct.pack("<dd", 1.5, -2.0)
        _header(tmp_path / "x.safetensors", header + b" " * padding, numbers)
        assert read_folder(tmp_path)[0]["x"].tolist() == [1.5, -2.0]


def test_folders_that_are_no_export(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def refused(message: str) -> None:
        assert main(["import", str(tmp_path), "--to", str(tmp_path / "to")]) == 2
        said = capsys.readouterr().err
        assert re.search(message, said), said

    refused("there are no safetensors files")
    save_file({"x": torch.ones(2)}, tmp_path / "a.safetensors")
    refused("not those of an export")
    save_file({"x": torch.ones(2)}, tmp_path / "b.safetensors")
    refused("contains x, and so does another file")
    (tmp_path / INDEX).write_text("{}")
    refused("is not an index")
    (tmp_path / INDEX).write_text('{"weight_map": {"x": "c.safetensors"}}')
    refused("c.safetensors is not a safetensors file: No such file")


def test_a_dense_checkpoint_has_nothing_to_export(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    torch_dist.write(tmp_path / "dense", {"x": of_tensor(torch.ones(2))}, [], lambda count: None)
    assert main(["export", str(tmp_path / "dense"), "--to", str(tmp_path / "to")]) == 2
    assert "has no memory layers" in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture) -> None:
    for words in (["--help"], ["export", "--help"]):
        with pytest.raises(SystemExit) as left:
            main(words)
        assert left.value.code == 0
        assert "safetensors" in capsys.readouterr().out
    assert main(["exprot"]) == 2
    assert capsys.readouterr().err.startswith("megamem: error: ")
