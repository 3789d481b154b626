"""hf-polarize: run a recipe, compare methods, bill a chip, time it, look into a checkpoint, upload it."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-polarize", description=__doc__)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run",
        help="run a recipe",
        description="Polarize a model as a recipe says. Defaults < recipe < key=value.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    compare = commands.add_parser(
        "compare",
        help="measure every method side by side",
        description="Measure LoRC, LoftQ, LQER, QERA and ours on the model of a recipe. It goes on where it was "
        "interrupted. Keys are those of run.",
    )

    energy = commands.add_parser(
        "energy",
        help="add up the energy of a model on a chip",
        description="Itemise the energy per token of a recipe's model on its chip (key cim). Keys are those of run.",
    )

    cim = commands.add_parser("cim", help="experiments on simulated chips")
    experiments = cim.add_subparsers(dest="experiment", required=True, metavar="EXPERIMENT")
    sweep = experiments.add_parser(
        "sweep",
        help="measure a model on many chips of many kinds",
        description="Measure a recipe's model (key cim) on chips, over the grids of the key sweep. It goes on where "
        "it was interrupted. Keys are those of run.",
    )

    bench = commands.add_parser(
        "bench",
        help="time a model, polarized and on a chip",
        description="Time a recipe's model on one sample of its evaluation data: original, polarized, and on its chip "
        "(key cim); and a layer on chips of all kinds. Keys are those of run.",
    )

    for command in (run, compare, energy, sweep, bench):
        command.add_argument("recipe", help="YAML file")
        command.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys that win over the file")

    info = commands.add_parser("info", help="tell what is in a checkpoint")
    info.add_argument("directory", help="folder of a polarized checkpoint")

    push = commands.add_parser("push", help="upload a checkpoint to the Hub in one commit, with a model card")
    push.add_argument("directory", help="folder of a polarized checkpoint")
    push.add_argument("repo", help="user/name")
    push.add_argument("--private", action="store_true", help="make a new repository private")
    push.add_argument("--message", default="Upload polarized model", help="of the commit")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    parser = build_parser()
    if argv[:1] == ["run"] and {"-h", "--help"} & set(argv):
        from .recipe import describe_keys  # only the help of this command needs the keys, and they need torch

        run = parser._subparsers._group_actions[0].choices["run"]  # type: ignore[union-attr, index]
        run.epilog = f"recipe keys and their defaults:\n\n{describe_keys()}"
    options = parser.parse_args(argv)
    try:
        functions = {
            "run": _run,
            "compare": _compare,
            "energy": _energy,
            "cim": _sweep,
            "bench": _bench,
            "info": _info,
            "push": _push,
        }
        return functions[options.command](options)
    except KeyboardInterrupt:
        print("hf-polarize: interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # a command line ends with a sentence; --debug shows where it came from
        if options.debug:
            raise
        print(f"hf-polarize: error: {error}", file=sys.stderr)
        return 1


def _console() -> Console:
    """Return a console as wide as the terminal; a file or a pipe gets lines that aren't cut."""
    return Console(width=None if sys.stdout.isatty() else 140)


def _run(options: argparse.Namespace) -> int:

    from .checkpoint import SIDECAR
    from .pipeline import run_recipe
    from .recipe import load_recipe
    from .report import results_rows, verdict

    recipe = load_recipe(options.recipe, options.overrides)
    command = shlex.join(["hf-polarize", "run", options.recipe, *options.overrides])
    try:
        metrics = run_recipe(recipe, command)
    except KeyboardInterrupt:
        if (Path(recipe.output_dir) / SIDECAR).is_file():
            print(
                f"the checkpoint in {recipe.output_dir} is whole, its measurements are missing; "
                "overwrite=true runs the recipe again",
                file=sys.stderr,
            )
        raise
    console = _console()
    header, rows = results_rows(metrics)
    names, *measured = zip(header, *rows, strict=True)  # a model per column: it fits a narrow terminal
    table = Table(title="on held-out data")
    for name in names:
        table.add_column(name, justify="right" if name else "left")
    for row in measured:
        table.add_row(*row)
    console.print(table)
    console.print(verdict(metrics))
    console.print(escape(f"checkpoint, metrics.json and report.md are in {Path(recipe.output_dir)}/"))
    return 0


def _compare(options: argparse.Namespace) -> int:
    from .comparison import compare_recipe

    return _experiment(options, ["compare"], compare_recipe, "comparison")


def _sweep(options: argparse.Namespace) -> int:
    from .cim.sweep import sweep_recipe

    return _experiment(options, ["cim", "sweep"], sweep_recipe, "sweep")


def _energy(options: argparse.Namespace) -> int:
    from .cim.energy_report import energy_recipe

    return _experiment(options, ["energy"], energy_recipe, "energy")


def _bench(options: argparse.Namespace) -> int:
    from .bench import bench_recipe

    return _experiment(options, ["bench"], bench_recipe, "bench")


def _experiment(options: argparse.Namespace, words: list[str], function: Callable[..., Any], name: str) -> int:
    """Run a recipe by a function that leaves NAME.md and NAME.json, and print the report without its long tables."""
    from .recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    function(recipe, shlex.join(["hf-polarize", *words, options.recipe, *options.overrides]))
    folder = Path(recipe.output_dir)
    text = (folder / f"{name}.md").read_text(encoding="utf-8")
    print(text.partition("## Layers")[0].rstrip())
    print(f"\n{name}.md, {name}.json and their plots, if any, are in {folder}/")
    return 0


def _info(options: argparse.Namespace) -> int:
    from .inspection import inspect_checkpoint

    info = inspect_checkpoint(options.directory)
    console = _console()
    table = Table(title=escape(f"{(info.config.get('architectures') or ['model'])[0]} in {options.directory}"))
    for heading in ("layer", "shape", "rank", "backbone", "scales", "surrogate", "bytes"):
        table.add_column(heading, justify="left" if heading == "layer" else "right", overflow="fold")
    for layer in info.layers:
        parts = (layer.code_bytes, layer.scale_bytes, layer.surrogate_bytes)
        bits = [f"{8 * size / layer.weights:.3f}" for size in parts]
        shape = f"{layer.out_features} x {layer.in_features}"
        table.add_row(layer.name, shape, str(layer.rank), *bits, f"{sum(parts):,}")
    total = [f"{info.bits(part):.3f}" for part in ("code", "scale", "surrogate")]
    table.add_section()
    table.add_row(f"{len(info.layers)} layers", "", "", *total, f"{info.bytes - info.other_bytes:,}")
    console.print(table)
    console.print("backbone, scales and surrogate in bits per weight of the layer")
    console.print(f"bits per weight: {info.bits_per_weight:.3f}")
    console.print(f"left in high precision: {info.other_bytes:,} bytes; total: {info.bytes:,} bytes")
    if not info.sidecar:
        console.print("no record of how it was made (no polarize_config.json)")
        return 0
    backbone = info.sidecar["backbone"]
    console.print(
        f"backbone: {backbone['format']}, double quantization {backbone['double_quant']}, "
        f"activations {backbone['activations']}; hf_polarize {info.sidecar['hf_polarize_version']}"
    )
    if info.chip is not None:
        console.print(
            f"runs on a chip: CIMConfig.from_dict({info.chip})", markup=False, highlight=False, soft_wrap=True
        )
    if info.deflated:
        console.print("runs deflated where it runs on a chip or with rounded activations")
    for key, value in info.sidecar.get("provenance", {}).items():
        console.print(escape(f"{key}: {value}"), highlight=False)
    results = info.sidecar.get("results")
    if results and results.get("gap_recovered") is not None:
        console.print(f"gap recovered: {100 * results['gap_recovered']:.1f} % ({results['protocol']})", markup=False)
    return 0


def _push(options: argparse.Namespace) -> int:
    from .hub import push_folder

    commit = push_folder(
        options.directory, options.repo, private=options.private or None, commit_message=options.message
    )
    print(commit.commit_url)
    return 0


if __name__ == "__main__":
    sys.exit(main())
