"""The comparison's models cost the same, by every count there is; each run has its own key."""

import argparse
import io
import json
import sys
from dataclasses import replace
from functools import cache
from itertools import chain
from math import prod
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "facts"
COUNTER = Path(__file__).with_name("count_flops.py")
# scripts of one folder import each other by bare name, as they do when run
sys.path.insert(0, str(FOLDER))

import build_corpus  # noqa: E402
import compare  # noqa: E402
from experiment import plan as plans  # noqa: E402
from experiment.plan import (  # noqa: E402
    SCALES,
    TABLES,
    Flags,
    Model,
    Plan,
    Run,
    Scale,
    read_scale,
    unique,
    words,
)
from experiment.runs import best_rates  # noqa: E402
from rich.console import Console  # noqa: E402

from megamem.config import ConfigurationError, MemoryConfig  # noqa: E402
from megamem.resolution import resolve  # noqa: E402
from tests.helpers.megatron_runs import launch_warm  # noqa: E402

CPU = SCALES["cpu"]
MIDDLE = (1.0, 1.0)
# as if the first of every grid had won
BEST = {family: rates[0] for family, rates in CPU.sweep.items()}
EVERY = [pytest.param(scale, id=name) for name, scale in SCALES.items()]
# every kind of model, at a size where all of them are built and run in seconds
SMALL = read_scale(
    "small",
    TABLES["cpu"],
    {
        "flags": {**TABLES["smoke"]["flags"], "ffn_hidden_size": 256},
        "memory": TABLES["smoke"]["memory"],
        "experts": {"num_experts": 4},
        "models": {
            "dense": {"family": "dense"},
            "dense 2x": {"family": "dense 2x", "flops": 2},
            "moe 4": {"family": "moe"},
            "peer 0.473k": {
                **{"family": "peer", "memory_variant": "peer"},
                **{"memory_layers": [1], "memory_num_keys": 22},
            },
            "memory 1k": {**{"family": "memory", "memory_variant": "memory", "memory_layers": [1]}},
            "memory+ 0.25k": {"memory_num_keys": 16},
            "memory+ 1k": {},
            "ultramem 1k": {
                **{"family": "ultramem", "memory_variant": "ultramem"},
                **{"memory_layers": [0, 2], "memory_value_dim": 16, "memory_key_dim": 12},
            },
            "ultramem-v2 0.316k": {
                **{"family": "ultramem-v2", "memory_variant": "ultramem-v2"},
                **{"memory_layers": [0, 1, 2, 3], "memory_num_keys": 18, "memory_final_topk": 8},
                **{"memory_value_dim": 16, "memory_pre_value_dim": 8},
            },
        },
        "ablations": {
            **TABLES["cpu"]["ablations"],
            "6 layers, memories 1": {"num_layers": 6, "memory_layers": [2]},
            "6 layers, memories 4": {"num_layers": 6, "memory_layers": [1, 2, 3, 4]},
        },
        "new": {"model": "memory+ 1k"},
    },
)


def _plan(scale: Scale) -> Plan:
    return Plan(scale, scale.corpus.vocab_size)


def _sweep_of(*families: str) -> list[Run]:
    return [run for run in _plan(CPU).sweep(compare.PARTS) if run.model.family in families]


def _models(scale: Scale) -> list[Model]:
    return [*scale.models, *scale.ablations]


def _flags(scale: Scale, model: Model) -> Flags:
    return _plan(scale).run("main", model, 1, MIDDLE).flags


@cache
def _megatron_parser() -> argparse.ArgumentParser:
    from megatron.training.arguments import add_megatron_arguments

    from megamem.megatron.arguments import add_memory_flags

    return add_memory_flags(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))


def _megatron_args(run: Run) -> argparse.Namespace:
    args = _megatron_parser().parse_args(words(run.flags))
    # what Megatron fills in when it validates
    args.kv_channels = args.hidden_size // args.num_attention_heads
    args.num_query_groups = args.num_attention_heads
    return args


@pytest.mark.parametrize("scale", EVERY)
def test_flops_are_equal_within_one_percent(scale: Scale) -> None:
    vocab = scale.corpus.vocab_size
    names = [model.name for model in _models(scale)]
    assert len(set(names)) == len(names)
    for model in _models(scale):
        flags = _flags(scale, model)
        as_deep = {**scale.flags, "num_layers": flags["num_layers"]}
        dense = plans.flops_per_token(as_deep, vocab)
        width = flags["ffn_hidden_size"]
        assert width % 8 == 0 and width >= 8
        reached = plans.flops_per_token(flags, vocab)
        assert reached == pytest.approx(dense * (2 if model.name == "dense 2x" else 1), rel=0.01)


@pytest.mark.parametrize("scale", [SCALES["cpu"], SCALES["gpu"], SMALL], ids=lambda s: s.name)
def test_the_models_are_called_what_they_are(scale: Scale) -> None:
    """Their names say how many rows and experts; what an ablation changes is in its name."""
    reference, flags = scale.reference, scale.reference.flags

    def rows(number: int) -> str:
        millions, thousands = number / 2**20, number / 2**10
        return f"{millions:.3g}m" if number >= 2**20 else f"{thousands:.3g}k"

    for model in scale.models:
        if model.rows:
            assert model.name == f"{model.family} {rows(model.rows)}"
    (moe,) = (model for model in scale.models if model.family == "moe")
    assert moe.name == f"moe {moe.flags['num_experts']}"
    # two tables that together hold as many numbers as the one of Memory
    (peer,) = (model.rows for model in scale.models if model.family == "peer")
    assert 2 * peer == pytest.approx(reference.rows, rel=0.1)
    table = _plan(scale).run("main", reference, 1, MIDDLE).table
    ultra = [model for model in scale.models if model.family.startswith("ultramem")]
    assert len(ultra) == 2
    for model in ultra:
        run = _plan(scale).run("main", model, 1, MIDDLE)
        assert run.table == pytest.approx(table, rel=0.1 if scale is SMALL else 0.01), model.name
    if scale is SMALL:
        return
    named = {model.name: model for model in scale.ablations}
    changes = {
        "keys half as wide": {"memory_key_dim": flags["memory_key_dim"] / 2},
        "keys twice as wide": {"memory_key_dim": flags["memory_key_dim"] * 2},
        "half k": {"memory_topk": flags["memory_topk"] / 2},
        "twice k": {"memory_topk": flags["memory_topk"] * 2},
        "twice the heads, half k": {
            "memory_heads": flags["memory_heads"] * 2,
            "memory_topk": flags["memory_topk"] / 2,
        },
        "values start at V**-0.5": {"memory_value_init_std": scale.flags["hidden_size"] ** -0.5},
    }
    for name, changed in changes.items():
        assert named[name].flags == {**flags, **changed}, name
    pools = named["own pools, as many parameters"]
    assert len(flags["memory_layers"]) * pools.rows == pytest.approx(reference.rows, rel=0.03)
    for name, model in named.items():
        if "layers, memories" in name:
            depth, memories = model.flags["num_layers"], len(model.flags["memory_layers"])
            assert name == f"{depth} layers, memories {memories}"


@pytest.mark.parametrize("scale", [SMALL, SCALES["gpu"]], ids=["small", "gpu"])
def test_the_plan_counts_flops_as_the_run_reports_them(scale: Scale) -> None:
    from megatron.training.training import num_floating_point_operations

    from megamem.megatron.reports.sizes import with_memory_flops

    runs = [_plan(scale).run("main", model, 1, MIDDLE) for model in _models(scale)]
    assert len(runs) > 20
    for run in runs:
        args = _megatron_args(run)
        args.padded_vocab_size = -(-scale.corpus.vocab_size // 128) * 128
        config, batch = MemoryConfig.from_args(args), run.flags["global_batch_size"]
        spec = resolve(config, run.flags["hidden_size"])
        counted = (
            with_memory_flops(num_floating_point_operations, spec, args, batch)
            if config.enabled
            else num_floating_point_operations(args, batch)
        )
        tokens = batch * run.flags["seq_length"]
        assert counted == pytest.approx(run.flops * tokens, rel=1e-9), run.name


def test_the_plan_counts_what_torch_counts_in_a_forward_and_backward(tmp_path: Path) -> None:
    """And the parameters. Torch also sees the router, u's products, and scores of candidates."""
    plan = Plan(SMALL, 500)
    # the unfused attention computes the half that a causal mask hides
    sizes = ("num_layers", "hidden_size", "seq_length")
    hidden_half = 6 * prod(SMALL.flags[name] for name in sizes)
    # a tokenizer of the size that the plan assumes
    vocab = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "499", "--mock-data"]
    relative: dict[str, float] = {}
    for model in SMALL.models:
        run = plan.run("main", model, 1, MIDDLE)
        flags = [*words(run.flags), *vocab]
        log = launch_warm(model.name, 1, "--cpu=force", COUNTER, *flags)
        told = json.loads(log.stdout.splitlines()[-1])
        assert told["reported"] == run.flops, model.name
        assert told["parameters"] == run.parameters, model.name
        relative[model.name] = told["counted"] / (run.flops + hidden_half)
    assert relative.pop("moe 4") == pytest.approx(1, abs=0.01)
    assert relative.pop("peer 0.473k") == pytest.approx(1, abs=0.01)
    # the scores that choose candidates, which have no backward
    assert relative.pop("ultramem 1k") == pytest.approx(1, abs=0.01)
    assert relative.pop("ultramem-v2 0.316k") == pytest.approx(1, abs=0.01)
    assert set(relative.values()) == {1.0} and len(relative) == 5


def test_a_model_that_cannot_be_as_cheap_is_refused() -> None:
    narrow = replace(SMALL, flags={**SMALL.flags, "ffn_hidden_size": 24})
    with pytest.raises(ConfigurationError, match="memory.* cannot cost .* fewer keys"):
        plans.ffn_width(SMALL.reference, narrow, 500)
    # widths are multiples of 8, and here the nearest is 1.2 % off
    name = "16 layers, memories 1"
    model = Model(name, flags={**CPU.memory, "num_layers": 16, "memory_layers": [4]})
    with pytest.raises(ConfigurationError, match=f"{name} cannot cost 4,227,072 FLOPs a token"):
        plans.ffn_width(model, CPU, 512)


@pytest.mark.parametrize("scale", EVERY)
def test_every_probed_point_is_saved_and_logged(scale: Scale) -> None:
    plan = _plan(replace(scale, ablation_seeds=len(scale.seeds)))
    probes = {"smoke": 2, "cpu": 4, "long": 10, "gpu": 4, "h100": 10}
    runs = [plan.part("main", BEST)[0], *plan.part("ablations", BEST)]
    for run in runs:
        assert len(run.points) == probes[scale.name] and run.points[-1] == run.iterations
        assert all(point % run.flags["log_interval"] == 0 for point in run.points)
        # validated at the end alone, by Megatron's log and by the record
        assert run.flags["eval_interval"] == run.iterations
        assert run.flags["min_lr"] == pytest.approx(run.flags["lr"] / 20)
    lengths = {run.iterations / scale.flags["train_iters"] for run in runs}
    assert lengths == ({1} if not scale.ablations else {1, 2})
    for run in plan.part("continual", BEST)[1:]:
        assert run.points == [run.iterations] and run.iterations % run.flags["log_interval"] == 0


def test_equal_flags_are_one_run_and_others_are_not() -> None:
    plan = _plan(CPU)
    sweep, main = plan.sweep(compare.PARTS), plan.part("main", BEST)
    keys = {run.key for run in sweep}
    # the sweep's runs at the rates it chose are the first seed of the main table
    assert sum(run.key in keys for run in main) == len(CPU.sweep)
    every = unique(chain(sweep, main, plan.part("ablations", BEST), plan.part("continual", BEST)))
    flags = {(*words(run.flags), run.corpus, run.start) for run in every}
    assert len({run.key for run in every}) == len(every) == len(flags)
    other = _plan(replace(CPU, corpus=replace(CPU.corpus, seed=1)))
    assert not {run.key for run in other.sweep(compare.PARTS)} & keys


@pytest.mark.parametrize("wanted", [None, 2, 3])
def test_ablations_get_as_many_seeds_as_are_wanted(wanted: int | None) -> None:
    flags = ["--ablation-seeds", str(wanted)] if wanted else []
    options = compare.parse_args(["--scale", "cpu", *flags])
    seeds: dict[str, list[int]] = {}
    for run in _plan(options.scale).part("ablations", BEST):
        seeds.setdefault(run.model.name, []).append(run.seed)
    # the reference was trained at all of them anyway
    assert seeds.pop(CPU.reference.name) == [1, 2, 3]
    few = [1, 2, 3][: wanted or 1]
    lean = {name: [1, 2, 3] if wanted else few for name in ("lazy_adamw", "rowwise_adamw")}
    assert len(seeds) == (25 if wanted else 20)
    assert all(found == lean.get(name, few) for name, found in seeds.items())


def test_a_model_may_be_trained_at_fewer_seeds() -> None:
    first, second, *others = [replace(model, seeds=0) for model in CPU.models]
    few = replace(CPU, models=[first, replace(second, seeds=2), *others])
    main = [(run.model.name, run.seed) for run in _plan(few).part("main", BEST)]
    whole = [(model.name, seed) for seed in CPU.seeds for model in CPU.models]
    assert main == [pair for pair in whole if pair != (second.name, 3)]


def test_every_optimizer_is_given_the_same_rates() -> None:
    rates: dict[str, set[float]] = {}
    for run in _plan(replace(CPU, ablation_seeds=2)).part("ablations", BEST):
        if run.model.name.endswith(("adamw", "learn 4x")) or run.model == CPU.reference:
            optimizer = run.flags.get("memory_optimizer", "adamw")
            rates.setdefault(optimizer, set()).add(run.flags["memory_lr"])
    assert set(rates) == {"adamw", "lazy_adamw", "rowwise_adamw"}
    assert len(rates["adamw"]) == 2 and all(found == rates["adamw"] for found in rates.values())


@pytest.mark.parametrize("scale", [CPU, SCALES["long"]], ids=["cpu", "long"])
def test_dense_is_trained_for_twice_the_steps_at_half_its_rate(scale: Scale) -> None:
    plan = _plan(scale)
    (once,) = (
        run for run in plan.part("main", BEST) if run.model.name == "dense" and run.seed == 1
    )
    (twice,) = (run for run in plan.part("ablations", BEST) if run.model.family == "dense")
    assert twice.iterations == 2 * once.iterations
    assert twice.flags["lr"] == pytest.approx(once.flags["lr"] / 2)
    assert (twice.seed, twice.flops) == (once.seed, once.flops)


def test_all_models_are_given_the_same_data() -> None:
    """Whatever decides on the batches is equal in all runs of a seed."""
    names = ("seq_length", "global_batch_size", "micro_batch_size", "train_iters", "eval_iters")
    for seed in CPU.seeds:
        runs = [run for run in _plan(CPU).part("main", BEST) if run.flags["seed"] == seed]
        assert [r.model for r in runs] == [m for m in CPU.models if seed in CPU.seeds_of(m)]
        assert len({tuple(run.flags[name] for name in names) for run in runs}) == 1


def test_a_taught_run_changes_only_what_teaching_needs() -> None:
    trained, *taught = _plan(CPU).part("continual", BEST)
    assert trained.keep and len(taught) >= 4
    schedule = {"train_iters", "save_interval", "eval_interval", "log_interval"}
    rates = {"lr_warmup_iters", "lr", "min_lr", "memory_lr"}
    for run in taught:
        assert (run.start, run.corpus) == (trained.key, "new")
        changed = {name for name in run.flags if run.flags[name] != trained.flags.get(name)}
        assert changed <= schedule | rates | {"memory_optimizer", "memory_finetune_rows"}


def test_the_best_rates_are_those_that_know_most() -> None:
    runs = _sweep_of("dense", "memory")
    facts = {run.key: float(number) for number, run in enumerate(runs)}
    # at the end, asked the questions; other numbers are of no account
    found = {
        key: {"corpus": {"facts": [99.0, number % 5], "unseen": 99.0 - number}}
        for key, number in facts.items()
    }
    # dense: 0, 2, 4; memory: 1, 3, 0, 1
    assert best_rates(runs, found) == {"dense": runs[4].rates, "memory": runs[3].rates}


def test_the_sweep_tries_the_first_rates_of_all_first() -> None:
    runs = _sweep_of("dense", "memory")
    assert [run.model.family for run in runs] == ["dense", "memory"] * 3 + ["memory"]
    for family in ("dense", "memory"):
        tried = [run.rates for run in runs if run.model.family == family]
        assert tried == CPU.sweep[family]
    assert _plan(CPU).sweep([]) == []


@pytest.mark.parametrize("scale", EVERY)
def test_each_part_alone_sweeps_the_families_it_trains(scale: Scale) -> None:
    plan = _plan(scale)
    for part in set(compare.PARTS) - scale.left_out:
        best = {run.model.family: MIDDLE for run in plan.sweep([part])}
        trained = {run.model.family for run in plan.part(part, best)}
        assert trained <= set(best) <= trained | {"memory+"}


def test_a_part_that_a_scale_leaves_out_is_not_planned(
    capsys: pytest.CaptureFixture[str],
) -> None:
    left_out = {scale.name: scale.left_out for scale in SCALES.values()}
    assert left_out == {
        "smoke": {"ablations"},
        "cpu": set(),
        "long": {"continual"},
        "gpu": set(),
        "h100": {"ablations", "continual"},
    }
    console = Console(file=io.StringIO(), width=200)
    compare.list_plan(SCALES["long"], compare.PARTS, console)
    # dense at two rates and at twice the steps, one table
    assert "\n4 runs, " in console.file.getvalue()  # type: ignore[attr-defined]
    with pytest.raises(SystemExit, match="2"):
        compare.parse_args(["--scale", "long", "--only", "continual"])
    refused = "--only continual: scale long has nothing for it; choose main"
    assert refused in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["real", "biographies"])
def test_new_facts_are_new(kind: str) -> None:
    settings = build_corpus.Settings(facts=100, held_out=40, kind=kind)
    split = settings.split()
    taught = build_corpus.new_facts(settings, 50)
    old = {(f.relation, f.subject) for f in chain(split.held_in(), split.held_out)}
    new = {(f.relation, f.subject) for f in taught}
    assert len(new) == 50 and len(old) == 140 and not new & old


def test_the_list_names_every_run() -> None:
    console = Console(file=io.StringIO(), width=200)
    compare.list_plan(CPU, compare.PARTS, console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    plan = _plan(CPU)
    runs = [*plan.sweep(compare.PARTS), *plan.part("main", BEST), *plan.part("ablations", BEST)]
    for run in unique([*runs, *plan.part("continual", BEST)]):
        assert f"{run.key}: --num-layers {run.flags['num_layers']} " in printed
        assert f"{run.parameters:,}" in printed and f"{run.flops:,}" in printed


def test_bad_numbers_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        compare.parse_args(["--scale", "cpu", "--minutes", "0"])
    assert "--minutes 0: choose more than 0" in capsys.readouterr().err
    for seeds in ("0", "4"):
        with pytest.raises(SystemExit, match="2"):
            compare.parse_args(["--scale", "cpu", "--ablation-seeds", seeds])
        refused = f"--ablation-seeds {seeds}: scale cpu has 3; choose 1 to 3"
        assert refused in capsys.readouterr().err
