"""Draw the pictures of the README and of the gallery: train each template small, and write notebooks/images/.

    python tools/pictures.py                       # all; a quarter of an hour on two quiet cores
    python tools/pictures.py text_generation sft   # some

Runs are kept under build/pictures and go on where they were. The panel and texts are drawn by Chromium.
"""

from __future__ import annotations

import argparse
import html
import io
import os
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
NPROC = 2


def write(name: str, picture: Image.Image, width: int = 900) -> None:
    """Write a picture of at most `width` pixels and MOST_BYTES, with as many colours as that allows."""
    picture.thumbnail((width, 10 * width))
    for colours in (256, 64, 32, 16):
        small = picture.quantize(colours, method=Image.Quantize.FASTOCTREE if picture.mode == "RGBA" else None)
        small.save(written := io.BytesIO(), format="PNG", optimize=True)
        if len(written.getvalue()) <= MOST_BYTES:
            break
    (IMAGES / f"{name}.png").write_bytes(written.getvalue())
    print(f"{name}.png: {len(written.getvalue()) / 1000:.0f} kB, {colours} colours", flush=True)


def shot(name: str, body: str, *, width: int, height: int, dark: bool = False) -> None:
    """Write what Chromium shows of a page, without the empty space below and to the right."""
    path = RUNS / f"{name}.png"
    browser.screenshot(browser.page(body), path, width=width, height=height, dark=dark)
    picture = Image.open(path).convert("RGB")
    ground = Image.new("RGB", picture.size, picture.getpixel((picture.width - 1, picture.height - 1)))
    box = ImageChops.difference(picture, ground).getbbox()
    write(name, picture if box is None else picture.crop((0, 0, min(width, box[2] + 8), min(height, box[3] + 8))))


def of_text(name: str, text: str) -> None:
    style = "font:13px/1.45 monospace;white-space:pre-wrap;width:880px;margin:4px"
    for dark in (False, True):
        shot(f"{name}-{'dark' if dark else 'light'}", f'<div style="{style}">{html.escape(text)}</div>',
             width=900, height=900, dark=dark)  # fmt: skip


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
    svg = (folder / "run.svg").read_text(encoding="utf-8").split("?>", 1)[-1]
    svg = svg.replace("<svg ", '<svg style="width:100%;height:auto" ', 1)
    for dark in (False, True):
        body = (
            '<div style="display:flex;gap:16px;align-items:center"><div style="width:520px">'
            f'{panel_html(view)}</div><div style="width:460px">{svg}</div></div>'
        )
        shot(f"run-{'dark' if dark else 'light'}", body, width=1030, height=620, dark=dark)
    samples = [f"step {record['step']}: {record['sample']!r}" for record in records if "sample" in record]
    of_text("text_generation", "\n\n".join(samples))


def sft(folder: Path) -> None:
    """One held-out conversation before and after."""
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
    question, expected, earlier = before[0]
    said = f"question: {question}\nexpected: {expected}\n\nbefore:   {earlier[:160]!r}\nafter:    {after[0][2]}"
    of_text("sft", said)


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
    task.figure(result.load(task.network(), "best"), folder / "predictions.png", count=3)
    write("camouflage_segmentation", Image.open(folder / "predictions.png"), 700)


def check_gpus(folder: Path) -> None:
    """The report of a check."""
    from kaggle_mgpu import check

    of_text("check_gpus", str(check.run(folder)).replace(f"{RUNS}{os.sep}", "").replace(str(RUNS), "the folder"))


DRAWN: dict[str, Callable[[Path], Any]] = {
    each.__name__: each
    for each in (text_generation, sft, activity_recognition, surface_segmentation, camouflage_segmentation, check_gpus)
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
