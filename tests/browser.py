"""A page as a real browser lays it out: Debian's Chromium, headless, where there is one.

measured = measure(page, width=320, dark=True)      # what JavaScript in the page found out
screenshot(page, "panel.png")
python tests/browser.py page.html panel.png [WIDTH] [HEIGHT] [dark]
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --disable-dev-shm-usage --virtual-time-budget=2000"
).split()

# Every panel: its text by label, its colours, and what sticks out of it; errors of the page.
MEASURE = """<script>
const errors = [];
addEventListener("error", event => { if (event.message) errors.push(event.message) });
addEventListener("load", () => {
  const panels = [...document.querySelectorAll(".kaggle-mgpu")].map(panel => {
    const outer = panel.getBoundingClientRect(), style = getComputedStyle(panel), values = {};
    const out = [...panel.querySelectorAll("*")].filter(element => {
      const box = element.getBoundingClientRect();
      return box.right > outer.right + 1 || box.left < outer.left - 1 ||
        (element.scrollWidth > element.clientWidth + 1 && element.clientWidth > 0);
    }).map(element => element.outerHTML.slice(0, 200));
    for (const tile of panel.querySelectorAll("[style*=grid] > div"))
      values[tile.children[0].textContent] = tile.children[1].textContent;
    return { values, text: panel.innerText, out, width: outer.width, height: outer.height, ink: style.color,
      paper: style.backgroundColor, lines: panel.querySelectorAll("polyline").length,
      page: document.documentElement.clientWidth, right: outer.right };
  });
  const found = document.createElement("pre");
  found.id = "measured";
  found.textContent = JSON.stringify({ panels, errors });
  document.body.append(found);
});
</script>"""


def page(body: str) -> str:
    """A page that follows the system's light or dark, with nothing else in it."""
    return f'<!doctype html><meta charset="utf-8"><style>:root{{color-scheme:light dark}}</style><body>{body}</body>'


def _run(text: str, *flags: str, width: int, height: int, dark: bool) -> str:
    assert PROGRAM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        (Path(folder) / "page.html").write_text(text, encoding="utf-8")
        scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
        profile = f"--user-data-dir={folder}/profile"
        nowhere = "--host-resolver-rules=MAP * ~NOTFOUND"  # what a page wants from elsewhere fails at once
        command = [PROGRAM, *FLAGS, scheme, profile, nowhere, f"--window-size={width},{height}", *flags]
        done = subprocess.run(
            [*command, f"file://{folder}/page.html"], capture_output=True, text=True, timeout=600, check=True
        )
    return done.stdout


def measure(text: str, *, width: int = 900, dark: bool = False) -> dict[str, Any]:
    """{"panels": […], "errors": […]} of a page: see MEASURE. A window is never narrower than 500: a frame can be."""
    if width < 500:
        text = page(f'<div style="width:{width}px;border:0">{text}</div>')
    place = re.search("<head[^>]*>", text)
    text = MEASURE + text if place is None else text[: place.end()] + MEASURE + text[place.end() :]
    dom = _run(text, "--dump-dom", width=max(width, 500), height=900, dark=dark)
    found = re.search('<pre id="measured">(.*?)</pre>', dom, re.DOTALL)
    assert found is not None, f"the page's script did not run: {dom[:500]}"
    measured: dict[str, Any] = json.loads(html.unescape(found[1]))
    return measured


def screenshot(text: str, path: str | Path, *, width: int = 900, height: int = 700, dark: bool = False) -> None:
    _run(text, f"--screenshot={Path(path).resolve()}", width=width, height=height, dark=dark)


def contrast(one: str, other: str) -> float:
    """The contrast of two colours as getComputedStyle gives them, 1 to 21 (WCAG 2.1, relative luminance)."""

    def luminance(colour: str) -> float:
        channels = [float(value) / 255 for value in re.findall(r"[\d.]+", colour)[:3]]
        linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


if __name__ == "__main__":
    source, target, *rest = sys.argv[1:]
    sizes = [int(word) for word in rest if word.isdecimal()]
    width, height = [*sizes, 900, 700][:2] if len(sizes) != 1 else (sizes[0], 700)
    screenshot(Path(source).read_text(encoding="utf-8"), target, width=width, height=height, dark="dark" in rest)
