"""Draw the pictures of the README and of the gallery: train each template small, and write notebooks/images/.

    python tools/pictures.py                       # all; a quarter of an hour on two quiet cores
    python tools/pictures.py text_generation sft   # some

Runs are kept under build/pictures and go on where they were. The panel and texts are drawn by Chromium.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import browser
from kaggle_mgpu import launch, train
from kaggle_mgpu.progress import View, panel_html, plot, read

ROOT = Path(__file__).resolve().parents[1]
RUNS, IMAGES = ROOT / "build" / "pictures", ROOT / "notebooks" / "images"
MOST_BYTES = 120_000
PALETTE_ERROR = 16  # of 255
NPROC = 2


def write(name: str, picture: Image.Image, width: int = 900) -> None:
    """Write a picture of at most `width` pixels and MOST_BYTES.

    It gets a palette where that changes no value by more than PALETTE_ERROR, for a palette loses rare colours, such as
    a thin line's; else all colours, or as many as MOST_BYTES allow.
    """
    picture.thumbnail((width, 10 * width))
    method = Image.Quantize.FASTOCTREE if picture.mode == "RGBA" else None
    reduced = {colours: picture.quantize(colours, method=method) for colours in (256, 64, 32, 16)}
    extremes: Any = ImageChops.difference(picture, reduced[256].convert(picture.mode)).getextrema()
    faithful = max(high for _, high in extremes) <= PALETTE_ERROR
    for chosen in [*reduced.values()] if faithful else [picture, *reduced.values()]:
        chosen.save(written := io.BytesIO(), format="PNG", optimize=True)
        if len(written.getvalue()) <= MOST_BYTES:
            break
    (IMAGES / f"{name}.png").write_bytes(written.getvalue())
    print(f"{name}.png: {len(written.getvalue()) / 1000:.0f} kB", flush=True)


def shot(name: str, body: str, *, width: int, height: int, dark: bool = False) -> None:
    """Write what Chromium shows of a page, without the empty space below and to the right."""
    path = RUNS / f"{name}.png"
    browser.screenshot(browser.page(body), path, width=width, height=height, dark=dark)
    picture = Image.open(path).convert("RGB")
    ground = Image.new("RGB", picture.size, picture.getpixel((picture.width - 1, picture.height - 1)))
    box = ImageChops.difference(picture, ground).getbbox()
    write(name, picture if box is None else picture.crop((0, 0, min(width, box[2] + 8), min(height, box[3] + 8))))


def both(name: str, body: str, *, width: int, height: int = 900) -> None:
    """Write a page's pictures for light pages and for dark ones."""
    for dark in (False, True):
        shot(f"{name}-{'dark' if dark else 'light'}", body, width=width, height=height, dark=dark)


def of_text(name: str, text: str) -> None:
    style = "font:13px/1.45 monospace;white-space:pre-wrap;width:880px;margin:4px"
    both(name, f'<div style="{style}">{html.escape(text)}</div>', width=900)


def of_rows(name: str, rows: list[tuple[str, str]]) -> None:
    """Write the pictures of a table: a label and a text in each row, line breaks as they are."""
    label = 'style="padding:5px 16px 5px 0;opacity:.65;text-align:right;white-space:nowrap;vertical-align:top"'
    cell = 'style="padding:5px 0;font-family:monospace;white-space:pre-wrap;overflow-wrap:anywhere"'
    lines = "".join(
        f"<tr><td {label}>{html.escape(head)}</td><td {cell}>{html.escape(text)}</td></tr>" for head, text in rows
    )
    style = "font:13px/1.45 system-ui,sans-serif;width:700px;border-collapse:collapse"
    both(name, f'<table style="{style}">{lines}</table>', width=740, height=1200)


def text_generation(folder: Path) -> None:
    """The panel in the middle of the run beside the run's plot, and what the model wrote at some evaluations."""
    from kaggle_mgpu.recipes.text_generation import Config, TextGeneration

    config = Config(
        n_layer=4, n_head=4, n_embd=128, block_size=128, global_batch_size=16, lr=3e-3, max_steps=450, eval_every=75,
        nproc=NPROC, output_dir=str(folder),
    )  # fmt: skip
    launch(train, config, TextGeneration(config))
    records = read(folder)
    now = [0.0]
    view = View(clock=lambda: now[0])
    for record in records:
        if record.get("step", 0) > 400:
            break
        now[0] = record.get("time", now[0])
        view.take(record)
    view.hint = ""
    plot(folder)
    svg = base64.b64encode((folder / "run.svg").read_bytes()).decode()  # as an image: its style sheet stays in it
    both(
        "run",
        '<div style="display:flex;gap:16px;align-items:center">'
        f'<div style="width:430px">{panel_html(view)}</div>'
        f'<img style="width:590px" src="data:image/svg+xml;base64,{svg}"></div>',
        width=1060,
    )
    evals = [record for record in records if "sample" in record]
    of_rows("text_generation", [
        (f"step {record['step']}, loss {record['val_loss']:.2f}", str(record["sample"])) for record in evals
    ])  # fmt: skip


def bring_your_own_loop(folder: Path) -> None:
    """The panels of the notebook's three loops as they end, and what its last cell says of the folds."""
    command = [
        sys.executable,
        str(ROOT / "tools" / "notebooks.py"),
        "run",
        "bring_your_own_loop",
        "-p",
        "nproc",
        str(NPROC),
    ]
    subprocess.run([*command, "-p", "output_dir", str(folder), "--output", f"{folder}.ipynb"], check=True)
    cells = json.loads(Path(f"{folder}.ipynb").read_text(encoding="utf-8"))["cells"]
    printed = [text for cell in cells for output in cell.get("outputs", []) for text in output.get("text", [])]
    (folds,) = [text for text in printed if text.startswith("accuracy of each fold")]
    panels = ""
    for name, title in {"trainer": "Trainer", "accelerate": "accelerate", "by_hand": "DistributedDataParallel"}.items():
        view = View()
        for record in read(folder / name):
            view.take(record)
        ended = view.outcome(json.loads((folder / name / "result.json").read_text(encoding="utf-8")))
        panels += f'<div style="width:330px"><b>{title}</b>{panel_html(view, ended, "finished")}</div>'
    both(
        "bring_your_own_loop",
        f'<div style="font:13px/1.45 system-ui,sans-serif"><div style="display:flex;gap:12px">{panels}</div>'
        f'<div style="font-family:monospace;margin-top:10px">{html.escape(folds)}</div></div>',
        width=1040,
    )


def sft(folder: Path) -> None:
    """Two held-out conversations before and after."""
    from kaggle_mgpu.recipes.sft import Config, Finetune

    config = Config(
        max_length=256,
        epochs=4,
        global_batch_size=8,
        lr=4e-3,
        nproc=NPROC,
        output_dir=str(folder),
        max_new_tokens=40,
        eval_generate_samples=16,
    )
    task = Finetune(config)
    before = task.answers(task.untrained())
    after = task.answers(task.load(launch(train, config, task)))
    rows = []
    for (question, expected, earlier), (_, _, later) in zip(before[:2], after[:2], strict=True):
        asked = "\n".join(question.splitlines()[1:-1])  # without the lines that name who speaks
        rows += [("question", asked), ("expected", expected), ("before", earlier[:160]), ("after", later)]
    of_rows("sft", rows)


def activity_recognition(folder: Path) -> None:
    """The confusion matrix of people held out."""
    from kaggle_mgpu.recipes.activity_recognition import ActivityRecognition, Config, measure

    config = Config(nproc=NPROC, epochs=8, output_dir=str(folder))
    task = ActivityRecognition(config)
    measure(task, launch(train, config, task))
    write("activity_recognition", Image.open(folder / "confusion.png"), 480)


def surface_segmentation(folder: Path) -> None:
    """A slice, its label and its prediction."""
    from kaggle_mgpu.recipes.surface_segmentation import Config, run

    run(Config(nproc=NPROC, output_dir=str(folder), patch_size=32, width=8))
    write("surface_segmentation", Image.open(folder / "slices.png"), 700)


def camouflage_segmentation(folder: Path) -> None:
    """Image, mask, prediction and error."""
    from kaggle_mgpu.recipes.camouflage_segmentation import CamouflageSegmentation, Config, run

    config = Config(nproc=NPROC, output_dir=str(folder), epochs=10)
    task = CamouflageSegmentation(config)
    result = run(config, task.found)
    task.figure(result.load(task.network(), "best"), folder / "predictions.png", count=2)
    write("camouflage_segmentation", Image.open(folder / "predictions.png"), 560)


def check_gpus(folder: Path) -> None:
    """The report of a check."""
    from kaggle_mgpu import check

    of_text("check_gpus", str(check.run(folder)).replace(f"{RUNS}{os.sep}", "").replace(str(RUNS), "the folder"))


DRAWN: dict[str, Callable[[Path], Any]] = {
    each.__name__: each
    for each in (
        text_generation,
        bring_your_own_loop,
        sft,
        activity_recognition,
        surface_segmentation,
        camouflage_segmentation,
        check_gpus,
    )
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(DRAWN)}; default: all")
    names = parser.parse_args().names or list(DRAWN)
    if unknown := set(names) - set(DRAWN):
        parser.error(f"no picture of {', '.join(sorted(unknown))}: expected some of {', '.join(DRAWN)}")
    if browser.PROGRAM is None:
        parser.error("needs Chromium: apt-get install chromium")
    RUNS.mkdir(parents=True, exist_ok=True)
    IMAGES.mkdir(exist_ok=True)
    os.chdir(RUNS)
    for name in names:
        DRAWN[name](RUNS / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
