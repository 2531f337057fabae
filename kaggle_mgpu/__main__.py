"""The command line: look at the machine, train.

    python -m kaggle_mgpu gpus
    python -m kaggle_mgpu train text_generation --epochs 1 --strategy ddp
    torchrun --nproc-per-node 2 -m kaggle_mgpu train text_generation --epochs 1

Every field of the recipe's config is a flag. --config FILE reads a YAML or JSON file first, which may `include:` more;
KAGGLE_MGPU_<FIELD> in the environment overrides it, and flags override both. The exit code is 0 for a run that finished
or stopped in good order, 1 for an error, 2 for a wrong command line. An error that this package raises is one line; of
any other, a bug's or torch's, the traceback is shown too.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import re
import sys
import traceback
from pathlib import Path
from types import ModuleType

from . import env


def recipes() -> list[str]:
    """The names of the templates."""
    from . import recipes as package

    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def parser() -> tuple[argparse.ArgumentParser, dict[str, ModuleType]]:
    """The argument parser, and the recipes' modules by name."""
    top = argparse.ArgumentParser(
        prog="python -m kaggle_mgpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(dest="command", required=True)
    commands.add_parser("gpus", help="the GPUs there are, and the mode that follows")
    modules: dict[str, ModuleType] = {}
    names = commands.add_parser("train", help="train a recipe").add_subparsers(
        dest="recipe", required=True, metavar="RECIPE"
    )
    for name in recipes():
        modules[name] = importlib.import_module(f".recipes.{name}", __package__)
        summary = (modules[name].__doc__ or name).split("\n\n")[0]
        of_recipe = names.add_parser(name, help=summary, description=summary)
        of_recipe.add_argument("--config", metavar="FILE", help="YAML or JSON file with settings; flags override it")
        modules[name].Config.add_arguments(of_recipe)
        # a recipe may have commands of its own: what becomes of its weights afterwards, say
        for command, (add_arguments, function) in getattr(modules[name], "COMMANDS", {}).items():
            about = (function.__doc__ or command).split("\n\n")[0]
            of_command = commands.add_parser(command, help=about, description=about)
            add_arguments(of_command)
            of_command.set_defaults(function=function)
    return top, modules


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    env.fix(verbose=False)
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments == ["gpus"]:  # without the second that the recipes' imports take
        from . import devices

        print(devices.report())
        return 0
    top, modules = parser()
    if not arguments:
        top.print_help(sys.stderr)
        return 2
    given = top.parse_args(arguments)
    from .launch import launch
    from .trainer import train

    try:
        if given.command != "train":
            return int(given.function(given))
        recipe = modules[given.recipe]
        base = recipe.Config.load(given.config).to_dict() if given.config else {}
        if from_environment := recipe.Config.environment():
            shown = ", ".join(f"{name}={value}" for name, value in from_environment.items())
            if os.environ.get("RANK", "0") == "0":
                print(f"from KAGGLE_MGPU_… in the environment: {shown}", flush=True)
        config = recipe.Config.from_arguments(given, {**base, **from_environment})
        # a recipe that does more than train (stages, inference) says so itself
        run = getattr(recipe, "run", None)
        result = run(config) if run else launch(train, config, recipe.task(config))
    except Exception as error:
        if not _says_all(error):
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0 if result.finished or result.reason in ("time limit", "asked to stop") else 1


def _says_all(error: Exception) -> bool:
    """Whether this package raised the error, here or in a worker, so that its message was written for the user."""
    from .launch import WorkerTraceback

    if isinstance(error.__cause__, WorkerTraceback):
        trace = str(error.__cause__)
    else:
        trace = "".join(traceback.format_tb(error.__traceback__))
    raised_in = Path(re.findall(r'^  File "(.+)", line \d+', trace, re.MULTILINE)[-1])
    return raised_in.is_relative_to(Path(__file__).parent)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # under torchrun: now and then a destructor of gloo aborts the exit, and torchrun calls the whole run failed
        os._exit(code)
    sys.exit(code)
