"""The camouflage recipe: measures against PySODMetrics', files and their faults, the model's promises, stages."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from kaggle_mgpu import data as kit_data
from kaggle_mgpu import optim, progress, session
from kaggle_mgpu.__main__ import main
from kaggle_mgpu.checkpoints import read_tensors
from kaggle_mgpu.errors import CheckpointError
from kaggle_mgpu.launching import launch
from kaggle_mgpu.progress.records import comparable
from kaggle_mgpu.recipes.camouflage_segmentation import (
    PRESETS,
    CamouflageSegmentation,
    Config,
    baselines,
    data,
    metrics,
    model,
    run,
    segmentation,
    staged,
    stages,
)
from kaggle_mgpu.training import clock, saving, train
from kaggle_mgpu.training import loop as trainer
from pause_at import PauseAt
from runs import Clock, by

HERE = Path(__file__).parents[1]
ROOT = HERE.parent


def module_from(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference = module_from(HERE / "reference" / "sod_reference.py")
EXPECTED = json.loads((HERE / "reference" / "sod_reference.json").read_text())


@pytest.fixture(autouse=True)
def _no_inputs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KAGGLE_MGPU_KAGGLE_ROOT", str(tmp_path / "kaggle"))


TINY = {
    "scenes": 8, "val_scenes": 3, "image_size": 32, "width": 4, "decoder_width": 4, "num_experts": 2,
    "global_batch_size": 4, "max_steps": 2, "unfreeze_parts": 2, "log_every": 1, "data_workers": 0,
}  # fmt: skip


def tiny(tmp_path: Path, **changes: Any) -> Config:
    return Config.from_dict({**TINY, "output_dir": str(tmp_path / "run"), **changes})


def found(config: Config) -> data.Found:
    return segmentation.find(config)


def weights(folder: Path | str) -> bytes:
    return Path(folder, "model.safetensors").read_bytes()


# The measures
@pytest.mark.parametrize("name", EXPECTED)
def test_measures_are_pysodmetrics(name: str) -> None:
    prediction, mask = reference.cases()[name]
    got = metrics.measure(prediction, mask)
    assert set(got) == set(EXPECTED[name])
    for key, value in EXPECTED[name].items():
        if value is None:  # it divides 0 by 0 where the object's centre lies in the last row or column
            assert 0 <= got[key] <= 1
            assert name in ("one pixel in the corner", "one row")
        else:
            assert np.abs(np.asarray(got[key]) - np.asarray(value)).max() < 1e-12, key


def test_a_bool_mask_is_the_same_and_slips_are_refused() -> None:
    prediction, mask = reference.cases()["soft"]
    assert metrics.measure(prediction, mask > 128)["s_measure"] == metrics.measure(prediction, mask)["s_measure"]
    with pytest.raises(ValueError, match=r"uint8 prediction of the mask's size \(37, 53\), got uint8 of \(36, 53\)"):
        metrics.measure(prediction[1:], mask)
    with pytest.raises(ValueError, match="got float64"):
        metrics.measure(prediction / 255, mask)


def test_the_maximum_is_that_of_the_averaged_curve() -> None:
    curves = np.array([[1.0, 0.0, 0.5], [0.0, 0.8, 0.5]])
    assert metrics.report({"mae": torch.tensor(0.25), "e_curve": curves.mean(0)}) == {
        "mae": 0.25, "e_mean": pytest.approx(1.4 / 3), "e_max": 0.5,
    }  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 13), st.integers(1, 13), st.floats(0.01, 0.9), st.integers(0, 10**6))
def test_nearest_is_exact_with_scipys_choice_among_equals(height: int, width: int, share: float, seed: int) -> None:
    truth = np.random.default_rng(seed).random((height, width)) < share
    truth[seed % height, seed % width] = True
    squared, rows, columns = metrics.nearest(truth)
    points = sorted(map(tuple, np.argwhere(truth)[:, ::-1].tolist()))  # by column, then row
    for y in range(height):
        for x in range(width):
            distances = [(px - x) ** 2 + (py - y) ** 2 for px, py in points]
            best = distances.index(min(distances))
            assert (squared[y, x], columns[y, x], rows[y, x]) == (distances[best], *points[best])


def test_nearest_needs_a_pixel() -> None:
    with pytest.raises(ValueError, match="at least one True pixel"):
        metrics.nearest(np.zeros((3, 3), bool))


# Files
def save(path: Path, array: Any, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path, **options)
    return path


def pair(folder: Path, names: tuple[str, str], stem: str, size: tuple[int, int] = (40, 30)) -> None:
    mask = np.zeros((size[1], size[0]))
    mask[5:20, 8:30] = 255
    noise = np.random.default_rng(len(stem)).integers(0, 256, (size[1], size[0], 3))
    save(folder / names[0] / f"{stem}.jpg", noise)
    save(folder / names[1] / f"{stem}.png", mask)


def cod10k(root: Path, train: int = 4, test: int = 2) -> Path:
    for split, count in (("Train", train), ("Test", test)):
        for i in range(count):
            pair(root / split, ("Image", "GT_Object"), f"COD10K-CAM-{split}-{i}", (40 + i, 30))
        pair(root / split, ("Image", "GT_Object"), f"COD10K-NonCAM-{split}-0")
        (root / split / "GT_Object" / f"COD10K-NonCAM-{split}-0.png").unlink()
    return root


def names_of(source: data.Source | None) -> list[str]:
    return [] if source is None else [source.name(i) for i in range(len(source))]


def prepare(path: Path | None, **options: Any) -> data.Found:
    return data.prepare(None if path is None else str(path), **{"scenes": 5, "val_scenes": 2, **options})


def test_cod10k_as_published_without_the_images_that_hide_nothing(tmp_path: Path) -> None:
    got = prepare(cod10k(tmp_path / "COD10K-v3"))
    assert names_of(got.train) == [f"COD10K-CAM-Train-{i}" for i in range(4)]
    assert names_of(got.val) == ["COD10K-CAM-Test-0", "COD10K-CAM-Test-1"]
    assert not got.drawn
    assert prepare(tmp_path).digest == got.digest  # found from the folder above, and the same data


def test_the_other_archives_and_their_test_sets(tmp_path: Path) -> None:
    for i in range(3):
        pair(tmp_path / "TrainDataset", ("Imgs", "GT"), f"a{i}")
    for name in ("CAMO", "COD10K"):
        pair(tmp_path / "TestDataset" / name, ("Imgs", "GT"), name)
    assert names_of(prepare(tmp_path).val) == ["COD10K"]
    assert names_of(prepare(tmp_path, test_set="CAMO").val) == ["CAMO"]
    with pytest.raises(FileNotFoundError, match=r"test_set: no 'NC4K' .* in .*TestDataset; it has \['CAMO', 'COD"):
        prepare(tmp_path, test_set="NC4K")
    with pytest.raises(FileNotFoundError, match=r"test_set: no 'NC4K' in .*Test, which is a single test set"):
        prepare(cod10k(tmp_path / "cod"), test_set="NC4K")


def test_without_a_test_folder_images_are_held_out_by_name(tmp_path: Path) -> None:
    for i in range(30):
        pair(tmp_path, ("Imgs", "GT"), f"image{i}")
    got = prepare(tmp_path, val_fraction=0.3)
    assert "no test folder, so 0.3 of the images are held out" in got.reason
    train, val = set(names_of(got.train)), set(names_of(got.val))
    assert len(train | val) == 30 and not train & val and 3 <= len(val) <= 15
    pair(tmp_path, ("Imgs", "GT"), "another")
    assert set(names_of(prepare(tmp_path, val_fraction=0.3).val)) - {"another"} == val
    assert len(names_of(prepare(tmp_path, val_fraction=0.001).val)) == 1


def test_capitals_what_macos_leaves_and_transparent_masks_do_no_harm(tmp_path: Path) -> None:
    root = cod10k(tmp_path)
    first = prepare(root)
    for folder in ("Image", "GT_Object"):
        (root / "Train" / folder / "._COD10K-CAM-Train-0.png").write_bytes(b"\0\5\x16\7")
    path = root / "Train/GT_Object/COD10K-CAM-Train-0.png"
    mask = np.asarray(Image.open(path))
    save(path, np.stack([np.full_like(mask, 255)] * 3 + [mask], -1))
    path = path.rename(path.with_suffix(".PNG"))
    got = prepare(root)
    assert names_of(got.train) == names_of(first.train)
    assert (np.asarray(got.train.load(0)[1]) == mask).all()
    save(path, np.stack([mask] * 3, -1))
    assert (np.asarray(prepare(root).train.load(0)[1]) == mask).all()


def test_the_inputs_are_searched_and_else_scenes_are_drawn(tmp_path: Path) -> None:
    got = prepare(None)
    assert got.drawn and "synthetic" in got.where and "no data_path" in got.reason
    root = cod10k(tmp_path / "kaggle" / "input" / "datasets" / "someone" / "cod" / "COD10K-v3")
    (tmp_path / "kaggle" / "input" / "another" / "images").mkdir(parents=True)
    got = prepare(None)
    assert got.where == str(root) and "found among the inputs by the folder Train/GT_Object" in got.reason


def break_size(root: Path) -> str:
    path = save(root / "Train/GT_Object/COD10K-CAM-Train-1.png", np.zeros((30, 40)))
    return f"{path}: expected a mask of .*COD10K-CAM-Train-1.jpg's size 41 x 30, got 40 x 30"


def break_labels(root: Path) -> str:
    path = save(root / "Test/GT_Object/COD10K-CAM-Test-1.png", np.eye(30, 41))
    return rf"{path}: expected a mask of 0 \(background\) and 255 .* from 0 to 1, 2.4% of the pixels neither"


def break_grey(root: Path) -> str:
    path = save(root / "Train/GT_Object/COD10K-CAM-Train-0.png", np.arange(1200).reshape(30, 40) % 256)
    return rf"{path}: .* at most 5% of the pixels between .* got values from 0 to 255, 99\.\d% of the"


def break_colour(root: Path) -> str:
    path = root / "Train/GT_Object/COD10K-CAM-Train-0.png"
    mask = np.asarray(Image.open(path))
    save(path, np.stack([0 * mask, 0 * mask, mask // 100], -1))
    return f"{path}: converted to 8-bit grey, this mask is all 0, but its own values differ; expected 0 and 255"


def break_image(root: Path) -> str:
    path = root / "Train/Image/COD10K-CAM-Train-2.jpg"
    path.write_bytes(b"not an image")
    return f"{path}: cannot be read as an image: cannot identify"


def break_mask(root: Path) -> str:
    path = root / "Train/GT_Object/COD10K-CAM-Train-2.png"
    path.write_bytes(path.read_bytes()[:60])
    return f"{path}: cannot be read as an image"


def remove_mask(root: Path) -> str:
    path = root / "Train/GT_Object/COD10K-CAM-Train-3.png"
    path.unlink()
    return f"Train/Image/COD10K-CAM-Train-3.jpg: no mask for this image, expected {path}"


def remove_folder(root: Path) -> str:
    (root / "Test/Image").rename(root / "Test/Pictures")
    return f"missing folder of images: {root / 'Test/Image'}, for the masks in .*GT_Object"


@pytest.mark.parametrize(
    "fault", [break_size, break_labels, break_grey, break_colour, break_image, break_mask, remove_mask, remove_folder]
)
def test_what_is_wrong_is_named_with_its_path_before_training(tmp_path: Path, fault: Any) -> None:
    message = fault(cod10k(tmp_path / "data"))
    config = tiny(tmp_path, data_path=str(tmp_path / "data"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(config)
    assert not (tmp_path / "run" / "stage1").exists()


def test_folders_that_are_not_there_or_hold_something_else(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data_path: no such folder: .*nowhere"):
        prepare(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"expected the folders Train/Image and .* this folder holds nothing"):
        prepare(tmp_path / "empty")
    (tmp_path / "empty" / "Readme").mkdir()
    with pytest.raises(FileNotFoundError, match=r"in .*empty; this folder holds Readme"):
        prepare(tmp_path / "empty")
    (tmp_path / "Train" / "GT_Object").mkdir(parents=True)
    (tmp_path / "Train" / "Image").mkdir()
    with pytest.raises(ValueError, match="0 images to train on and 0 to hold out; expected both"):
        prepare(tmp_path)


def test_many_faults_are_listed_up_to_five_and_soft_edges_are_none(tmp_path: Path) -> None:
    root = cod10k(tmp_path, train=7)
    soft = np.zeros((30, 40))
    soft[5:25, 5:25], soft[5, 5:25] = 255, 100
    save(root / "Train/GT_Object/COD10K-CAM-Train-0.png", soft)
    prepare(root)
    for path in (root / "Train" / "Image").glob("COD10K-CAM*"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"(?s)(.*cannot be read.*\n){5}\(and 2 more\)"):
        prepare(root)


def test_an_image_that_is_torn_is_named_before_training_and_when_it_is_needed(tmp_path: Path) -> None:
    root = cod10k(tmp_path)
    path = root / "Train/Image/COD10K-CAM-Train-0.jpg"
    source = prepare(root).train
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(ValueError, match=rf"{path}: cannot be read as an image: image file is truncated"):
        prepare(root)
    with pytest.raises(ValueError, match=rf"{path}: cannot be read as an image: image file is truncated"):
        source.load(0)


def test_samples_of_files(tmp_path: Path) -> None:
    got = prepare(cod10k(tmp_path))
    assert got.val is not None
    sample = data.Samples(got.val, 64, augment=False)[1]
    assert sample["image"].shape == (3, 64, 64) and sample["image"].dtype == torch.uint8
    assert sample["mask"].shape == (30, 41) and sample["mask"].unique().tolist() == [0, 255]
    sample = data.Samples(got.train, 64, augment=True)[1]
    assert sample["image"].shape == (3, 64, 64) and sample["mask"].shape == (64, 64)


# Augmentation and scenes
def test_an_augmented_sample_is_a_function_of_its_seed_and_its_mask_moves_with_it() -> None:
    mask = np.zeros((50, 70), np.uint8)
    mask[10:30, 40:60] = 255
    image = np.stack([mask, 255 - mask, mask], 2)
    moved = set()
    for seed in range(6):
        pairs = []
        for _ in range(2):
            torch.manual_seed(seed)
            pairs.append(data.augmented(Image.fromarray(image), Image.fromarray(mask), 64))
        assert [part.tobytes() for part in pairs[0]] == [part.tobytes() for part in pairs[1]]
        coloured, where = (np.asarray(part).astype(int) for part in pairs[0])
        assert (np.corrcoef((coloured[..., 0] - coloured[..., 1]).ravel(), where.ravel())[0, 1]) > 0.98
        moved.add(where.tobytes())
    assert len(moved) == 6


def test_a_rotated_image_keeps_its_mask_and_rotation_off_draws_nothing() -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[20:30, 34:54] = 255
    image = Image.fromarray(np.stack([mask, 255 - mask, mask], 2))
    turned = []
    for rotation in (0.0, 90.0):
        torch.manual_seed(3)
        coloured, where = (
            np.asarray(x).astype(int) for x in data.augmented(image, Image.fromarray(mask), 64, rotation)
        )
        inside = where.ravel() > 127
        assert inside.sum() > 100
        difference = (coloured[..., 0] - coloured[..., 1]).ravel()
        assert difference[inside].min() > 0 > difference[~inside].max() - 200
        turned.append(where)
    torch.manual_seed(3)
    plain = np.asarray(data.augmented(image, Image.fromarray(mask), 64)[1])
    assert (plain == turned[0]).all() and (turned[0] != turned[1]).any()


def test_the_loss_of_several_scales_is_the_mean_of_each_however_the_batch_is_split(tmp_path: Path) -> None:
    config = tiny(tmp_path, train_scales=(0.5, 1.0, 1.5), image_size=64).settled(drawn=True)
    task = CamouflageSegmentation(config)
    torch.manual_seed(0)
    model = task.network(task.config).double()
    batch = task.collate([task.train_data()[i] for i in range(4)])
    whole = task.loss(model, batch)
    each = [
        CamouflageSegmentation(config.replace(train_scales=(scale,))).loss(model, batch)
        for scale in config.train_scales
    ]
    assert whole.item() == pytest.approx(sum(each).item() / 3, rel=1e-6)
    assert len({round(value.item(), 3) for value in each}) == 3
    parts = [task.loss(model, {name: value[i : i + 1] for name, value in batch.items()}) for i in range(4)]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"train_scales": ()}, r"train_scales: expected numbers from 0.25 to 4, got \(\)"),
        ({"train_scales": (1.0, 0.1)}, "train_scales: expected numbers from 0.25 to 4"),
        ({"train_scales": (0.75, 1.0), "backbone": "swin_tiny_patch4_window7_224"}, "is made for one image size"),
        ({"rotation": -1}, "rotation: expected 0 or more, got -1"),
    ],
)
def test_scales_and_rotations_that_cannot_be_are_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Config(**changes)


def test_a_batch_pads_masks_and_remembers_their_sizes() -> None:
    sizes = ((5, 9), (7, 3))
    samples = [
        {"image": torch.full((3, 4, 4), i, dtype=torch.uint8), "mask": torch.ones(s, dtype=torch.uint8)}
        for i, s in enumerate(sizes)
    ]
    batch = data.collate(samples)
    assert batch["mask"].shape == (2, 7, 9) and batch["mask"].sum((1, 2)).tolist() == [45, 21]
    assert batch["size"].tolist() == [list(size) for size in sizes]
    assert kit_data.samples_in(batch) == 2


def test_scenes_are_the_same_for_the_same_number_and_no_brightness_gives_the_object_away() -> None:
    image, mask = data.scene.__wrapped__(7)
    again, _ = data.scene.__wrapped__(7)
    assert np.array_equal(image, again) and not np.array_equal(image, data.scene(8)[0])
    assert set(np.unique(mask)) == {0, 255}
    apart = []
    for number in range(40):
        image, mask = data.scene(number)
        assert 0.02 < (mask > 0).mean() < 0.5
        grey = image.mean(2)
        apart.append((grey[mask > 0].mean() - grey[mask == 0].mean()) / grey.std())
    assert abs(np.mean(apart)) < 0.1 and np.std(apart) < 0.4


def test_held_out_scenes_are_others() -> None:
    got = prepare(None)
    assert got.val is not None
    assert not {got.train.load(i)[0].tobytes() for i in range(5)} & {got.val.load(i)[0].tobytes() for i in range(2)}


# The model
def network(**changes: Any) -> model.Segmenter:
    torch.manual_seed(0)
    values = {"width": 8, "num_experts": 3, **changes}
    return model.Segmenter(model.Compact(8, (1, 1, 1, 1)), **values)


def batch_of(n: int, size: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = [data.scene(i) for i in range(n)]
    images = torch.stack([torch.from_numpy(i[:size, :size].copy()).permute(2, 0, 1) for i, _ in pairs])
    return images, torch.stack([torch.from_numpy(m[None, :size, :size].copy()) for _, m in pairs]).float() / 255


@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_the_gradient_does_not_depend_on_the_split_and_reaches_every_parameter(top_k: int | None) -> None:
    images, masks = batch_of(4)
    gradients = []
    for cuts in ([4], [1, 3], [1, 1, 1, 1]):
        net = network(top_k=top_k).double()
        for image, mask in zip(images.split(cuts), masks.double().split(cuts), strict=True):
            model.loss_terms(net(image), mask, balance_weight=0.5).sum().backward()
        missing = [name for name, p in net.named_parameters() if p.grad is None]
        assert not missing
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
    for other in gradients[1:]:
        # losses are computed in fp32
        assert (other - gradients[0]).abs().max() < 1e-5 * gradients[0].abs().max()


def test_outputs_and_their_sizes() -> None:
    output = network()(batch_of(2, 96)[0])
    assert [tuple(logits.shape) for logits in output.logits] == [(2, 1, s, s) for s in (3, 6, 12, 24)]
    assert output.boundary.shape == (2, 1, 24, 24) and output.balance.shape == (2,)


def test_balance_is_one_for_even_use_and_the_number_of_experts_for_one_alone() -> None:
    even = torch.full((2, 4, 5, 5), 0.25)
    assert model.balance(even, None).tolist() == [1.0, 1.0]
    one = torch.zeros(2, 4, 5, 5)
    one[0, 2] = 1
    one[1] = 0.25
    for top_k in (None, 1):
        assert model.balance(one, top_k)[0] == 4  # and the other image's has no part in it
    shares = torch.rand(3, 4, 5, 5).softmax(1)
    assert torch.allclose(model.balance(shares, 2)[1:2], model.balance(shares[1:2], 2))


def test_top_k_uses_as_many_experts_and_the_mixture_is_what_it_says() -> None:
    torch.manual_seed(0)
    mixture = model.Experts(6, 4, top_k=2)
    x = torch.randn(1, 6, 5, 5)
    out, _ = mixture(x)
    y = mixture.norm(x)
    shares = mixture.router(y).softmax(1)
    by_hand = x.clone()
    for row in range(5):
        for column in range(5):
            here = shares[0, :, row, column]
            for index in here.topk(2).indices.tolist():
                gate = here[index] / here.topk(2).values.sum()
                by_hand[0, :, row, column] += gate * mixture.experts[index](y)[0, :, row, column]
    assert torch.allclose(out, by_hand, atol=1e-5)


def test_structure_loss_is_f3nets_formula_for_each_image() -> None:
    torch.manual_seed(0)
    logits, target = 3 * torch.randn(2, 1, 352, 360), torch.zeros(2, 1, 352, 360)
    target[0, 0, 100:180, 90:200] = target[1, 0, 300:] = 1
    w = 1 + 5 * (nn.functional.avg_pool2d(target, 31, 1, 15) - target).abs()
    p = logits.sigmoid()
    bce = -(target * p.log() + (1 - target) * (1 - p).log())
    bce = (w * bce).sum((1, 2, 3)) / w.sum((1, 2, 3))
    inter, union = (p * target * w).sum((1, 2, 3)), ((p + target) * w).sum((1, 2, 3))
    expected = bce + 1 - (inter + 1) / (union - inter + 1)
    assert torch.allclose(model.structure_loss(logits, target), expected, rtol=1e-4)


def test_losses_are_finite_in_half_precision() -> None:
    images, masks = batch_of(1, 96)
    with torch.autocast("cpu", torch.float16):
        output = network()(images)
    huge = model.Output([100 * logits.half() for logits in output.logits], output.boundary.half(), output.balance)
    for given_ in (output, huge):
        loss = model.loss_terms(given_, masks, balance_weight=0.01)
        assert loss.dtype == torch.float32 and loss.isfinite().all()


def test_the_boundary_is_both_sides_of_the_edge() -> None:
    target = torch.zeros(1, 1, 7, 7)
    target[..., 2:5, 2:5] = 1
    edge = model.boundary_of(target)[0, 0]
    assert edge[1, 1] == edge[2, 2] == edge[2, 3] == 1
    assert edge[3, 3] == edge[0, 0] == 0
    assert edge.sum() == 24


def test_gradient_checkpointing_changes_nothing_but_memory() -> None:
    images, masks = batch_of(2)
    gradients = []
    for on in (False, True):
        net = network()
        if on:
            net.gradient_checkpointing_enable()
        model.loss_terms(net.train()(images), masks, balance_weight=0.01).sum().backward()
        gradients.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_unfreezing_goes_from_the_top() -> None:
    net = network()
    parts = model.blocks(net.backbone)
    assert len(parts) == 4
    for share, free in ((0.0, 0), (1 / 3, 2), (0.5, 2), (1.0, 4)):
        net.unfreeze(share)
        assert [all(p.requires_grad for p in part.parameters()) for part in parts] == [False] * (4 - free) + [
            True
        ] * free
        assert all(p.requires_grad for p in net.decoder.parameters())


def test_what_a_model_costs_is_counted(tmp_path: Path) -> None:
    net = network().to("meta")
    parameters, flops, kept = model.cost(net, 64)
    assert parameters == sum(p.numel() for p in net.parameters())
    assert model.cost(net, 128)[1] == pytest.approx(4 * flops, rel=0.01)
    assert model.cost(net, 128)[2] == pytest.approx(4 * kept, rel=0.1)


# timm's backbones
class FakeInfo:
    def __init__(self, strides: list[int]) -> None:
        self.strides = strides

    def reduction(self) -> list[int]:
        return self.strides

    def channels(self) -> list[int]:
        return [stride + 2 for stride in self.strides]


class FakeFeatures(nn.ModuleDict):
    """Laid out like timm's FeatureListNet; level 1 gives its channels last."""

    def __init__(self, strides: list[int]) -> None:
        super().__init__()
        self.feature_info = FakeInfo(strides)
        channels = [3, *self.feature_info.channels()]
        for i, (a, b) in enumerate(itertools.pairwise(channels)):
            factor = strides[i] // ([1, *strides][i])
            self[f"stages_{i}"] = nn.Sequential(nn.Conv2d(a, b, factor, factor), nn.BatchNorm2d(b))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        features = []
        for part in self.values():
            x = part(x)
            features.append(x)
        features[1] = features[1].permute(0, 2, 3, 1)
        return features


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("timm")
    module.calls = []  # type: ignore[attr-defined]

    def create_model(name: str, **options: Any) -> nn.Module:
        module.calls.append((name, options))  # type: ignore[attr-defined]
        if name == "unknown":
            raise RuntimeError("Unknown model (unknown)")
        if name == "hiera_fixed" and options["pretrained"]:
            raise RuntimeError(
                "Error(s) in loading state_dict for Hiera:\n\tsize mismatch for pos_embed: [1, 3136, 96]."
            )
        made = FakeFeatures([2, 4, 8] if name == "shallow" else [2, 4, 8, 16, 32])
        if options["pretrained"] and name != "misfit":  # timm's own way: what fits by name, without a word of the rest
            for number, (key, tensor) in enumerate(made.state_dict().items()):
                if name != "partly" or "stages_4" not in key:
                    tensor.fill_(0.01 * number)
        made.pretrained_cfg = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.1)}  # type: ignore[assignment]
        return made

    module.create_model = create_model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", module)
    return module


def test_any_timm_backbone_by_name(timm: Any, tmp_path: Path) -> None:
    body = model.backbone("edgenext_base", width=1)
    assert timm.calls == [("edgenext_base", {"features_only": True, "pretrained": False})]
    assert body.channels == [6, 10, 18, 34]
    net = model.Segmenter(body, width=8, num_experts=2)
    assert len(model.blocks(net.backbone)) == 5
    images, masks = batch_of(2)
    model.loss_terms(net.train()(images), masks, balance_weight=0.01).sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    model.backbone("x", width=1, weights="w.safetensors")
    # once with the weights, and once without: to see which tensors got values from the file
    assert timm.calls[-2][1]["pretrained_cfg_overlay"] == {"file": "w.safetensors"}
    assert [options["pretrained"] for _, options in timm.calls[-2:]] == [True, False]
    model.backbone("x", width=1, weights="download")
    assert timm.calls[-2][1] == {"features_only": True, "pretrained": True}


def test_a_pickle_of_weights_is_read_as_weights_alone(timm: Any, tmp_path: Path) -> None:
    tensor = torch.arange(3.0)
    torch.save({"model": {"module.a": tensor, "n": 1}, "epoch": 3}, tmp_path / "w.pth")
    model.backbone("x", width=1, weights=str(tmp_path / "w.pth"))
    overlay = timm.calls[-2][1]["pretrained_cfg_overlay"]
    assert overlay.keys() == {"state_dict"} and overlay["state_dict"].keys() == {"a"}
    assert torch.equal(overlay["state_dict"]["a"], tensor)
    torch.save({"model": Path("code")}, tmp_path / "w.bin")
    with pytest.raises(ValueError, match=r"w.bin: cannot be read as plain tensors: .* Give a .safetensors file"):
        model.backbone("x", width=1, weights=str(tmp_path / "w.bin"))


def test_a_timm_backbones_batchnorm_does_not_depend_on_the_batch(timm: Any) -> None:
    net = model.Segmenter(model.backbone("x", width=1), width=8, num_experts=2).train()
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    images, _ = batch_of(3)
    together = net(images).logits[-1]
    assert torch.allclose(together[1:2], net(images[1:2]).logits[-1], atol=1e-6)
    assert all(torch.equal(before[name], buffer) for name, buffer in net.named_buffers())


def test_stages_with_a_timm_backbone(timm: Any, tmp_path: Path) -> None:
    config = tiny(tmp_path, backbone="x", backbone_weights="download", partial_epochs=0, max_steps=1)
    assert "balanced *" in CamouflageSegmentation(config).describe()
    timm.calls.clear()
    assert run(config).finished
    # pretrained weights are asked for once: stage 2 begins with stage 1's
    # `describe` has counted what each preset costs, which is not counted again
    assert [options["pretrained"] for _, options in timm.calls] == [True, False, False]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["backbone_weights"] == "timm's own, downloaded"
    one, two = (read_tensors(tmp_path / "run" / name / "model.safetensors") for name in ("stage1", "stage2"))
    statistics = {name for name in one if name.endswith(("running_mean", "running_var"))}
    changed = {name for name in one if name.startswith("backbone") and not torch.equal(one[name], two[name])}
    assert statistics and changed and not statistics & changed


def test_backbones_made_for_one_size_are_told_it_and_others_are_not(timm: Any) -> None:
    for name, told in {
        "gcvit_tiny": True,
        "coat_lite_tiny": True,
        "hiera_tiny_224": True,
        "hieradet_small": False,
    }.items():
        model.backbone(name, width=1, image_size=320)
        assert timm.calls[-1][1].get("img_size") == (320 if told else None), name
    with pytest.raises(ValueError, match=r"(?s)size mismatch for pos_embed.* for another image_size than 320"):
        model.backbone("hiera_fixed", width=1, weights="w.safetensors", image_size=320)


def test_a_backbone_that_cannot_compute_the_size_is_named_before_training(
    timm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: nn.Module, x: torch.Tensor) -> None:
        raise AssertionError("Input height (32) doesn't match model (224)")

    monkeypatch.setattr(FakeFeatures, "forward", refuse)
    config = tiny(tmp_path, backbone="fixed", backbone_weights="random")
    for asked in (run, segmentation.runs):
        with pytest.raises(ValueError, match=r"backbone 'fixed' cannot compute images of 32 pixels: Input height"):
            asked(config)


def test_gradient_checkpointing_reaches_a_model_inside_timms_wrapper(timm: Any) -> None:
    body = model.backbone("x", width=1)
    asked: list[bool] = []
    inner = nn.Identity()
    inner.set_grad_checkpointing = asked.append  # type: ignore[assignment]
    body.body.model = inner  # as in FeatureGetterNet
    model.Segmenter(body, width=8, num_experts=2).gradient_checkpointing_enable()
    assert asked == [True]


def test_timm_that_is_missing_or_refuses_is_said(timm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"backbone 'unknown'.*Unknown model .* timm.list_models\(\)"):
        model.backbone("unknown", width=1)
    with pytest.raises(ValueError, match=r"expected features of strides \(4, 8, 16, 32\), got \[2, 4, 8\]"):
        model.backbone("shallow", width=1)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"`timm`: pip install timm, or use backbone='compact'"):
        model.backbone("edgenext_base", width=1)


def test_pretrained_weights_are_a_file_a_download_or_found_among_the_inputs(tmp_path: Path) -> None:
    config = Config(backbone="edgenext_base", frozen_epochs=0)
    assert segmentation.pretrained(config) is None
    path = tmp_path / "kaggle" / "input" / "weights" / "edgenext_base_usi.safetensors"
    path.parent.mkdir(parents=True)
    for suffix in (".pth", ".bin"):
        path.with_suffix(suffix).write_bytes(b"")
    assert segmentation.pretrained(config) is None
    path.write_bytes(b"")
    assert (
        segmentation.pretrained(config)
        == segmentation.pretrained(config.replace(backbone_weights=str(path)))
        == str(path)
    )
    assert segmentation.pretrained(config.replace(backbone_weights="download")) == "download"
    assert segmentation.pretrained(Config()) is None
    with pytest.raises(FileNotFoundError, match="backbone_weights: no such file: nowhere"):
        segmentation.pretrained(config.replace(backbone_weights="nowhere"))


@pytest.mark.parametrize(("name", "missing"), [("misfit", 10), ("partly", 2)])
def test_weights_that_do_not_fit_the_backbone_are_an_error_that_counts_them(timm: Any, name: str, missing: int) -> None:
    with pytest.raises(ValueError, match=rf"w.safetensors has no values for {missing} of the 10 .* tensors of {name}"):
        model.backbone(name, width=1, weights="w.safetensors")


def test_the_check_of_the_weights_leaves_the_random_numbers_that_follow_as_they_were(timm: Any) -> None:
    after = []
    for weights in (None, "w.safetensors"):
        torch.manual_seed(0)
        model.backbone("x", width=1, weights=weights)
        after.append(torch.rand(1))
    assert torch.equal(*after)


def test_a_random_backbone_is_frozen_only_where_that_is_asked_for(timm: Any, tmp_path: Path) -> None:
    config = tiny(tmp_path, backbone="edgenext_base", partial_epochs=0, max_steps=1)
    with pytest.raises(
        ValueError, match=r"no pretrained weights among the inputs .* stage 1 would freeze random weights"
    ):
        run(config)
    asked = config.replace(backbone_weights="random")
    assert "backbone: edgenext_base, weights: random" in CamouflageSegmentation(asked).describe()
    assert segmentation.pretrained(asked) is None


def test_weights_are_found_by_their_folders_name(tmp_path: Path) -> None:
    path = tmp_path / "kaggle" / "input" / "timm" / "edgenext_base.usi_in1k" / "model.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    assert segmentation.pretrained(Config(backbone="edgenext_base")) == str(path)
    assert segmentation.pretrained(Config(backbone="edgenext_base.usi_in1k")) == str(path)


def test_images_are_normalised_by_the_backbones_own_mean_and_deviation(timm: Any) -> None:
    net = model.Segmenter(model.backbone("x", width=1), width=8, num_experts=2)
    assert torch.allclose(net.mean.flatten(), 255 * torch.tensor([0.5, 0.4, 0.3]))
    assert torch.allclose(net.std.flatten(), 255 * torch.tensor([0.2, 0.2, 0.1]))
    model.backbone("swinv2_tiny_window8_256", width=1, image_size=352)
    assert timm.calls[-1][1]["img_size"] == 352


# Settings
def test_a_preset_fills_in_what_was_left_open() -> None:
    settled = Config(preset="high_resolution", width=16).settled(drawn=False)
    assert (settled.image_size, settled.width, settled.global_batch_size) == (352, 16, 24)
    assert Config(preset="fast").settled(drawn=False).global_batch_size == 48
    assert Config(preset="fast").settled(drawn=True).global_batch_size == 32
    assert Config().settled(drawn=False).image_size == 320
    assert Config(preset="fast").settled(drawn=True).image_size == data.SCENE_SIZE
    assert Config(image_size=64).settled(drawn=True).image_size == 64
    split = Config(micro_batch_size=4, gradient_accumulation_steps=3).settled(drawn=False)
    assert split.global_batch_size is None
    assert settled.settled(drawn=True) == settled
    assert {name for values in PRESETS.values() for name in values} == set(PRESETS["fast"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 100}, "image_size: expected a multiple of 32, got 100"),
        ({"width": 7}, "width: expected a multiple of 2, got 7"),
        ({"num_experts": 0}, "num_experts: expected 1 or more, got 0"),
        ({"unfreeze_parts": 0}, "unfreeze_parts: expected 1 or more, got 0"),
        ({"decoder": "large"}, r"decoder: expected small\|experts, got 'large'"),
        ({"val_fraction": 0.6}, "val_fraction: expected 0 to 0.5, got 0.6"),
        ({"routing": "topk", "top_k": 5}, "top_k: expected at most num_experts = 4, got 5"),
        ({"global_batch_size": "per_gpu:16"}, "global_batch_size: expected a number, since the stages' lengths"),
        ({"preset": "slow"}, r"preset: expected balanced\|fast\|high_resolution, got 'slow'"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.from_dict(changes)


@pytest.mark.parametrize(
    ("flag", "here"),
    [
        ("dataset-path", "data-path"),
        ("checkpoint-dir", "output-dir"),
        ("stage1-epochs", "frozen-epochs"),
        ("stage2-batch-size", "global-batch-size"),
        ("stage2-lr", "lr"),
        ("img-size", "image-size"),
        ("accumulation-steps", "gradient-accumulation-steps"),
        ("warmup-epochs", "warmup-steps"),
        ("progressive-unfreeze", "unfreeze-parts"),
        ("num-workers", "data-workers"),
        ("resume-from", "resume"),
    ],
)
def test_flags_of_other_two_stage_scripts_are_answered_by_ours(
    capsys: pytest.CaptureFixture[str], flag: str, here: str
) -> None:
    with pytest.raises(SystemExit):
        main(["train", "camouflage_segmentation", f"--{flag}", "1"])
    assert f"unrecognized arguments: --{flag} 1. Did you mean --{here}?" in capsys.readouterr().err


def test_an_earlier_runs_folder_is_gone_on_with(tmp_path: Path) -> None:
    config = tiny(tmp_path, partial_epochs=0, max_steps=2)
    first = run(config)
    copy = tmp_path / "attached"
    shutil.copytree(first.output_dir, copy)
    shutil.rmtree(copy / "stage2")
    shutil.rmtree(first.output_dir)
    again = config.replace(resume=str(copy), output_dir=str(tmp_path / "again"))
    found = segmentation.find(again)
    assert [Path(s.config.resume).parts[-3:-1] for s in stages(again, found)] == [("stage1", "checkpoints"), ()]
    second = run(again)
    assert second.finished and second.metrics == first.metrics
    starts = [r["step"] for r in second.records() if r["kind"] == "start"]
    assert starts == [0, 2, 2], "the earlier stage 1, the same with nothing left to do, and stage 2 after its steps"
    with pytest.raises(FileNotFoundError, match=r"resume: expected auto, never, or the folder of an earlier run"):
        stages(config.replace(resume=str(tmp_path / "nowhere"), output_dir=str(tmp_path / "new")), found)


def test_zero_3_is_refused_before_training(tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    file.write_text('{"zero_optimization": {"stage": 3}}')
    asked: dict[str, Any] = {"strategy": "deepspeed", "deepspeed_config": str(file), "ema_decay": None}
    with pytest.raises(ValueError, match=r"deepspeed_config: .*zero\.json asks for ZeRO stage 3, .* Use stage 2, or"):
        Config(**asked)
    file.write_text('{"zero_optimization": {"stage": 2}}')
    Config(**asked)
    Config(**{**asked, "deepspeed_config": None})


def test_the_presets_cost_is_printed(tmp_path: Path) -> None:
    config = Config(scenes=3, val_scenes=1, routing="topk", top_k=3, output_dir=str(tmp_path))
    text = CamouflageSegmentation(config).describe()
    assert "synthetic scenes" in text and "3 to train on, 1 held out" in text
    assert "stage1 2 (0%), stage2-1 1 (33%), stage2-2 1 (67%), stage2-3 30 (100%)" in text
    rows = {line.split()[0]: line.replace(" *", "").split()[1:] for line in text.splitlines()}
    assert "balanced *" in text and rows["fast"][:2] == ["96", "32"]
    for column in (2, 4, 5):  # parameters, operations, memory
        fast, balanced, high = (float(rows[name][column]) for name in ("fast", "balanced", "high_resolution"))
        assert 0 < fast < balanced < high


def test_each_stage_has_its_own_length_rate_batch_and_schedule(tmp_path: Path) -> None:
    config = Config(scenes=40, frozen_batch_size=20, frozen_lr=0.1, lr=0.2, epochs=5, output_dir=str(tmp_path))
    planned = stages(config, found(config))
    assert [(s.name, s.share, s.max_steps) for s in planned] == [
        ("stage1", 0.0, 4), ("stage2-1", 1 / 3, 3), ("stage2-2", 2 / 3, 3), ("stage2-3", 1.0, 15),
    ]  # fmt: skip
    assert [(s.config.lr, s.config.schedule, s.config.global_batch_size) for s in planned[:2]] == [
        (0.1, "constant", 20), (0.2, "cosine", 16),
    ]  # fmt: skip
    assert [s.config.eval_every for s in planned] == ["end", "end", "end", 2]
    assert len({s.config.output_dir for s in planned}) == 4
    names = [s.name for s in stages(config.replace(frozen_epochs=0, partial_epochs=0), found(config))]
    assert names == ["stage2"]
    # a warm-up that is longer than a stage is cut to it, in steps and in epochs
    for warmup, cut in ((10, [4, 3, 3, 10]), ("3 epochs", [4, 3, 3, "3 epochs"])):
        assert [s.config.warmup_steps for s in stages(config.replace(warmup_steps=warmup), found(config))] == cut


def test_the_backbones_blocks_have_rates_of_their_own() -> None:
    config = Config(lr=0.1, backbone_lr_scale=0.5, layer_decay=0.1, scenes=2, val_scenes=1)
    this = CamouflageSegmentation(config, share=0.5)
    net = this.model()
    optimizer = this.optimizer(net, this.config)
    optim.set_lr(optimizer, config.lr)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    bottom, _, below, top = model.blocks(net.backbone)
    assert {round(rates[id(p)], 9) for p in top.parameters()} == {0.05}
    assert {round(rates[id(p)], 9) for p in below.parameters()} == {0.005}
    assert not any(id(p) in rates for p in bottom.parameters())
    assert {rates[id(p)] for p in net.decoder.parameters()} == {0.1}
    assert len(rates) == sum(p.requires_grad for p in net.parameters())
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, config.weight_decay}


# Evaluation
def test_no_figure_depends_on_how_images_were_batched() -> None:
    config = Config(**{**TINY, "val_scenes": 5, "tta": True})
    this = CamouflageSegmentation(config)
    net = this.model().eval()
    samples = this.val_data()
    assert samples is not None
    totals = []
    for size in (5, 2, 1):
        parts = [
            this.metrics(net, data.collate([samples[i] for i in range(start, min(start + size, 5))]))
            for start in range(0, 5, size)
        ]
        assert sum(part["mae"][1] for part in parts) == 5
        totals.append({name: torch.stack([part[name][0] for part in parts]).sum(0) for name in parts[0]})
    for other in totals[1:]:
        assert all(torch.allclose(other[name], totals[0][name], rtol=0, atol=1e-12) for name in other)
    summary = this.summary({name: total / 5 for name, total in totals[0].items()})
    _, mask, prediction = this.predict(net, 2)
    by_hand = np.mean([metrics.measure(this.predict(net, i)[2], this.predict(net, i)[1])["iou"] for i in range(5)])
    assert prediction.shape == mask.shape and summary["iou"] == pytest.approx(float(by_hand), abs=1e-12)
    assert {"loss", "s_measure", "e_mean", "e_max", "e_adaptive", "weighted_f", "mae", "iou", "dice"} == set(summary)


def test_mirrored_images_have_a_part_in_the_prediction() -> None:
    this = CamouflageSegmentation(Config(**TINY))
    net = this.model().eval()
    image = this.val_data()[0]["image"][None]  # type: ignore[index]
    plain, _ = this.probability(net, image, (32, 32))
    mirrored, _ = this.probability(net, image.flip(3), (32, 32))
    both, _ = CamouflageSegmentation(Config(**TINY, tta=True)).probability(net, image, (32, 32))
    assert torch.allclose(both, (plain + mirrored.flip(3)) / 2, atol=1e-6)


def test_predictions_are_measured_at_each_masks_own_size(tmp_path: Path) -> None:
    config = tiny(tmp_path, data_path=str(cod10k(tmp_path / "data")))
    this = CamouflageSegmentation(config)
    net = this.model().eval()
    samples = this.val_data()
    assert samples is not None
    this.metrics(net, this.collate([samples[0], samples[1]]))
    _, mask, prediction = this.predict(net, 1)
    assert mask.shape == prediction.shape == (30, 41)
    with zipfile.ZipFile(this.write_predictions(net, tmp_path / "p.zip")) as archive:
        assert archive.namelist() == ["COD10K-CAM-Test-0.png", "COD10K-CAM-Test-1.png"]
        with archive.open("COD10K-CAM-Test-1.png") as file:
            assert np.array_equal(np.array(Image.open(file)), prediction)
    with Image.open(this.figure(net, tmp_path / "f.png")) as picture:
        assert picture.convert("RGBA").getpixel((0, 0))[3] == 0, "the ground is the page's"


def test_every_test_set_has_its_row_from_one_process_or_two(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    for i in range(4):
        pair(folder / "TrainDataset", ("Imgs", "GT"), f"a{i}")
    for name, count in (("CAMO", 3), ("COD10K", 1)):
        for i in range(count):
            pair(folder / "TestDataset" / name, ("Imgs", "GT"), f"{name}-{i}", (40 + i, 30))
    this = CamouflageSegmentation(tiny(tmp_path, data_path=str(folder)))
    net = this.model().eval()
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    one, two = (launch(segmentation.by_test_set, this, tmp_path / "w.safetensors", nproc=n) for n in (1, 2))
    assert one.keys() == two.keys() == {"CAMO", "COD10K"}
    for name, row in one.items():
        assert row == pytest.approx(two[name], abs=1e-12)
    # the set that a run holds out has the run's own measures
    samples = this.val_data()
    assert samples is not None
    sums = this.metrics(net, this.collate([samples[0]]))
    own = this.summary({key: torch.as_tensor(value / count) for key, (value, count) in sums.items()})
    assert one["COD10K"] == pytest.approx({key: value for key, value in own.items() if key != "loss"}, abs=1e-12)
    scenes = CamouflageSegmentation(tiny(tmp_path))
    assert data.test_sets(scenes.found) == {}
    assert list(data.test_sets(prepare(cod10k(tmp_path / "cod")))) == ["Test"]


def test_predictions_are_whole_or_not_there_and_equal_names_stay_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair(tmp_path / "data" / "TrainDataset", ("Imgs", "GT"), "a")
    for name in ("CAMO", "NC4K"):
        pair(tmp_path / "data" / "TestDataset" / name, ("Imgs", "GT"), "one")
    this = CamouflageSegmentation(tiny(tmp_path, data_path=str(tmp_path / "data")))
    net, path = this.model().eval(), tmp_path / "p.zip"
    path.write_bytes(b"before")
    with monkeypatch.context() as patch:
        patch.setattr(this, "predict", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            this.write_predictions(net, path)
    assert path.read_bytes() == b"before"
    with zipfile.ZipFile(this.write_predictions(net, path)) as archive:
        assert archive.namelist() == ["CAMO/one.png", "NC4K/one.png"]


def test_an_image_is_what_its_name_says_and_no_program_for_another_program(tmp_path: Path) -> None:
    root = cod10k(tmp_path)
    path = root / "Train/Image/COD10K-CAM-Train-0.jpg"
    Image.open(path).save(path, format="EPS")
    assert path.read_bytes().startswith(b"%!PS")
    with pytest.raises(ValueError, match=f"{path}: cannot be read as an image: cannot identify"):
        prepare(root)


def test_baselines_need_no_model() -> None:
    rows = baselines(CamouflageSegmentation(Config(scenes=30, val_scenes=6)))
    assert rows["nothing"]["iou"] == 0 < rows["mean mask"]["iou"] < 0.5
    assert rows["local contrast"]["iou"] < 0.5
    assert all(set(row) == set(rows["nothing"]) for row in rows.values())


def test_two_replicas_in_one_process_take_a_batch_of_masks_of_several_sizes(tmp_path: Path) -> None:
    values = {"data_path": str(cod10k(tmp_path / "data")), "max_steps": 1, "lr": 0.0}
    results = []
    for name, how in {"dp": {"strategy": "dp", "nproc": 2}, "single": {"strategy": "single"}}.items():
        config = tiny(tmp_path, **values, **how, output_dir=str(tmp_path / name)).settled(drawn=False)
        results.append(train(config, CamouflageSegmentation(config)))
    assert [result.strategy for result in results] == ["dp", "single"]
    assert results[0].metrics == pytest.approx(results[1].metrics, abs=1e-9)


def test_two_ranks_with_parts_of_the_weights_evaluate_as_one_does(tmp_path: Path) -> None:
    # five images in batches of two: the ranks' last batches have two and one
    results = []
    for name, how in {"fsdp": {"strategy": "fsdp", "nproc": 2}, "single": {"strategy": "single"}}.items():
        config = tiny(tmp_path, val_scenes=5, micro_batch_size=2, max_steps=1, lr=0.0, tta=True, ema_decay=None, **how)
        config = config.replace(output_dir=str(tmp_path / name)).settled(drawn=True)
        results.append(launch(train, config, CamouflageSegmentation(config)))
    assert [(result.strategy, result.world_size) for result in results] == [("fsdp", 2), ("single", 1)]
    assert results[0].metrics == pytest.approx(results[1].metrics, abs=1e-6)


# Stages
def test_a_run_that_died_between_stages_does_not_look_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, launched = tiny(tmp_path, partial_epochs=0), []

    def dies(function: Any, *arguments: Any) -> Any:
        left = json.loads((tmp_path / "run" / "result.json").read_text())
        launched.append((left["finished"], left["step"], left["max_steps"]))
        return launch(function, *arguments) if len(launched) == 1 else 1 / 0

    for first in (False, True):
        monkeypatch.setattr(staged, "launch", dies)
        launched.clear()
        with pytest.raises(ZeroDivisionError):
            run(config)
        assert launched == [(False, 0, 4), (False, 2, 4)]
        assert json.loads((tmp_path / "run" / "stage1" / "result.json").read_text())["finished"]
        assert not json.loads((tmp_path / "run" / "result.json").read_text())["finished"]
        monkeypatch.undo()
        if not first:
            assert run(config).finished


def test_stages_follow_one_another_and_finished_ones_return_at_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = tiny(tmp_path)
    result = run(config)
    out = tmp_path / "run"
    assert result.finished and (result.step, result.max_steps, result.samples_seen) == (6, 6, 24)
    assert json.loads((out / "result.json").read_text())["metrics"] == result.metrics
    assert weights(out) == weights(out / "stage2-2")
    steps = [(r["stage"], r["step"]) for r in result.records() if r["kind"] == "train"]
    assert steps == [(s, i + 1) for i, s in enumerate(["stage1"] * 2 + ["stage2-1"] * 2 + ["stage2-2"] * 2)]
    # frozen is frozen: stage 1 leaves the backbone as it was, the first part of stage 2 its lower half
    sets = [read_tensors(out / name / "model.safetensors") for name in ("stage1", "stage2-1", "stage2-2")]
    torch.manual_seed(config.seed)
    sets.insert(0, dict(CamouflageSegmentation(config).model().state_dict()))
    same = [
        {k.split(".")[2] for k in a if k.startswith("backbone") and torch.equal(a[k], b[k])}
        for a, b in itertools.pairwise(sets)
    ]
    assert same[0] == {"0", "1", "2", "3"} and {"0", "1"} <= same[1] and "3" not in same[1] and not same[2]
    result.load(CamouflageSegmentation(config).network(), "best")
    result.plot()
    capfd.readouterr()
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("stage*/*.jsonl")}
    again = run(config)
    assert capfd.readouterr().out.count("already finished after 2 steps") == 3
    assert again == result
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}


def test_a_stage_that_began_with_other_weights_is_not_gone_on_with(tmp_path: Path) -> None:
    config = tiny(tmp_path, max_steps=1, partial_epochs=0)
    run(config)
    with pytest.raises(CheckpointError, match=r"stage2 from [0-9a-f]{8}"):
        run(config.replace(max_steps=2))


def test_the_time_limit_is_that_of_all_stages(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(tmp_path, max_steps=100000, partial_epochs=0, eval_every="end", time_limit="3s")
    now = by(Clock(), monkeypatch, clock, session, saving, trainer, staged)
    loss = CamouflageSegmentation.loss

    def slow(*arguments: Any) -> torch.Tensor:
        now.now += 0.5
        return loss(*arguments)

    monkeypatch.setattr(CamouflageSegmentation, "loss", slow)
    result = run(config)
    assert (result.finished, result.reason) == (False, "time limit")
    assert 0 < result.step < 6 and result.max_steps == 200000
    assert result.remaining_steps == 200000 - result.step
    assert "stopped in stage1 (time limit): run the same cell or command again" in capfd.readouterr().out
    assert json.loads((tmp_path / "run" / "result.json").read_text())["finished"] is False
    assert not (tmp_path / "run" / "stage2").exists()


def test_an_earlier_output_among_the_inputs_is_gone_on_with(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = tiny(tmp_path, partial_epochs=0, output_dir=str(tmp_path / "kaggle" / "input" / "earlier" / "run"))
    before = run(config)
    capfd.readouterr()
    after = run(config.replace(output_dir=str(tmp_path / "new")))
    text = capfd.readouterr().out
    assert text.count("going on from") == 2 and "step 1/2" not in text
    assert weights(after.output_dir) == weights(before.output_dir)
    assert after.metrics == before.metrics


SCRIPT = """
import sys
from kaggle_mgpu.recipes.camouflage_segmentation import Config, run
if __name__ == "__main__":
    run(Config.load(sys.argv[1]))
"""


def test_killed_in_stage_2_it_goes_on_there_with_the_same_bits(tmp_path: Path) -> None:
    # augmentation, loader processes and averaged weights in play; two processes
    values = {**TINY, "strategy": "ddp", "nproc": 2, "max_steps": 12, "partial_epochs": 0, "save_every": 2}
    values |= {"data_workers": 1, "eval_every": 6}
    (tmp_path / "run.py").write_text(SCRIPT)

    def start(name: str, **variables: str) -> tuple[subprocess.Popen[str], Path]:
        (tmp_path / f"{name}.json").write_text(json.dumps({**values, "output_dir": str(tmp_path / name)}))
        command = [sys.executable, str(tmp_path / "run.py"), str(tmp_path / f"{name}.json")]
        with open(tmp_path / f"{name}.log", "a") as log:
            return subprocess.Popen(
                command, stdout=log, stderr=log, text=True, start_new_session=True, env={**os.environ, **variables}
            ), tmp_path / name

    undisturbed, one = start("one")
    held = PauseAt(tmp_path / "hold", "os.rename", r"/stage2/checkpoints/step-00000004$")
    process, other = start("other", **held.variables(os.environ))
    held.wait(process, tmp_path / "other.log")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    left = json.loads((other / "result.json").read_text())
    assert (left["finished"], left["step"], left["max_steps"]) == (False, 12, 24)
    seen = {p: p.stat().st_mtime_ns for p in (other / "stage1").rglob("*.*") if p.parent.name != "logs"}
    process, _ = start("other")
    assert process.wait(600) == 0, (tmp_path / "other.log").read_text()
    assert undisturbed.wait(600) == 0
    text = (tmp_path / "other.log").read_text()
    assert "already finished after 12 steps" in text and "going on from" in text
    assert seen == {p: p.stat().st_mtime_ns for p in seen}
    assert weights(one) == weights(other)
    for stage in ("stage1", "stage2"):
        a, b = (comparable(progress.read(folder / stage)) for folder in (one, other))
        assert a == b


def test_under_torchrun_two_processes_evaluate_as_one_does(tmp_path: Path) -> None:
    # a rate of 0: the same weights, so that only the evaluation can differ
    values = {**TINY, "val_scenes": 7, "max_steps": 1, "partial_epochs": 0, "lr": 0.0, "frozen_lr": 0.0}
    one = run(Config.from_dict({**values, "output_dir": str(tmp_path / "one")}))
    (tmp_path / "two.json").write_text(json.dumps({**values, "output_dir": str(tmp_path / "two")}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command += ["--nproc-per-node", "2", "-m", "kaggle_mgpu", "train", "camouflage_segmentation"]
    command += ["--config", str(tmp_path / "two.json")]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    two = json.loads((tmp_path / "two" / "result.json").read_text())
    assert two["world_size"] == 2 and two["finished"]
    assert two["metrics"] == pytest.approx(one.metrics, abs=1e-9)
    assert weights(tmp_path / "two") == weights(tmp_path / "one")


def test_it_learns(tmp_path: Path) -> None:
    config = Config(width=8, decoder_width=16, num_experts=2)
    this = CamouflageSegmentation(config)
    torch.manual_seed(0)
    net = this.model()
    batch = data.collate([this.train_data()[i] for i in range(4)])
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3)
    losses = []
    for _ in range(25):
        loss = this.loss(net, batch) / 4
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0] and math.isfinite(losses[-1])
