"""Run a notebook on Kaggle with the kaggle CLI, and fetch its results.

    pip install kaggle-mgpu[ship]                                       # and a token, as Kaggle's settings page says
    python tools/kernels.py init --user NAME                            # once: your user name into kernel-metadata.json
    python tools/kernels.py push text_generation -p epochs=5 --dataset owner/my-text
    python tools/kernels.py push my_notebook.ipynb                      # a notebook of your own
    python tools/kernels.py wait text_generation                        # exit code 0: COMPLETE, and finished
    python tools/kernels.py output text_generation                      # into runs/SLUG/vN/
    python tools/kernels.py relay text_generation -p epochs=200         # as many sessions as it takes: tools/relay.py
    python tools/kernels.py sweep text_generation -p lr=[3e-4,1e-3]     # here, or with --push on Kaggle: tools/sweep.py
    python tools/kernels.py library --push --dataset                    # the package, for others: tools/library.py

`push` pushes one self-contained notebook, built in build/kernels/SLUG. Slug and title come from the notebook's name,
and the rest from the top-level kernel-metadata.json and from the header of the notebook's source, which may have any
`*_sources` of kernel-metadata.json, enable_internet, docker_image and machine_shape:

    # ---
    # jupyter:
    #   kaggle_mgpu:
    #     competition_sources: [vesuvius-challenge-surface-detection]
    # ---
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for the imports below, however this file was loaded

import kaggle_cli
import library
import notebooks
import relay
import sweep
from kaggle_cli import KaggleError
from kernel import (
    PLACEHOLDER,
    SMALL,
    SOURCES,
    Kernel,
    KernelError,
    assignments,
    check_parameters,
    duration,
    kernel_from,
    log_end,
    metadata,
    planned,
    read_json,
    top_metadata,
    wait_for,
)  # fmt: skip
from notebooks import ROOT, NotebookError


# The command line
def _init(root: Path, arguments: argparse.Namespace) -> int:
    path = root / "kernel-metadata.json"
    about = top_metadata(root)
    if not re.fullmatch(r"[\w-]+", arguments.user) or arguments.user == PLACEHOLDER:
        raise KernelError(f"--user: expected the name in the address of your Kaggle profile, got {arguments.user!r}")
    about["id"] = f"{arguments.user}/{str(about.get('id', '')).partition('/')[2]}"
    if arguments.notebook:
        kernel = kernel_from(root, arguments.notebook, arguments.user)
        needs = notebooks.build(notebooks.sources(root, [arguments.notebook])[0], root / "kaggle_mgpu").metadata
        about = metadata(root, kernel, needs.get("kaggle_mgpu", {}))
        about["code_file"] = f"notebooks/{kernel.notebook}.ipynb"
    path.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    print(f"{path}: {about['id']}, {about.get('code_file')}. From here `kaggle kernels push` pushes it.")
    return 0


def _push(kernel: Kernel, arguments: argparse.Namespace) -> int:
    kernel.internet = arguments.internet
    pushed = kernel.push(again=arguments.again, ask=lambda: kernel.ask_quota(print))
    print(f"{kernel.id}: version {pushed.version} pushed\n{pushed.url}")
    about = read_json(kernel.folder / "kernel-metadata.json")
    if about.get("enable_tpu") or str(about.get("machine_shape")).lower().startswith("tpu"):
        print("TPU: Kaggle gives pushed notebooks an image without TPU libraries; switch it on in the browser instead")
    return 0


def _status(kernel: Kernel, arguments: argparse.Namespace) -> int:
    status = kaggle_cli.status(kernel.id)
    print(f"{kernel.id}: {status.state}" + (f": {status.message}" if status.message else ""))
    return 0 if status.active or status.state == "COMPLETE" else 1


def _logs(kernel: Kernel, arguments: argparse.Namespace) -> int:
    kaggle_cli.follow(kernel.id, lambda line: print(line, flush=True))
    return 0


def _output(kernel: Kernel, arguments: argparse.Namespace) -> int:
    folder = kernel.results(arguments.version)
    files = kaggle_cli.output(kernel.named(arguments.version or kernel.version), folder)
    if not files:
        raise KernelError(f"{kernel.id} has no output yet, or kept none: python tools/kernels.py status {kernel.id}")
    print(f"{kernel.outcome(folder).text}\n{len(files)} file{'s' * (len(files) > 1)} in {folder}")
    return 0


def _wait(kernel: Kernel, arguments: argparse.Namespace) -> int:
    name = kernel.named(arguments.version or kernel.version)
    just_pushed = kernel.just_pushed and name == kernel.id
    status = wait_for(name, arguments.interval, lambda text: print(text, flush=True), just_pushed=just_pushed)
    folder = kernel.results(arguments.version)
    kaggle_cli.output(name, folder, SMALL)
    outcome = kernel.outcome(folder)
    print(outcome.text)
    if status.state == "COMPLETE" and outcome.finished:
        return 0
    if status.state != "COMPLETE":
        print(f"{status.state}: {status.message or 'no message'}. The log ends:\n{log_end(folder)}", file=sys.stderr)
    elif outcome.results:
        print("not finished: push it again with its output as an input, or use relay", file=sys.stderr)
    return 1


def _relay(kernel: Kernel, arguments: argparse.Namespace) -> int:
    return relay.run(
        kernel, carry=arguments.carry, interval=arguments.interval, anew=arguments.anew, prepare=arguments.prepare,
        say=_say,
    )  # fmt: skip


def _sweep(kernel: Kernel, arguments: argparse.Namespace) -> int:
    return sweep.run(kernel, push=arguments.push, interval=arguments.interval, plan=arguments.limit == "plan", say=_say)


def _library(root: Path, arguments: argparse.Namespace) -> int:
    if not (arguments.push or arguments.dataset):
        print(library.build_wheel(root))
        return 0
    user = arguments.user or str(top_metadata(root).get("id", "")).split("/")[0]
    Kernel("", user, library.TITLE, root).check_user()
    wheel = library.build_wheel(root)
    if arguments.dataset:
        library.upload(root, user, wheel)
        print(f"dataset {user}/{library.SLUG} uploaded: push a notebook with --dataset {user}/{library.SLUG}")
    if arguments.push:
        library.push(root, user, wheel, arguments.interval, _say)
        print(f"kernel {user}/{library.SLUG} ready: push a notebook with --kernel-source {user}/{library.SLUG}")
    return 0


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {kaggle_cli.redacted(text)}", flush=True)


def _seconds(text: str) -> float:
    return _above_zero(float(text), text)


def _version(text: str) -> int:
    return int(_above_zero(int(text), text))


def _above_zero(number: float, text: str) -> float:
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository (default: the one this file is in)")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, function: Callable[..., int], text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        made.set_defaults(function=function)
        if name not in ("init", "library"):
            made.add_argument("kernel", help="a notebook such as text_generation, an .ipynb of your own, or owner/slug")
        if name != "init":
            made.add_argument("--user", help="your Kaggle user name (default: as in kernel-metadata.json, see init)")
        return made

    def run_options(made: argparse.ArgumentParser) -> None:
        made.add_argument("-p", "--parameter", action="append", default=[], metavar="NAME=VALUE")
        made.add_argument("--title", help="default: made from the notebook's name; the slug follows from the title")
        made.add_argument(
            "-t", "--limit", metavar="DURATION", help="when Kaggle ends a session: 3h; plan: by an estimate"
        )
        for name in ("dataset", "competition", "kernel", "model"):
            flag = f"--{name}" if name != "kernel" else "--kernel-source"
            made.add_argument(flag, dest=f"{name}_sources", action="append", default=[], help="an input; repeatable")

    def interval(made: argparse.ArgumentParser) -> None:
        made.add_argument("--interval", type=_seconds, default=60.0, help="seconds between two polls (default: 60)")

    init = command("init", _init, "put your user name into the top-level kernel-metadata.json")
    init.add_argument("--user", required=True)
    init.add_argument("notebook", nargs="?", help="also make it the notebook that `kaggle kernels push` pushes")
    push = command("push", _push, "build, check and push a notebook, and start it")
    run_options(push)
    push.add_argument("--internet", action="store_true", help="with the internet on, as `pip install` needs it")
    push.add_argument("--again", action="store_true", help="even if the kernel is running, which costs quota twice")
    command("status", _status, "the newest session's status; exit code 1 after ERROR or a cancellation")
    command("logs", _logs, "the log as plain lines, live while the kernel runs")
    for name, function, text in (
        ("output", _output, "fetch all files and the log of the newest version into runs/SLUG/vN/"),
        ("wait", _wait, "wait for the end; exit code 0 only for COMPLETE with the run's result.json finished"),
    ):
        made = command(name, function, text)
        made.add_argument("--version", type=_version, help="the N of vN (default: the last version pushed from here)")
        if name == "wait":
            interval(made)
    relayed = command(
        "relay", _relay, "session after session until the training is finished; may be restarted any time"
    )
    run_options(relayed)
    interval(relayed)
    relayed.add_argument(
        "--carry",
        choices=["kernel", "dataset"],
        help="the way of the checkpoints to the next session. kernel (default): the last output as an input, without "
        "this machine. dataset: fetched here and uploaded to a private dataset, which is slower but certain: Kaggle "
        "does not document the version of its own output that a kernel gets, and after an ERROR it may be an older "
        "one. The relay notices that, stops, and can go on with --carry dataset.",
    )
    relayed.add_argument(
        "--prepare", action="store_true", help="first prepare the data on a CPU session, without quota"
    )
    relayed.add_argument("--anew", action="store_true", help="forget an earlier relay of this kernel")
    swept = command("sweep", _sweep, "a run for each combination of the values in lists, and a table of the results")
    run_options(swept)
    interval(swept)
    swept.add_argument("--push", action="store_true", help="on Kaggle, two sessions at a time, instead of here")
    shared = command("library", _library, "build the wheel, and make it a public kernel or a private dataset to attach")
    shared.add_argument(
        "--push", action="store_true", help="push the kernel kaggle-mgpu, which shows and keeps the files"
    )
    shared.add_argument("--dataset", action="store_true", help="upload the dataset kaggle-mgpu")
    interval(shared)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    root = arguments.root.resolve()
    try:
        if arguments.command in ("init", "library"):
            return int(arguments.function(root, arguments))
        kernel = kernel_from(root, arguments.kernel, arguments.user, getattr(arguments, "title", None))
        if hasattr(arguments, "parameter"):
            kernel.parameters = assignments(arguments.parameter)
            kernel.sources = {name: getattr(arguments, name) for name in SOURCES if getattr(arguments, name)}
            if arguments.limit == "plan" and arguments.command != "sweep":
                kernel.limit = planned(kernel)
            elif arguments.limit not in (None, "plan"):
                kernel.limit = duration(arguments.limit)
            if arguments.command != "sweep":  # sweep checks each combination itself
                check_parameters(kernel)
        if arguments.command != "sweep":
            kernel.check_user()
        code: int = arguments.function(kernel, arguments)
        return code
    except (KernelError, KaggleError, NotebookError) as error:
        print(kaggle_cli.redacted(str(error)), file=sys.stderr)
        return 1
    except OSError as error:  # a folder that is a file, a full disk, …
        print(f"{type(error).__name__}: {kaggle_cli.redacted(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped here; sessions on Kaggle go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
