"""The checks of compiled kernels find the faults they are there for, and only these."""

import pytest

from tests.kernels.layouts import encoding_of, is_owned, without_encodings
from tests.kernels.old_patterns import CURED, PATTERNS
from tests.kernels.races import find_races
from tests.kernels.test_compile import compile_kernels


@pytest.fixture(scope="module")
def found() -> dict[str, set[str]]:
    """Arguments and instructions at fault, of every old pattern and its cured form."""
    return {
        usage.case: {argument for argument, _ in usage.races} | set(usage.approximate)
        for usage in compile_kernels("tests.kernels.old_patterns")
    }


@pytest.mark.parametrize("name", PATTERNS)
def test_an_old_pattern_is_found(found, name):
    assert found[name] == PATTERNS[name].found


@pytest.mark.parametrize("name", PATTERNS)
def test_its_cure_is_clean(found, name):
    assert found[name + CURED] == set()


TTGIR = """
#layout = #ttg.linear<{register = [], lane = [[1], [2], [4]], warp = [[8], [16]], block = []}>
#loc = loc("kernel.py":1:0)
module attributes {"ttg.num-warps" = 4 : i32, "ttg.threads-per-warp" = 32 : i32} {
  tt.func public @kernel(%x: !tt.ptr<f32> loc("x"(#loc)), %y: !tt.ptr<f32>, %n: i64, %c: i1) {
    %range = tt.make_range {end = 32 : i32, start = 0 : i32} : tensor<32xi32, #layout> loc(#loc)
    %splat = tt.splat %x : !tt.ptr<f32> -> tensor<32x!tt.ptr<f32>, #layout> loc(#loc)
    %0 = tt.addptr %splat, %range : tensor<32x!tt.ptr<f32>, #layout>, tensor<32xi32, #layout>
    %1 = tt.load %0 : tensor<32x!tt.ptr<f32>, #layout> loc("kernel.py":5:3)
    tt.store %0, %1 : tensor<32x!tt.ptr<f32>, #layout> loc("kernel.py":6:3)
    tt.return loc(#loc)
  } loc(#loc)
} loc(#loc)
"""
ARGUMENTS = ["x", "y", "n", "c"]
LOAD = "%1 = tt.load"


def test_a_store_by_the_thread_that_loaded_is_clean():
    assert find_races(TTGIR, ARGUMENTS) == []


@pytest.mark.parametrize(
    ("line", "argument", "message"),
    [
        ("ttg.barrier local", "x", ""),
        ("%2 = tt.load %x : !tt.ptr<f32>", "x", "the addresses differ"),
        (
            "%2 = ttg.async_copy_global_to_local %0, %range : tensor<32x!tt.ptr<f32>, #layout> -> "
            "!ttg.memdesc<32xf32>",
            "x",
            "while the program goes on",
        ),
        (
            "%2 = tt.int_to_ptr %n : i64 -> !tt.ptr<f32>\n%3 = tt.load %2 : !tt.ptr<f32>",
            "",
            "comes",
        ),
        ("%2 = tt.make_tensor_descriptor %x, [%n], [%n] : !tt.ptr<f32>", "", "not known"),
        ("ttg.warp_specialize() attributes {} {\ntt.return\n}", "", "not known"),
    ],
)
def test_what_the_check_does_not_know_is_no_excuse(line, argument, message):
    store = "tt.store %x, %n : !tt.ptr<f32>"
    races = find_races(TTGIR.replace(LOAD, f"{store}\n{line}\n{LOAD}"), ARGUMENTS)
    assert any(race.argument == argument and message in race.message for race in races), races
    assert not find_races(TTGIR.replace(LOAD, f"{store}\nttg.barrier all\n{LOAD}"), ARGUMENTS)


@pytest.mark.parametrize(
    "lines",
    [
        "tt.store POINTER, %n : !p",
        """%p = scf.if %c -> (!p) {
          scf.yield %y : !p
        } else {
          scf.yield POINTER : !p
        }
        tt.store %p, %n : !p""",
        """%p:2 = scf.for %i = %n to %n step %n iter_args(%k = %n, %q = %y) -> (i64, !p) : i64 {
          %r = tt.addptr POINTER, %k : !p, i64
          scf.yield %k, %r : i64, !p
        }
        tt.store %p#1, %n : !p""",
        """scf.for %i = %n to %n step %n iter_args(%q = POINTER) -> (!p) : i64 {
          tt.store %q, %n : !p
          scf.yield %y : !p
        }""",
        """%p = scf.while (%q = %y) : (!p) -> !p {
          %r = arith.select %c, POINTER, %q : !p
          scf.condition(%c) %r : !p
        } do {
        ^bb0(%q: !p):
          scf.yield %q : !p
        }
        tt.store %p, %n : !p""",
        """scf.while (%q = %y) : (!p) -> !p {
          scf.condition(%c) %q : !p
        } do {
        ^bb0(%q: !p):
          tt.store %q, %n : !p
          scf.yield POINTER : !p
        }""",
        """%s = tt.splat POINTER : !p -> tensor<32x!p, #layout>
        %t = ttg.convert_layout %s : tensor<32x!p, #layout> -> tensor<32x!p, #other>
        %u = tt.bitcast %t : tensor<32x!p, #other> -> tensor<32x!p, #other>
        tt.atomic_rmw fadd, acq_rel, gpu, %u, %n, %c : (tensor<32x!p, #other>, i32, i1) -> i32""",
    ],
    ids=["itself", "if", "for", "in a for", "while", "in a while", "converted"],
)
def test_a_pointer_is_followed_to_its_argument(lines):
    def raced(pointer: str) -> set[str]:
        text = lines.replace("POINTER", pointer).replace("!p", "!tt.ptr<f32>")
        races = find_races(TTGIR.replace(LOAD, f"{text}\n{LOAD}"), ARGUMENTS)
        return {race.argument for race in races}

    assert "x" in raced("%x")
    assert "x" not in raced("%y")


def test_text_that_is_not_ttgir_is_refused():
    with pytest.raises(ValueError, match="not TTGIR"):
        find_races("module {}", [])
    with pytest.raises(ValueError, match="braces"):
        find_races(TTGIR.replace("} loc(#loc)\n} loc", "} loc"), ARGUMENTS)
    with pytest.raises(ValueError, match="before it is defined"):
        find_races(TTGIR.replace("%splat, %range", "%splat, %rang"), ARGUMENTS)


TYPE = "tensor<{}x!tt.ptr<f32>, {}>"
BLOCKED_1 = (
    "#ttg.blocked<{sizePerThread = [4], threadsPerWarp = [32], warpsPerCTA = [4], order = [0]}>"
)
BLOCKED_2 = (
    "#ttg.blocked<{sizePerThread = [1, 8], threadsPerWarp = [2, 16], warpsPerCTA = [1, 4], "
    "order = [1, 0]}>"
)
# eight threads; the last bit of a thread's number moves nothing in the second
LINEAR = "#ttg.linear<{register = [[0, 1]], lane = [[0, 2], [1, 0]], warp = [[2, 0]], block = []}>"
REPEATED = LINEAR.replace("warp = [[2, 0]]", "warp = [[1, 0]]")


@pytest.mark.parametrize(
    ("shape", "encoding", "owned"),
    [
        ("512", BLOCKED_1, True),
        ("2048", BLOCKED_1, True),
        ("256", BLOCKED_1, False),
        ("1", BLOCKED_1, False),
        ("2x512", BLOCKED_2, True),
        ("1x1024", BLOCKED_2, False),
        ("8x256", BLOCKED_2, False),
        ("512", f"#ttg.slice<{{dim = 0, parent = {BLOCKED_2}}}>", False),
        ("4x4", LINEAR, True),
        ("2x4", LINEAR, False),
        ("4x4", REPEATED, False),
        ("128x128", "#ttg.nvidia_mma<{versionMajor = 3}>", False),
    ],
)
def test_which_layouts_give_each_element_to_one_thread(shape, encoding, owned):
    assert is_owned(TYPE.format(shape, encoding), {}) == owned
    assert is_owned(TYPE.format(shape, "#named"), {"#named": encoding}) == owned
    assert encoding_of(TYPE.format(shape, encoding)) == encoding
    assert without_encodings(TYPE.format(shape, encoding)) == f"tensor<{shape}x!tt.ptr<f32>>"


def test_a_scalar_has_no_owner():
    assert encoding_of("!tt.ptr<f32>") is None
    assert not is_owned("!tt.ptr<f32>", {})
