"""The command line shows the machine's GPUs, checks the machine, plans runs and trains recipes.

    python -m kaggle_mgpu --version
    python -m kaggle_mgpu gpus
    python -m kaggle_mgpu check
    python -m kaggle_mgpu plan text_generation --max-steps 2000 --on T4x2
    python -m kaggle_mgpu train text_generation --epochs 1 --strategy ddp
    python -m kaggle_mgpu prepare text_generation --data-path corpus.txt
    torchrun --nproc-per-node 2 -m kaggle_mgpu train text_generation --epochs 1

Every field of the recipe's config is a flag. --config FILE reads a YAML or JSON file, which may `include:` others;
KAGGLE_MGPU_<FIELD> in the environment overrides the file, and flags override both. The exit code is 0 for a run that
finished, or stopped at its time limit or on request, 1 for an error or a failed check, 2 for invalid settings, 130 if
interrupted outside training or twice in training. Errors raised by this package are printed as one line, other errors
with a traceback.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import pkgutil
import re
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from . import __version__, env

if TYPE_CHECKING:
    from .config import TrainConfig
    from .training import Result


def recipes() -> list[str]:
    """Return the names of the recipes."""
    from . import recipes as package

    return sorted(module.name for module in pkgutil.iter_modules(package.__path__) if module.name[0] != "_")


LIGHT = ("gpus", "check", "--version")
"""Commands that do not need the recipes, whose import takes a second."""


def parser(with_recipes: bool = True) -> tuple[argparse.ArgumentParser, dict[str, ModuleType]]:
    """Return the argument parser, and {recipe: module}; `with_recipes=False` gives `LIGHT` commands and no modules."""
    top = argparse.ArgumentParser(
        prog="python -m kaggle_mgpu",
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = f"kaggle_mgpu {__version__} from {Path(__file__).parent}"
    top.add_argument("--version", action="version", version=version, help="the version and the folder of the package")
    commands = top.add_subparsers(dest="command", required=True)
    # no abbreviations: a misspelt --epoch must not be taken for --epochs
    commands.add_parser(
        "gpus", allow_abbrev=False, help="the GPUs, how busy and full each is, and how training uses them"
    )
    of_check = commands.add_parser(
        "check", allow_abbrev=False, help="test in ten seconds whether this machine trains correctly"
    )
    of_check.add_argument("--output-dir", metavar="DIR", help="where runs will be kept (default: the working folder)")
    modules: dict[str, ModuleType] = {}
    if not with_recipes:
        return top, modules
    of_plan = commands.add_parser("plan", help="estimate a recipe's batch, memory, time, sessions and speed-up")
    of_train = commands.add_parser("train", help="train a recipe")
    of_prepare = commands.add_parser(
        "prepare", help="run the part of a recipe that comes before training and needs no GPU"
    )
    parsers = (of_plan, of_train, of_prepare)
    groups = [each.add_subparsers(dest="recipe", required=True, metavar="RECIPE") for each in parsers]
    for name in recipes():
        modules[name] = importlib.import_module(f".recipes.{name}", __package__)
        summary = (modules[name].__doc__ or name).split("\n\n")[0]
        for group in groups:
            of_recipe = group.add_parser(name, allow_abbrev=False, help=summary, description=summary)
            of_recipe.add_argument(
                "--config", metavar="FILE", help="YAML or JSON file with settings; flags override it"
            )
            modules[name].Config.add_arguments(of_recipe)
            of_recipe.add_argument(
                "--variable", dest="make_variables", action="append", default=[], metavar="NAME=VALUE",
                help="a make variable of the fine-tuning guide, such as TRAIN_BATCH_SIZE=1",
            )  # fmt: skip
            if group is groups[0]:
                on = "GPUs to estimate for, such as T4x2, L4x4, A100-80GB, H200 (default: measure on this machine)"
                of_recipe.add_argument("--on", dest="plan_on", metavar="GPUS", help=on)
        # a recipe may add commands, such as an export of its weights
        for command, (add_arguments, function) in getattr(modules[name], "COMMANDS", {}).items():
            about = (function.__doc__ or command).split("\n\n")[0]
            of_command = commands.add_parser(command, allow_abbrev=False, help=about, description=about)
            add_arguments(of_command)
            of_command.set_defaults(function=function)
    return top, modules


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code."""
    env.fix(verbose=False)
    arguments = sys.argv[1:] if arguments is None else arguments
    top, modules = parser(with_recipes=arguments[:1] not in [[name] for name in LIGHT])
    if not arguments:
        top.print_help(sys.stderr)
        return 2
    given, unknown = top.parse_known_args(arguments)
    if unknown:
        top.error(f"unrecognized arguments: {' '.join(unknown)}{_meant(unknown, given, modules)}")
    if given.command == "gpus":
        from .machine import devices

        print(devices.report(load=True))
        return 0
    if given.command == "check":
        from .planning import check

        if given.output_dir == "":  # as from an unset shell variable
            top.error("argument --output-dir: expected a folder's name, got ''")
        report = check.run(given.output_dir)
        print(report)
        return 0 if report.ok else 1
    from .launching import launch
    from .training import train

    config = None
    try:
        if given.command not in ("plan", "train", "prepare"):
            return int(given.function(given))
        recipe = modules[given.recipe]
        try:
            config = _config(given, recipe.Config)
        except (TypeError, ValueError, OSError) as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            return 2
        if given.command == "prepare":
            if not hasattr(recipe, "prepare"):
                able = ", ".join(name for name, module in modules.items() if hasattr(module, "prepare"))
                print(
                    f"prepare: {given.recipe} needs no preparation; run `train`. Recipes with `prepare`: {able}",
                    file=sys.stderr,
                )
                return 2
            print(recipe.prepare(config))
            return 0
        if given.command == "plan":
            from .planning import plan_all, summary_line

            # a recipe of several stages is several runs
            runs = recipe.runs(config) if hasattr(recipe, "runs") else [("", config, recipe.task(config))]
            plans = plan_all([(one, task) for _, one, task in runs], on=given.plan_on)
            for number, ((name, *_), planned) in enumerate(zip(runs, plans, strict=True), 1):
                print(f"{name} ({number} of {len(runs)})\n{planned}" if name else planned)
            if len(plans) > 1:
                print(summary_line(plans))
            return 0
        # a recipe with more than training (stages, inference) has its own run()
        if run := getattr(recipe, "run", None):
            result = run(config)
        else:
            task = recipe.task(config)
            if hasattr(task, "describe") and "RANK" not in os.environ:
                print(task.describe(), flush=True)
            result = launch(train, config, task)
    except Exception as error:
        if not _raised_here(error):
            if config is None or not _is_about_folder(error, config.output_dir):
                raise
            where = f"output_dir: expected a folder that can be written to, got {config.output_dir!r}"
            error = type(error)(f"{where}: {error}")
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    if os.environ.get("RANK", "0") == "0":
        _draw(result)
    return 0 if result.finished or result.reason in ("time limit", "asked to stop") else 1


def _config(given: argparse.Namespace, kind: type[TrainConfig]) -> TrainConfig:
    """Merge the settings of the file, the environment and the flags; check the GPUs given with --on."""
    base = {} if given.config is None else kind.load(given.config).settings()
    if variables := dict(each.partition("=")[::2] for each in given.make_variables):
        translate = getattr(kind, "variables", None)
        if translate is None:
            raise TypeError(
                f"{', '.join(variables)}: RECIPE={given.recipe} does not have these make variables of the fine-tuning "
                f"guide. Expected RECIPE=sft, or ARGS='--flag value'."
            )
        base = translate(variables, base)
    if from_environment := kind.environment():
        shown = ", ".join(f"{name}={value}" for name, value in from_environment.items())
        if os.environ.get("RANK", "0") == "0":
            print(f"settings from KAGGLE_MGPU_… in the environment: {shown}", flush=True)
    if getattr(given, "plan_on", None) is not None:
        from .planning import Target

        Target.named(given.plan_on)
    return kind.from_arguments(given, {**base, **from_environment})


def _is_about_folder(error: Exception, folder: str) -> bool:
    """Return whether the error is an OSError about this folder, a folder above, or a path inside."""
    if not isinstance(error, OSError) or not isinstance(error.filename, str):
        return False
    return Path(error.filename).is_relative_to(folder) or Path(folder).is_relative_to(error.filename)


def _meant(unknown: list[str], given: argparse.Namespace, modules: dict[str, ModuleType]) -> str:
    """Return a hint with the recipe's flags nearest to each unknown flag, or ""."""
    if not getattr(given, "recipe", None):
        return ""
    from .names import either, nearest, other_value

    kind = modules[given.recipe].Config
    flags = [field.name.replace("_", "-") for field in dataclasses.fields(kind)]
    names = [word[2:].partition("=")[0] for word in unknown if word.startswith("--")]
    hints = []
    for name in names:
        if near := nearest(name, flags, kind.OTHER_NAMES):
            start = f"For --{name}, did you mean" if len(names) > 1 else "Did you mean"
            hints.append(f"{start} {either(f'--{flag}' for flag in near)}?{other_value(name, near)}")
    return "".join(f"{' ' if number else '. '}{hint}" for number, hint in enumerate(hints))


def _draw(result: Result) -> None:
    """Draw the run's pictures; a failure prints a message and does not change the exit code."""
    try:
        result.plot()
    except Exception as error:
        print(f"the pictures of the run could not be drawn: {type(error).__name__}: {error}", file=sys.stderr)
    else:
        print(f"pictures: {Path(result.output_dir) / 'run.png'}, run.svg", flush=True)


def _raised_here(error: Exception) -> bool:
    """Return whether this package raised the error, here or in a worker, so that the message needs no traceback."""
    from .errors import WorkerTraceback

    if isinstance(error.__cause__, WorkerTraceback):
        trace = str(error.__cause__)
    else:
        trace = "".join(traceback.format_tb(error.__traceback__))
    raised_in = Path(re.findall(r'^  File "(.+)", line \d+', trace, re.MULTILINE)[-1])
    return raised_in.is_relative_to(Path(__file__).parent)


if __name__ == "__main__":
    try:
        code = main()
    except KeyboardInterrupt:  # training handles interrupts itself; elsewhere there is nothing to save
        print("stopped", file=sys.stderr)
        code = 130
    sys.stdout.flush()
    sys.stderr.flush()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # under torchrun a destructor of gloo may abort the exit, and torchrun would then report a failed run
        os._exit(code)
    sys.exit(code)
