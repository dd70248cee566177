"""The comparison's models cost the same, by every count there is; each run has its own key."""

import argparse
import io
import json
import sys
from dataclasses import replace
from functools import cache
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "facts"
# scripts of one folder import each other by bare name, as they do when run
sys.path.insert(0, str(FOLDER))

import compare  # noqa: E402
from experiment import corpora, models, scales  # noqa: E402
from experiment.models import Model  # noqa: E402
from experiment.plan import MIDDLE, Plan, Run, stamp_of, unique, words  # noqa: E402
from experiment.records import best_rates  # noqa: E402
from rich.console import Console  # noqa: E402

from megamem.config import ConfigurationError, MemoryConfig  # noqa: E402
from tests.helpers.megatron_runs import launch_warm  # noqa: E402

# as if the first of every grid had won
BEST = {family: rates[0] for family, rates in scales.SWEEP.items()}
SCALES = list(scales.SCALES.values())
# every kind of model, at a size where all of them are built and run in seconds
DEEPER = {"deep": 6, "deep_layers": ((2,), (1, 2, 3, 4))}
SMALL = scales.choose("smoke", families=scales.FAMILIES, ablations=None, ffn=256, **DEEPER)


def _plan(scale: scales.Scale) -> Plan:
    return Plan(scale, scale.corpus.vocab_size, stamp_of(scale.corpus))


def _models(scale: scales.Scale) -> list[Model]:
    return [*models.main_models(scale), *models.ablations(scale)]


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


@pytest.mark.parametrize("scale", SCALES, ids=lambda scale: scale.name)
def test_flops_are_equal_within_one_percent(scale: scales.Scale) -> None:
    vocab = scale.corpus.vocab_size
    names = [model.name for model in _models(scale)]
    assert len(set(names)) == len(names)
    for model in _models(scale):
        width = models.ffn_width(model, scale, vocab)
        reached = models.flops_per_token(model, scale, width, vocab)
        as_deep = replace(scale, layers=model.depth or scale.layers)
        dense = models.flops_per_token(Model("dense", "dense"), as_deep, scale.ffn, vocab)
        assert width % 8 == 0 and width >= 8
        assert reached == pytest.approx(dense * (2 if model.name == "dense 2x" else 1), rel=0.01)


@pytest.mark.parametrize("scale", [SMALL, scales.GPU], ids=["small", "gpu"])
def test_the_plan_counts_flops_as_the_run_reports_them(scale: scales.Scale) -> None:
    from megatron.training.training import num_floating_point_operations

    from megamem.megatron.reports.sizes import with_memory_flops

    runs = [_plan(scale).run("main", model, 1, MIDDLE) for model in _models(scale)]
    assert len(runs) > 20
    for run in runs:
        args = _megatron_args(run)
        args.padded_vocab_size = -(-scale.corpus.vocab_size // 128) * 128
        memory = MemoryConfig.from_args(args).resolve(scale.hidden)
        counted = (
            with_memory_flops(num_floating_point_operations, args, memory, scale.batch)
            if memory.enabled
            else num_floating_point_operations(args, scale.batch)
        )
        assert counted == pytest.approx(run.flops * scale.tokens_per_iteration, rel=1e-9), run.name


def test_the_plan_counts_what_torch_counts_in_a_forward_and_backward(tmp_path: Path) -> None:
    """And the parameters; of the mixture and PEER, torch also sees the router and u's products."""
    plan = _plan(SMALL)
    # the unfused attention computes the half that a causal mask hides
    hidden_half = 6 * SMALL.layers * SMALL.hidden * SMALL.seq
    # a tokenizer of the size that the plan assumes
    vocab = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "499", "--mock-data"]
    relative: dict[str, float] = {}
    for model in models.main_models(SMALL):
        run = plan.run("main", model, 1, MIDDLE)
        flags = [*words(run.flags), *vocab]
        log = launch_warm(model.name, 1, "--cpu=force", FOLDER / "count_flops.py", *flags)
        told = json.loads(log.stdout.splitlines()[-1])
        assert told["reported"] == run.flops, model.name
        assert told["parameters"] == run.parameters, model.name
        relative[model.name] = told["counted"] / (run.flops + hidden_half)
    assert relative.pop("moe 4") == pytest.approx(1, abs=0.01)
    assert relative.pop("peer 0.473k") == pytest.approx(1, abs=0.01)
    assert set(relative.values()) == {1.0} and len(relative) == 5


def test_a_model_that_cannot_be_as_cheap_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="memory.* cannot cost .* fewer keys"):
        models.ffn_width(models.reference(SMALL), replace(SMALL, ffn=24), 500)
    # widths are multiples of 8, and here the nearest is 1.2 % off
    coarse = replace(scales.CPU, deep=16)
    name = "16 layers, memories 1"
    (model,) = [model for model in models.ablations(coarse) if model.name == name]
    with pytest.raises(ConfigurationError, match=f"{name} cannot cost 4,227,072 FLOPs a token"):
        models.ffn_width(model, coarse, 512)


@pytest.mark.parametrize("scale", SCALES, ids=lambda scale: scale.name)
def test_every_probed_point_is_saved_and_logged(scale: scales.Scale) -> None:
    plan = _plan(replace(scale, ablation_seeds=len(scale.seeds)))
    runs = [plan.main(BEST)[0], *plan.ablations(BEST)]
    for run in runs:
        assert len(run.points) == scale.probes and run.points[-1] == run.iterations
        assert all(point % scale.log_interval == 0 for point in run.points)
        assert all(point % run.flags["save_interval"] == 0 for point in run.points)  # type: ignore[operator]
    lengths = {run.iterations / scale.iterations for run in runs}
    assert lengths == ({1} if scale.ablations == () else {1, 2})


def test_equal_flags_are_one_run_and_others_are_not() -> None:
    plan = _plan(scales.CPU)
    sweep, main = plan.sweep(scales.FAMILIES), plan.main(BEST)
    keys = {run.key for run in sweep}
    # the sweep's runs at the rates it chose are the first seed of the main table
    assert sum(run.key in keys for run in main) == len(scales.FAMILIES)
    every = unique(chain(sweep, main, plan.ablations(BEST), plan.continual(BEST)))
    flags = {(*words(run.flags), run.corpus, run.start) for run in every}
    assert len({run.key for run in every}) == len(every) == len(flags)
    other = Plan(scales.CPU, scales.CPU.corpus.vocab_size, "another corpus")
    assert not {run.key for run in other.sweep(scales.FAMILIES)} & keys


@pytest.mark.parametrize("wanted", [None, 2, 3])
def test_ablations_get_as_many_seeds_as_are_wanted(wanted: int | None) -> None:
    flags = ["--ablation-seeds", str(wanted)] if wanted else []
    options = compare.parse_args(["--scale", "cpu", *flags])
    seeds: dict[str, list[int]] = {}
    for run in _plan(options.scale).ablations(BEST):
        seeds.setdefault(run.model.name, []).append(run.seed)
    # the reference was trained at all of them anyway
    assert seeds.pop(models.reference(scales.CPU).name) == [1, 2, 3]
    few = [1, 2, 3][: wanted or 1]
    lean = {name: [1, 2, 3] if wanted else few for name in models.LEAN}
    assert len(seeds) == (25 if wanted else 20)
    assert all(found == lean.get(name, few) for name, found in seeds.items())


def test_every_optimizer_is_given_the_same_rates() -> None:
    rates: dict[str, set[float]] = {}
    for run in _plan(replace(scales.CPU, ablation_seeds=2)).ablations(BEST):
        if run.model.name.endswith(("adamw", "learn 4x")) or run.model == models.reference(
            scales.CPU
        ):
            optimizer = str(run.flags.get("memory_optimizer", "adamw"))
            rates.setdefault(optimizer, set()).add(float(str(run.flags["memory_lr"])))
    assert set(rates) == {"adamw", "lazy_adamw", "rowwise_adamw"}
    assert len(rates["adamw"]) == 2 and all(found == rates["adamw"] for found in rates.values())


@pytest.mark.parametrize("scale", [scales.CPU, scales.LONG], ids=["cpu", "long"])
def test_dense_is_trained_for_twice_the_steps_at_half_its_rate(scale: scales.Scale) -> None:
    plan = _plan(scale)
    (once,) = (run for run in plan.main(BEST) if run.model.name == "dense" and run.seed == 1)
    (twice,) = (run for run in plan.ablations(BEST) if run.model.family == "dense")
    assert twice.iterations == 2 * once.iterations
    assert twice.flags["lr"] == pytest.approx(float(str(once.flags["lr"])) / 2)
    assert (twice.seed, twice.flops) == (once.seed, once.flops)


def test_all_models_are_given_the_same_data() -> None:
    """Whatever decides on the batches is equal in all runs of a seed."""
    names = ("seq_length", "global_batch_size", "micro_batch_size", "train_iters", "eval_iters")
    for seed in scales.CPU.seeds:
        runs = [run for run in _plan(scales.CPU).main(BEST) if run.flags["seed"] == seed]
        assert len(runs) == len(models.main_models(scales.CPU))
        assert len({tuple(run.flags[name] for name in names) for run in runs}) == 1


def test_a_taught_run_changes_only_what_teaching_needs() -> None:
    trained, *taught = _plan(scales.CPU).continual(BEST)
    assert trained.keep and len(taught) >= 4
    schedule = {"train_iters", "save_interval", "eval_interval", "log_interval"}
    rates = {"lr_warmup_iters", "lr", "min_lr", "memory_lr"}
    for run in taught:
        assert (run.start, run.corpus) == (trained.key, "new")
        changed = {name for name in run.flags if run.flags[name] != trained.flags.get(name)}
        assert changed <= schedule | rates | {"memory_optimizer", "memory_finetune_rows"}


def test_the_best_rates_are_those_that_know_most() -> None:
    runs = _plan(scales.CPU).sweep(["dense", "memory"])
    facts = {run.key: float(number) for number, run in enumerate(runs)}
    probes = {
        run.key: {
            "probes": {
                "corpus": [
                    {"iteration": 2, "phrasing": "question", "facts": facts[run.key] % 5},
                    {"iteration": 1, "phrasing": "question", "facts": 99.0},
                    {"iteration": 2, "phrasing": "unseen", "facts": 99.0},
                ]
            }
        }
        for run in runs
    }
    # dense: 0, 2, 4; memory: 1, 3, 0, 1
    assert best_rates(runs, probes) == {"dense": runs[4].rates, "memory": runs[3].rates}


def test_the_sweep_tries_the_first_rates_of_all_first() -> None:
    runs = _plan(scales.CPU).sweep(["dense", "memory"])
    assert [run.model.family for run in runs] == ["dense", "memory"] * 3 + ["memory"]
    for family in ("dense", "memory"):
        tried = tuple(run.rates for run in runs if run.model.family == family)
        assert tried == scales.CPU.sweep[family]
    assert _plan(scales.CPU).sweep(["none of these"]) == []


@pytest.mark.parametrize("scale", SCALES, ids=lambda scale: scale.name)
def test_each_part_alone_sweeps_the_families_it_trains(scale: scales.Scale) -> None:
    plan = _plan(scale)
    for part in set(compare.PARTS) - scale.left_out:
        best = dict.fromkeys(plan.families([part]), MIDDLE)
        trained = {run.model.family for run in getattr(plan, part)(best)}
        assert trained <= set(best) <= trained | {"memory+"}


def test_a_part_that_a_scale_leaves_out_is_not_planned(
    capsys: pytest.CaptureFixture[str],
) -> None:
    left_out = {scale.name: scale.left_out for scale in SCALES}
    assert left_out == {
        "smoke": {"ablations"},
        "cpu": set(),
        "long": {"continual"},
        "gpu": set(),
    }
    console = Console(file=io.StringIO(), width=200)
    compare.list_plan(scales.LONG, _plan(scales.LONG), compare.PARTS, console)
    # dense at two rates and at twice the steps, one table
    assert "\n4 runs, " in console.file.getvalue()  # type: ignore[attr-defined]
    with pytest.raises(SystemExit, match="2"):
        compare.parse_args(["--scale", "long", "--only", "continual"])
    refused = "--only continual: scale long has nothing for it; choose main"
    assert refused in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["real", "biographies"])
def test_new_facts_are_new(kind: str) -> None:
    settings = corpora.Settings(facts=100, held_out=40, kind=kind)
    split = corpora._choose(settings, settings.facts)
    taught = corpora.new_facts(settings, 50)
    old = {(f.relation, f.subject) for f in chain(split.held_in(), split.held_out)}
    new = {(f.relation, f.subject) for f in taught}
    assert len(new) == 50 and len(old) == 140 and not new & old


def test_the_list_names_every_run() -> None:
    console = Console(file=io.StringIO(), width=200)
    compare.list_plan(scales.CPU, _plan(scales.CPU), compare.PARTS, console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    plan = _plan(scales.CPU)
    runs = [*plan.sweep(scales.FAMILIES), *plan.main(BEST), *plan.ablations(BEST)]
    for run in unique([*runs, *plan.continual(BEST)]):
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
