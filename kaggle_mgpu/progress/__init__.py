"""Show a run: its records, the panel in a notebook cell, the lines of a log, and the plots.

    read(output_dir)                 # every record, as written
    attach(output_dir)               # the display again, from another notebook or after a reload
    plot(output_dir)                 # a matplotlib figure of a run; compare_plot([one, other]) compares runs

Importing the package does not import torch. Start reading at `Progress` in progress.py. records.py defines the format
of metrics.jsonl; display.py and panel.py show a run's records while it trains, and plots.py draws figures.
"""

from . import plots
from .display import attach
from .panel import View, format_count, format_duration, panel_html
from .plots import compare_plot, pixels, plot
from .progress import Progress, stop
from .records import METRICS, Record, numbers, read, texts

__all__ = [
    "METRICS",
    "Progress",
    "Record",
    "View",
    "attach",
    "compare_plot",
    "format_count",
    "format_duration",
    "numbers",
    "panel_html",
    "pixels",
    "plot",
    "plots",
    "read",
    "stop",
    "texts",
]
