"""Train one model per fold of the volumes, measure each on its held-out volumes, and predict test images with all.

found = cross_validate(Config(...), folds=5)     # one fold per GPU at a time; print(found) is a table
run(found.ensemble(config))                      # submission.zip from the mean of the folds' probabilities
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from dataclasses import dataclass
from pathlib import Path

from kaggle_mgpu.checkpoints import write_text

from .._folds import configs_of, launch_folds, table
from .data import folds_of
from .postprocessing import FILE, Choice, known
from .stages import run, weights_of
from .training import Config, SurfaceSegmentation


@dataclass
class CrossValidation:
    """The models of a cross-validation; each list has one entry per fold."""

    volumes: list[tuple[str, ...]]
    """The ids of the held-out volumes."""
    figures: list[dict[str, float]]
    """Means of the scores of `metrics.measures` over the held-out volumes."""
    weights: tuple[str, ...]
    """The paths of the weights files."""
    choices: list[Choice]
    """The threshold and the smallest connected component kept, chosen on the held-out volumes."""

    def ensemble(self, config: Config) -> Config:
        """Return settings with which `run` predicts the test images from the mean probability of the folds' models.

        Nothing is held out, since each volume was training data of all models but one. Unless config gives numbers, the
        threshold is the mean of the folds' thresholds, and min_component the median of the folds' values.
        """
        cut, least = config.threshold, config.min_component
        if cut == "auto":
            cut = statistics.mean(choice.threshold for choice in self.choices)
        if least == "auto":
            least = int(statistics.median(choice.min_component for choice in self.choices))
        folder = f"{config.output_dir}/{len(self.weights)}-fold/ensemble"
        return config.replace(
            weights=self.weights, val_fraction=0, folds=None, threshold=cut, min_component=least, output_dir=folder
        )

    def __str__(self) -> str:
        scores = {name: [row[name] for row in self.figures] for name in self.figures[0]}
        return table({"volumes": [len(ids) for ids in self.volumes]}, scores)


def cross_validate(config: Config, folds: int = 5) -> CrossValidation | None:
    """Train one model per fold without the fold's volumes, one fold per GPU at a time; measure the fold's volumes.

    The returned fields are also written to output_dir/folds.json. Call this again after an interrupt or in the next
    session: finished folds return at once, the others continue.

    Args:
        config: nproc is the number of folds to train at the same time.
        folds: the number of folds; see `Config.folds`.

    Returns:
        None if some folds have not finished.

    Raises:
        ValueError: fewer than two folds, more folds than scrolls (or than volumes, if all volumes are of one scroll),
            or files named in `Config.weights`.
    """
    if config.weight_files:
        raise ValueError(
            f"weights: expected best or final, got {config.weights!r}: cross-validation trains a model for each fold. "
            f"Leave the setting weights out."
        )
    parts = folds_of(SurfaceSegmentation(config).catalogue.train, folds)
    configs = configs_of(config, [{"folds": folds, "fold": number} for number in range(folds)])
    if (values := launch_folds(_run_fold, config, configs)) is None:
        return None
    figures, weights, choices = zip(*values, strict=True)
    found = CrossValidation([tuple(v.id for v in part) for part in parts], [*figures], tuple(weights), [*choices])
    write_text(Path(config.output_dir, "folds.json"), json.dumps(dataclasses.asdict(found), indent=1))
    return found


def _run_fold(config: Config) -> tuple[dict[str, float], str, Choice] | None:
    """Train a fold's model and predict its held-out volumes; return figures, weights, choice; None if unfinished."""
    surface = SurfaceSegmentation(config)
    surface.leave_out_tests()
    result = run(config, surface)
    weights = weights_of(config, result)[0]
    files = [Path(config.output_dir, "predictions", FILE), weights.with_name(FILE)]
    choice = known(config.threshold, config.min_component, {}, files, held_out=True)
    if not result.finished or choice is None:
        return None
    figures = {name.removeprefix("volume_"): x for name, x in result.metrics.items() if name.startswith("volume_")}
    return figures, str(weights), choice
