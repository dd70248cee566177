"""The rooms of the package and who may look into whom. A new arrow is a decision, made here."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megamem"

MAY_IMPORT = {
    "spec": set(),
    "config": {"spec"},
    "reference": set(),
    "kernels": set(),
    "ops": {"reference", "kernels"},
    "parallel": {"spec", "ops"},
    "checkpoint": {"spec", "parallel"},
    "metrics": {"parallel"},
    "row_gradient": {"ops", "parallel"},
    "read_counter": set(),
    "layers": {
        *("spec", "ops", "parallel", "checkpoint", "metrics", "row_gradient", "read_counter"),
    },
    # the only place where a spec is made
    "resolution": {"config", "spec", "layers", "parallel"},
    "saved_settings": {"config", "spec", "resolution", "checkpoint"},
    "optimizer": {"spec", "ops", "parallel", "checkpoint", "row_gradient", "read_counter"},
    "planner": {"config", "spec", "ops", "parallel", "layers", "optimizer", "read_counter"},
    "patching": set(),
    "hybrid_pattern": set(),
    "errors": set(),
    "cpu": {"config", "patching", "hybrid_pattern"},
    "megatron": {
        *("config", "spec", "resolution", "ops", "parallel", "layers", "optimizer", "checkpoint"),
        *("metrics", "planner", "cpu", "errors", "patching", "hybrid_pattern"),
        "saved_settings",
    },
    # for checkouts that an older megamem has patched
    "integration": {"megatron"},
    "tools": {
        *("reference", "ops", "config", "spec", "resolution", "layers", "optimizer", "checkpoint"),
        *("planner", "parallel", "megatron", "patching", "errors", "saved_settings"),
        "hybrid_pattern",
    },
    "run": {"megatron"},
    "pretrain_gpt": {"megatron"},
    "pretrain_hybrid": {"megatron"},
    "eval_harness": {"errors", "megatron"},
    "__main__": {"config", "errors"},
}
MEGATRON = {
    "megatron.core": {"checkpoint", "layers", "optimizer", "megatron", "cpu", "tools"},
    "megatron.training": {"megatron", "cpu", "tools"},
    "megatron.bridge": {"megatron", "cpu"},
}
# what a file says -> why it may not, and the rooms that may
BANNED = {
    r"(?<![.\w])print\(": ("log, or write to a stream", set()),
    r"\.add_argument\(": ("flags are generated from MemoryConfig", {"tools"}),
    r"\bparallel_state\b": ("process groups arrive as arguments", {"megatron", "tools"}),
    r"make_block_ptr|tl\.advance": ("removed from Triton; use descriptors", set()),
    r"[^\x00-\x7f]": ("ASCII only", set()),
}
# packages whose tensor names end in their shape, a letter for each axis
LETTERED = {"layers", "parallel", "ops", "kernels", "reference"}
SHAPE = re.compile(r"[a-z0-9_]*[a-z0-9]_((?:[A-Zrv]|\d)*[A-Z](?:[A-Zrv]|\d)*|r|rv)$")
# a model that is copied out of the package: it stands alone, where transformers puts it
EXPORTED = sorted((PACKAGE / "tools/convert/hf/code").glob("*_megamem.py"))
FILES = sorted({*PACKAGE.rglob("*.py")} - {PACKAGE / "__init__.py", *EXPORTED})


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path: Path) -> list[str]:
    """Every module a file imports; `from megamem.ops import x` names megamem.ops.x as well."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            found += [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def _is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_file_keeps_its_room(path: Path):
    room = _room(path)
    for module in _imports(path):
        if module.startswith("megamem.") and module != "megamem.__version__":
            target = module.split(".")[1]
            assert target == room or target in MAY_IMPORT[room], f"{room} may not import {module}"
        for package, rooms in MEGATRON.items():
            if _is_within(module, package):
                assert room in rooms, f"{room} may not import {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_file_says_nothing_banned(path: Path):
    for pattern, (reason, rooms) in BANNED.items():
        found = re.search(pattern, path.read_text())
        assert not found or _room(path) in rooms, f"{found[0]!r}: {reason}"


@pytest.mark.parametrize("path", EXPORTED, ids=lambda path: path.name)
def test_an_exported_model_stands_alone(path: Path) -> None:
    assert len(EXPORTED) == 2
    source = path.read_text()
    assert not _without_legend(source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            # transformers copies what is imported so, and nothing else
            assert (node.level, f"{node.module}.py") in [(1, other.name) for other in EXPORTED]
        elif isinstance(node, ast.Import | ast.ImportFrom):
            named = [alias.name for alias in node.names]
            for module in [node.module] if isinstance(node, ast.ImportFrom) else named:
                outside = module.partition(".")[0]
                known = outside in sys.stdlib_module_names or outside in ("torch", "transformers")
                # the one kernel that is used where it is there
                assert known or (module, named) == ("megamem.ops", ["embedding_bag"]), module


def test_no_arrow_points_back():
    """The rooms can be put in an order in which each imports only earlier ones."""
    left = {room: set(targets) for room, targets in MAY_IMPORT.items()}
    while left:
        free = {room for room, targets in left.items() if not targets & left.keys()}
        assert free, f"these rooms import each other: {sorted(left)}"
        left = {room: targets for room, targets in left.items() if room not in free}


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_no_module_imports_what_imports_it() -> None:
    """Within rooms, too, and counting imports inside functions: an order exists for all modules."""
    left = {_module(path): set(_imports(path)) for path in FILES}
    for name, targets in left.items():
        # `from megamem.ops import forms` is about forms, if there is such a module
        packages = {target.rpartition(".")[0] for target in targets if target in left}
        left[name] = {target for target in targets if target in left} - packages - {name}
    while left:
        free = {name for name, targets in left.items() if not targets & left.keys()}
        assert free, f"these modules import each other: {sorted(left)}"
        left = {name: targets for name, targets in left.items() if name not in free}


def _axes(source: str) -> dict[str, str]:
    """Name -> the letters that it ends in, of all variables and arguments."""
    nodes = list(ast.walk(ast.parse(source)))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    names |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    return {name: found[1] for name in names if (found := SHAPE.match(name))}


def _without_legend(source: str) -> set[str]:
    """Letters of axes that a module's docstring does not explain."""
    legend = ast.get_docstring(ast.parse(source)) or ""
    letters = {letter for axes in _axes(source).values() for letter in axes if letter.isupper()}
    return {letter for letter in letters if not re.search(rf"\b\d?{letter}\b", legend)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_letters_of_axes_are_explained_where_they_are_used(path: Path) -> None:
    source = path.read_text()
    if _room(path) in LETTERED:
        assert not _without_legend(source), "explain these letters in the module's docstring"
    else:
        assert not _axes(source), f"only {sorted(LETTERED)} name tensors by their axes"


def test_letters_without_a_legend_are_found() -> None:
    source = '"""Rows are V wide."""\ndef f(weights_TL, x_rV): y_2HNC = MAX_TOPK = weights_TL'
    assert _without_legend(source) == {"T", "L", "H", "N", "C"}
    assert _axes(source) == {"weights_TL": "TL", "x_rV": "rV", "y_2HNC": "2HNC"}
