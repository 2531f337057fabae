"""The surface recipe: reading, patches, model, loss, sliding window, figures, submission, real runs and kills."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kaggle_mgpu import __main__ as command_line
from kaggle_mgpu import distributed
from kaggle_mgpu.checkpoints import read_tensors
from kaggle_mgpu.checkpoints.files import replace_tensors
from kaggle_mgpu.launching import launch
from kaggle_mgpu.recipes import surface_segmentation as ss
from kaggle_mgpu.recipes.surface_segmentation import (
    Config,
    SurfaceSegmentation,
    data,
    inference,
    metrics,
    stacks,
    stages,
    synthetic,
)
from kaggle_mgpu.recipes.surface_segmentation.data import Cache, Facts, Volume
from kaggle_mgpu.recipes.surface_segmentation.model import UNet, segmentation_loss
from kaggle_mgpu.recipes.surface_segmentation.patches import Patches, Tiles, augmented
from kaggle_mgpu.training import saving, train
from pause_at import PauseAt
from surface_cases import WINDOWS, cases, predictor, volume

ROOT = Path(__file__).parents[2]
REFERENCE = json.loads((ROOT / "tests" / "reference" / "surface_reference.json").read_text())


@pytest.fixture(autouse=True)
def _no_inputs(monkeypatch, tmp_path):
    monkeypatch.setenv("KAGGLE_MGPU_KAGGLE_ROOT", str(tmp_path / "kaggle"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Volumes of 24^3 in the published layout: three to train on, scroll b's one to hold out, two to predict."""
    folder = tmp_path_factory.mktemp("made") / "scrolls"
    synthetic.synthesise(folder, size=24, train=4, test=2)
    return folder


@pytest.fixture
def scrolls(made, tmp_path):
    """A copy that may be spoilt."""
    return Path(shutil.copytree(made, tmp_path / "scrolls"))


def small(tmp_path, folder, **changes):
    values = {
        "data_path": str(folder), "cache_dir": str(tmp_path), "patch_size": 16, "width": 4, "patches_per_volume": 2,
        "global_batch_size": 4, "micro_batch_size": 2, "val_fraction": 0.3, "max_steps": 4, "data_workers": 0,
        "output_dir": str(tmp_path / "run"), "overlap": 0.25, **changes,
    }  # fmt: skip
    return Config(**values)


def prepared(config):
    task = SurfaceSegmentation(config)
    return task, task.train_data()


def stack(path, array, **options):
    pages = [Image.fromarray(page) for page in array]
    pages[0].save(path, save_all=True, append_images=pages[1:], compression=options.get("compression", "tiff_lzw"))


# Configuration
def test_config_refuses_what_cannot_work():
    with pytest.raises(ValueError, match=r"patch_size: expected 8 or more, and a multiple of 16 .* got 130"):
        Config(patch_size=130)
    with pytest.raises(ValueError, match=r"patches_per_volume: expected 1 or more, got 0"):
        Config(patches_per_volume=0)
    with pytest.raises(ValueError, match=r"overlap: expected 0 to 0.9, got 1"):
        Config(overlap=1.0)


# Finding
def test_inputs_are_searched_and_the_layout_is_read(tmp_path, made):
    inside = tmp_path / "kaggle" / "input" / "competitions" / "surface"
    shutil.copytree(made, inside)
    catalogue = data.find_volumes(None, tmp_path / "synthetic")
    assert catalogue.source == str(inside)
    assert not catalogue.synthetic
    assert [v.id for v in catalogue.train] == [f"synthetic_{i}" for i in range(4)]
    assert [v.scroll for v in catalogue.train] == ["a", "b", "a", "c"]
    assert [v.id for v in catalogue.test] == ["synthetic_4", "synthetic_5"]
    assert not (tmp_path / "synthetic").exists()
    above = data.find_volumes(str(tmp_path / "kaggle"), tmp_path / "synthetic")
    assert (above.source, above.digest) == (str(inside), catalogue.digest)


def test_capitals_and_what_macos_leaves_do_no_harm_and_two_files_of_a_name_do(tmp_path, scrolls):
    digest = data.find_volumes(str(scrolls), tmp_path).digest
    image = scrolls / "train_images" / "synthetic_0.tif"
    image.rename(image.with_suffix(".TIF"))
    for folder in ("train_images", "train_labels", "test_images"):
        (scrolls / folder / "._synthetic_0.tif").write_bytes(b"\0\5\x16\7")
    assert data.find_volumes(str(scrolls), tmp_path).digest == digest
    shutil.copy(image.with_suffix(".TIF"), image.with_suffix(".tiff"))
    with pytest.raises(ValueError, match=r"synthetic_0\.tiff: the folder also has synthetic_0\.TIF; expected one"):
        data.find_volumes(str(scrolls), tmp_path)


def test_without_data_volumes_are_made_up_and_it_is_said(tmp_path, monkeypatch):
    whole = data.synthesise
    monkeypatch.setattr(data, "synthesise", lambda folder: whole(folder, 24, 4, 1))
    task = SurfaceSegmentation(Config(cache_dir=str(tmp_path)))
    assert "SYNTHETIC" in task.describe()
    assert "3 to train on, 1 held out (whole scrolls), 1 to predict" in task.describe()
    assert "patches of 32^3" in task.describe()
    again = data.find_volumes(None, Path(task.cache.folder) / "synthetic-1")
    assert again.digest == task.catalogue.digest


def test_whatever_is_missing_is_named(tmp_path, scrolls):
    def find():
        return data.find_volumes(str(scrolls), tmp_path)

    with pytest.raises(FileNotFoundError, match=r"data_path: no such folder: .*nowhere"):
        data.find_volumes(str(tmp_path / "nowhere"), tmp_path)
    (scrolls / "test.csv").write_text("id,scroll_id\nsynthetic_4,d\nabsent,d\n")
    with pytest.raises(FileNotFoundError, match=r"test\.csv names 'absent', but there is no .*test_images/absent\.tif"):
        find()
    (scrolls / "test.csv").unlink()
    (scrolls / "train.csv").write_text("name\nsynthetic_0\n")
    with pytest.raises(ValueError, match=r"train\.csv: expected a column 'id', got name"):
        find()
    (scrolls / "train.csv").write_bytes(b"id,scroll_id\nsynthetic_0,\xe9\n")
    with pytest.raises(ValueError, match=r"train\.csv: not a readable \.csv in UTF-8: .* 0xe9"):
        find()
    (scrolls / "train.csv").unlink()
    (scrolls / "train_labels" / "synthetic_2.tif").unlink()
    with pytest.raises(FileNotFoundError, match=r"train_labels/synthetic_2\.tif: no such file, but there is the image"):
        find()
    shutil.rmtree(scrolls / "train_labels")
    with pytest.raises(FileNotFoundError, match=r"train_labels: no such folder\. Expected train_images/"):
        find()


def test_whole_scrolls_are_held_out_where_they_are_small_enough():
    volumes = [Volume(str(i), f"{i}.tif", f"{i}.tif", scroll) for i, scroll in enumerate("aaaaaaaabbcc")]
    kept, held, how = data.split(volumes, 0.17)
    assert [v.scroll for v in held] == ["b", "b"]
    assert how == "whole scrolls"
    assert not {v.id for v in kept} & {v.id for v in held}
    assert len(kept) + len(held) == 12
    kept, held, how = data.split([v for v in volumes if v.scroll == "a"], 0.25)
    assert (len(held), how) == (2, "single volumes")
    assert held == data.split([v for v in reversed(volumes) if v.scroll == "a"], 0.25)[1]
    assert data.split(volumes, 0)[1] == []


# Reading
def test_a_stack_is_read_back_whole_or_by_its_pages(tmp_path):
    array = volume((5, 7, 9))
    stacks.write_stack(tmp_path / "a.tif", array)
    assert np.array_equal(stacks.read_stack(str(tmp_path / "a.tif")), array)
    assert np.array_equal(stacks.read_stack(str(tmp_path / "a.tif"), 2, 4), array[2:4])
    assert stacks.shape_of(str(tmp_path / "a.tif")) == (5, 7, 9)
    assert list(tmp_path.iterdir()) == [tmp_path / "a.tif"]
    with Image.open(tmp_path / "a.tif") as image:
        assert image.tag_v2[259] == inference.LZW


def test_a_malformed_volume_is_named_before_training(tmp_path, scrolls):
    image = scrolls / "train_images" / "synthetic_1.tif"
    whole = image.read_bytes()
    image.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"train_images/synthetic_1\.tif: not a readable TIFF stack"):
        prepared(small(tmp_path, scrolls))
    image.write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"train_images/synthetic_1\.tif: not a readable TIFF stack"):
        prepared(small(tmp_path, scrolls))
    stack(image, np.zeros((24, 24, 24, 3), np.uint8))
    with pytest.raises(ValueError, match=r"page 0: expected 8-bit or 16-bit grey of 24 x 24, got mode 'RGB'"):
        prepared(small(tmp_path, scrolls))
    stack(image, [np.zeros((24, 24), np.uint16), np.zeros((24, 24), np.uint8)])
    with pytest.raises(ValueError, match=r"synthetic_1\.tif: page 1: expected 16-bit grey of 24 x 24, got mode 'L'"):
        prepared(small(tmp_path, scrolls))
    stack(image, [np.zeros((24, 24), np.uint8), np.zeros((24, 20), np.uint8)])
    with pytest.raises(ValueError, match=r"synthetic_1\.tif: page 1: expected 8-bit grey of 24 x 24, got .* 20 x 24"):
        prepared(small(tmp_path, scrolls))
    image.write_bytes(whole)
    (scrolls / "test_images" / "synthetic_5.tif").write_bytes(whole[:1000])
    with pytest.raises(ValueError, match=r"test_images/synthetic_5\.tif: not a readable TIFF stack"):
        prepared(small(tmp_path, scrolls))
    # headers that are whole do not make a file that is: here the packed voxels of a page in the middle are lost
    with Image.open(scrolls / "test_images" / "synthetic_4.tif") as pages:
        pages.seek(9)
        start, length = pages.tag_v2[273][0], pages.tag_v2[279][0]
    content = bytearray((scrolls / "test_images" / "synthetic_4.tif").read_bytes())
    content[start : start + length] = b"\xff" * length
    (scrolls / "test_images" / "synthetic_5.tif").write_bytes(content)
    with pytest.raises(ValueError, match=r"test_images/synthetic_5\.tif: not a readable TIFF stack"):
        prepared(small(tmp_path, scrolls))


def test_too_large_a_page_is_named_and_other_warnings_are_nobodys_error(tmp_path, monkeypatch):
    path = tmp_path / "a.tif"
    stacks.write_stack(path, volume((2, 30, 30)))
    with stacks._opened(str(path)):
        warnings.warn("of another thread", stacklevel=1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"a\.tif: not a readable TIFF stack: .*decompression bomb"):
        stacks.read_stack(str(path))


def test_what_killed_processes_left_in_the_cache_is_removed(tmp_path):
    home = Path(Cache.at(str(tmp_path), 1).folder)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for pid in (gone.pid, os.getpid()):
        (home / f".writing-{pid}-a.image.npy").touch()
    Cache.at(str(tmp_path), 1)
    assert [path.name for path in home.iterdir()] == [f".writing-{os.getpid()}-a.image.npy"]


def test_labels_of_another_shape_or_out_of_range_are_named_before_training(tmp_path, scrolls):
    label = scrolls / "train_labels" / "synthetic_2.tif"
    stack(label, np.zeros((23, 24, 24), np.uint8))
    with pytest.raises(
        ValueError, match=r"synthetic_2\.tif: the label has the shape 23 x 24 x 24, but the image .*_2\.tif has 24"
    ):
        prepared(small(tmp_path, scrolls))
    array = np.zeros((24, 24, 24), np.uint8)
    array[3, 4, 5], array[6, 7, 8] = 7, 255
    stack(label, array)
    with pytest.raises(ValueError, match=r"expected the labels 0, 1 and 2 .* got 7 at .*\(3, 4, 5\), and 255"):
        prepared(small(tmp_path, scrolls))


def test_both_processes_hear_of_a_bad_label(tmp_path, scrolls):
    stack(scrolls / "train_labels" / "synthetic_3.tif", np.full((24, 24, 24), 9, np.uint8))  # rank 1 reads it
    config = small(tmp_path, scrolls, strategy="ddp", nproc=2)
    with pytest.raises(ValueError, match=r"train_labels/synthetic_3\.tif: expected the labels 0, 1 and 2"):
        launch(train, config, SurfaceSegmentation(config))


def test_what_is_read_once_is_kept_within_bounds_and_gives_the_same_patches(tmp_path, made, monkeypatch):
    task, kept = prepared(small(tmp_path, made))
    assert len(list(Path(task.cache.folder).glob("*.npy"))) == 3 * 4
    other, none = prepared(small(tmp_path, made, cache_dir=str(tmp_path / "other"), cache_gb=0))
    assert len(list(Path(other.cache.folder).glob("*.image.npy"))) == 0
    one, _ = prepared(small(tmp_path, made, cache_dir=str(tmp_path / "one"), cache_gb=3e-5))  # room for one
    assert len(list(Path(one.cache.folder).glob("*.image.npy"))) == 1
    for index in range(len(kept)):
        patches = []
        for dataset in (kept, none):
            torch.manual_seed(index)
            patches.append(dataset[index])
        assert torch.equal(patches[0][0], patches[1][0])
        assert torch.equal(patches[0][1], patches[1][1])
    monkeypatch.setattr(data, "read_stack", lambda *_: pytest.fail("read again"))
    again, _ = prepared(small(tmp_path, made))
    assert again._facts == task._facts


def test_what_an_earlier_session_prepared_is_not_decoded_again(tmp_path, made, scrolls, monkeypatch, capsys):
    where = tmp_path / "kaggle" / "input" / "notebooks" / "ann" / "prepared" / "run"
    command = f"prepare surface_segmentation --data-path {made} --output-dir {where}"
    assert command_line.main(command.split()) == 0
    assert f"4 of 4 volumes decoded (0.0 GB), 2 test volumes checked, in {where / 'data'}/" in capsys.readouterr().out
    # in another session the same files may have another path and another time
    want, _ = prepared(
        small(tmp_path, made, output_dir=str(tmp_path / "away"), cache_dir=str(tmp_path / "a"), cache_gb=0)
    )
    os.utime(scrolls / "train_images" / "synthetic_0.tif", (1, 1))
    with monkeypatch.context() as patch:
        patch.setattr(data, "read_stack", lambda *_: pytest.fail("decoded again"))
        task, patches = prepared(small(tmp_path, scrolls, cache_gb=0))
        torch.manual_seed(0)
        assert all(torch.isfinite(patches[index][0]).all() for index in range(len(patches)))
        assert task.val_data()[0][0].shape == (1, 16, 16, 16)
    assert task._facts == want._facts
    assert not list(Path(task.cache.folder).iterdir())
    assert re.search(r"4 volumes checked in .* s, 4 of them from .*notebooks/ann/prepared/run", capsys.readouterr().out)


def test_prepared_here_is_used_here_until_a_file_changes(tmp_path, scrolls, monkeypatch):
    assert ss.prepare(small(tmp_path, scrolls)).startswith(f"{scrolls} (data_path): 4 of 4 volumes decoded")
    read, whole = [], data.read_stack
    monkeypatch.setattr(data, "read_stack", lambda path, *pages: (read.append(Path(path).name), whole(path, *pages))[1])
    prepared(small(tmp_path, scrolls))
    assert read == []
    os.utime(scrolls / "train_images" / "synthetic_0.tif", (1, 1))
    prepared(small(tmp_path, scrolls))
    assert read == 2 * ["synthetic_0.tif"]
    (listed,) = tmp_path.glob("run/data/*/volumes.json")
    for other in ("[1]", "{", '{"x": 1}'):  # somebody else's
        listed.write_text(other)
        assert SurfaceSegmentation(small(tmp_path, scrolls)).catalogue.train
    assert "2 of 4 volumes decoded" in ss.prepare(
        small(tmp_path, scrolls, output_dir=str(tmp_path / "two"), cache_gb=6e-5)
    )


# Patches
def test_patches_see_sheets_and_are_repeated_by_their_seed(tmp_path):
    image, label = volume((40, 40, 40)), np.zeros((40, 40, 40), np.uint8)
    label[20, 20, 18:22] = 1  # a 16 000th of the volume
    stacks.write_stack(tmp_path / "i.tif", image)
    stacks.write_stack(tmp_path / "l.tif", label)
    one, cache = Volume("one", str(tmp_path / "i.tif"), str(tmp_path / "l.tif")), Cache.at(str(tmp_path), 1)
    facts = {"one": data.survey(one, cache)}
    assert facts["one"].counts == (64000 - 4, 4, 0)

    def seen(fraction):
        patches = Patches([one], facts, cache, size=8, per_volume=60, sheet_fraction=fraction, augment=False)
        torch.manual_seed(0)
        return [bool((patches[i][1] == 1).any()) for i in range(len(patches))]

    assert sum(seen(0.0)) < 10
    assert 25 < sum(seen(0.6)) < 55
    assert all(seen(1.0))
    augmented = Patches([one], facts, cache, size=8, per_volume=4, sheet_fraction=0.5, augment=True)
    twice = []
    for _ in range(2):
        torch.manual_seed(5)
        twice.append(augmented[2])
    assert torch.equal(twice[0][0], twice[1][0])
    assert not torch.equal(twice[0][0], augmented[2][0])


def test_flips_and_rotations_move_image_and_label_alike():
    torch.manual_seed(0)
    label = torch.from_numpy(volume((4, 4, 4)) % 2)
    orders = set()
    for _ in range(300):
        image, turned = augmented(10 * label[None].float(), label)
        assert torch.equal((image[0] > 5).to(torch.uint8), turned)
        assert image.shape == (1, 4, 4, 4)
        orders.add(tuple(turned.flatten().tolist()))
    assert len(orders) == 48


def test_outside_of_a_volume_is_its_mean_and_unlabelled(tmp_path):
    image = volume((5, 20, 9))
    stacks.write_stack(tmp_path / "i.tif", image)
    stacks.write_stack(tmp_path / "l.tif", (image > 128).astype(np.uint8))
    one, cache = Volume("one", str(tmp_path / "i.tif"), str(tmp_path / "l.tif")), Cache.at(str(tmp_path), 1)
    facts = {"one": data.survey(one, cache)}
    patches = Patches([one], facts, cache, size=12, per_volume=8, sheet_fraction=0.5, augment=False)
    for i in range(8):
        grey, label = patches[i]
        assert grey.shape == (1, 12, 12, 12)
        inside = label != 2
        assert inside.sum() == 5 * 12 * 9
        assert (grey[0][~inside] == 0).all()
        assert torch.equal(grey[0][inside] * facts["one"].std + facts["one"].mean > 128.5, label[inside] == 1)
    tiles = Tiles([one], facts, cache, size=12)
    assert len(tiles) == 2
    assert sum(int((label != 2).sum()) for _, label in (tiles[i] for i in range(2))) == image.size
    assert sum(int((label == 1).sum()) for _, label in (tiles[i] for i in range(2))) == (image > 128).sum()


# Model and loss
@pytest.mark.parametrize("half", [False, True])
def test_a_sample_does_not_depend_on_the_others_of_its_batch(half):
    torch.manual_seed(0)
    model, x = UNet(4, 2 if half else 3, half=half), torch.randn(3, 1, 16, 8, 12)
    for mode in (model.train(), model.eval()):
        whole = mode(x)
        assert whole.shape == x.shape
        assert torch.allclose(whole[1:2], mode(x[1:2]), atol=1e-5)
    with pytest.raises(ValueError, match=r"UNet: expected sides that are multiples of 4, got \(16, 8, 10\)"):
        model(torch.randn(1, 1, 16, 8, 10))


def test_a_half_stem_halves_the_finest_features_and_needs_patches_halved_once_more():
    model, sizes = UNet(4, 2, half=True), []
    model.down[0].register_forward_hook(lambda module, given, output: sizes.append(tuple(output.shape[1:])))
    assert model(torch.randn(1, 1, 16, 16, 16)).shape == (1, 1, 16, 16, 16) and sizes == [(4, 8, 8, 8)]
    assert Config(patch_size=48).patch_size == Config(patch_size=48, stem="half").patch_size
    with pytest.raises(ValueError, match=r"patch_size: expected 8 or more, and a multiple of 32 .* got 144"):
        Config(patch_size=144, stem="half")


@pytest.mark.parametrize("half", [False, True])
def test_checkpointing_changes_no_gradient(half):
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = UNet(4, 3, deep_supervision=True, half=half)
        if checkpointing:
            model.gradient_checkpointing_enable()
        segmentation_loss(model(torch.randn(2, 1, 16, 16, 16)), torch.randint(0, 3, (2, 16, 16, 16))).backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(g is not None for g in grads[0])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("half", [False, True])
def test_deep_supervision_weighs_halved_labels(half):
    torch.manual_seed(0)
    model = UNet(4, 3, deep_supervision=True, half=half)
    levels = model(torch.randn(2, 1, 16, 16, 16))
    label = torch.randint(0, 3, (2, 16, 16, 16))
    assert [tuple(x.shape[2:]) for x in levels] == [(16, 16, 16), (8, 8, 8)]
    by_hand = 2 / 3 * segmentation_loss(levels[0], label) + 1 / 3 * segmentation_loss(
        levels[1], label[:, ::2, ::2, ::2]
    )
    assert segmentation_loss(levels, label).item() == pytest.approx(by_hand.item(), rel=1e-6)
    assert model.eval()(torch.randn(1, 1, 16, 16, 16)).shape == (1, 1, 16, 16, 16)


def test_loss_is_a_sum_over_patches_and_ignores_what_is_unlabelled():
    torch.manual_seed(0)
    logits = torch.randn(4, 1, 6, 6, 6, requires_grad=True)
    label = torch.randint(0, 3, (4, 6, 6, 6))
    label[2] = 2  # nothing is known of it
    label[3] = torch.where(label[3] == 1, 0, label[3])  # no sheet in it
    losses = [segmentation_loss(logits[i : i + 1], label[i : i + 1]) for i in range(4)]
    total = segmentation_loss(logits, label)
    assert total.item() == pytest.approx(sum(loss.item() for loss in losses), rel=1e-6)
    x, y = logits[0, 0].double().flatten(), label[0].flatten()
    x, y = x[y != 2], y[y != 2].double()
    p = x.sigmoid()
    entropy = -(y * p.log() + (1 - y) * (1 - p).log()).mean()
    dice = (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)
    assert losses[0].item() == pytest.approx((entropy + 1 - dice).item(), rel=1e-5)
    assert losses[2].item() == 0
    assert 0.5 < losses[3].item() < 1.2  # its cross entropy alone
    (gradient,) = torch.autograd.grad(total, logits)
    assert (gradient[:, 0][label == 2] == 0).all()
    assert (gradient[:, 0][label != 2] != 0).all()


def test_fp16_logits_give_a_finite_loss_and_gradient():
    torch.manual_seed(0)
    full = 20 * torch.randn(1, 1, 48, 48, 48)  # sums of 110 592 voxels are beyond fp16's 65504
    label = (full[:, 0] + 10 * torch.randn(1, 48, 48, 48) > 0).long()
    half = full.half().requires_grad_()
    loss = segmentation_loss(half, label)
    assert loss.dtype == torch.float32
    assert loss.item() == segmentation_loss(half.float(), label).item()
    (65536 * loss).backward()
    assert half.grad is not None and torch.isfinite(half.grad).all()
    model = UNet(4, 2)
    with torch.autocast("cpu", torch.float16):
        loss = segmentation_loss(model(torch.randn(2, 1, 16, 16, 16)), label[:1, :16, :16, :16].expand(2, -1, -1, -1))
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


# Sliding window
@pytest.mark.parametrize(("shape", "size", "overlap"), WINDOWS)
def test_blended_windows_equal_monai(shape, size, overlap):
    slabs = list(inference.sliding_window(predictor, volume(shape), size=size, overlap=overlap))
    ends = [first + len(slab) for first, slab in slabs]
    assert [first for first, _ in slabs] == [0, *ends[:-1]]
    y = np.concatenate([slab for _, slab in slabs])
    wanted = REFERENCE["windows"][json.dumps([shape, size, overlap])]
    assert y.shape == shape
    assert [y[tuple(place)] for place in wanted["places"]] == pytest.approx(wanted["values"], abs=2e-5)
    assert float(y.sum(dtype=np.float64)) == pytest.approx(wanted["sum"], rel=1e-5)


def test_one_window_equals_a_forward_pass_of_the_whole_volume():
    torch.manual_seed(0)
    model, grey = UNet(4, 3).eval(), volume((16, 16, 16))
    ((first, logits),) = inference.sliding_window(model, grey, size=16)
    standard = (grey - grey.mean()) / grey.std()
    with torch.no_grad():
        whole = model(torch.from_numpy(standard.astype(np.float32))[None, None])[0, 0].numpy()
    assert first == 0
    assert np.abs(logits - whole).max() < 1e-5


def test_blending_leaves_a_voxelwise_prediction_as_it_is():
    grey = volume((37, 20, 29))
    planes = [slab for _, slab in inference.sliding_window(lambda x: 2 * x, grey, size=16, overlap=0.5)]
    assert np.allclose(np.concatenate(planes), 2 * (grey - grey.mean()) / grey.std(), atol=1e-5)


# Figures
@pytest.mark.parametrize("name", REFERENCE["masks"])
def test_measures_equal_those_of_independent_packages(name):
    prediction, label = cases()[name]
    wanted = REFERENCE["masks"][name]
    got = metrics.measures(prediction, label)
    assert got["dice"] == pytest.approx(wanted["dice"], abs=1e-12)
    assert got["surface_dice"] == pytest.approx(wanted["surface_dice"], abs=1e-12)
    assert got["voi_score"] == pytest.approx(1 / (1 + 0.3 * (wanted["split"] + wanted["merge"])), abs=1e-9)
    known = label != 2
    parts = metrics.variation_of_information((prediction != 0) & known, label == 1)
    assert parts == pytest.approx((wanted["split"], wanted["merge"]), abs=1e-9)
    for k, (found, sheet) in enumerate(zip(*wanted["betti"], strict=True)):
        expected = 2 * min(found, sheet) / (found + sheet) if found + sheet else 1.0
        assert got[f"betti{k}_f1"] == pytest.approx(expected, abs=1e-12)


def test_betti_numbers_are_those_of_solids_of_known_topology():
    z, y, x = np.indices((30, 30, 30)) - 14.5
    radius = np.sqrt(z**2 + y**2 + x**2)

    def ring(a, b, c):
        return (np.hypot(a, b) - 7) ** 2 + c**2 < 5

    solids = {
        "ball": (radius < 9, (1, 0, 0)),
        "torus": (ring(y, x, z), (1, 1, 0)),
        "shell": ((radius < 9) & (radius > 6), (1, 0, 1)),
        "linked tori": (ring(y, x - 3.5, z) | ring(z, x + 3.5, y), (2, 2, 0)),
        "sheet across the volume, with a hole": ((abs(z) < 1.5) & (np.hypot(y, x) > 3), (1, 1, 0)),
        "cubes that touch at a corner": (
            ((z < -9) & (y < -9) & (x < -9)) | ((z > -9) & (y > -9) & (x > -9)),
            (1, 0, 0),
        ),
        "nothing": (radius < 0, (0, 0, 0)),
        "everything": (radius < 99, (1, 0, 0)),
    }
    for name, (solid, wanted) in solids.items():
        assert metrics.betti_numbers(solid) == wanted, name
    two = solids["linked tori"][0]
    figures = metrics.measures(two & (x > -4), two)  # one ring, whole, and two arcs of the other
    assert figures["betti1_f1"] == pytest.approx(2 * 1 / 3)


def test_of_two_empty_masks_all_is_right_and_of_two_shapes_nothing():
    empty = np.zeros((4, 4, 4), np.uint8)
    assert set(metrics.measures(empty, empty).values()) == {1.0}
    assert not np.isnan(metrics._area_table()).any()
    with pytest.raises(ValueError, match=r"prediction and label of one shape, got \(4, 4, 4\) and \(4, 4, 3\)"):
        metrics.measures(empty, empty[:, :, :3])


def test_specks_are_removed_and_a_missing_scipy_is_found_out_at_the_start(tmp_path, made, monkeypatch):
    mask = np.zeros((8, 8, 8), np.uint8)
    mask[0, 0, :3], mask[4:7, 4:7, 4:7], mask[7, 7, 7] = 1, 1, 1  # the last touches the second with a corner
    assert metrics.without_specks(mask, 4).sum() == 28
    assert metrics.without_specks(mask, 0).sum() == 31
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ImportError, match="need the package `scipy`: pip install scipy"):
        SurfaceSegmentation(small(tmp_path, made)).describe()


# The submission
def test_a_submission_is_checked_byte_by_byte(tmp_path):
    images, masks = tmp_path / "test_images", {}
    for i, shape in enumerate([(5, 6, 7), (4, 4, 4)]):
        stacks.write_stack(images / f"v{i}.tif", volume(shape))
        masks[f"v{i}"] = tmp_path / f"v{i}.tif"
        stacks.write_stack(masks[f"v{i}"], (volume(shape) > 99).astype(np.uint8))
    path = tmp_path / "submission.zip"
    inference.write_submission(path, masks)
    before = path.read_bytes()
    assert ss.validate_submission(path, images) == 2
    inference.write_submission(path, masks)
    assert path.read_bytes() == before

    def refused(expected, **changes):
        for name, array in changes.items():
            stacks.write_stack(tmp_path / f"{name}.tif", array)
        inference.write_submission(path, {**masks, **{name: tmp_path / f"{name}.tif" for name in changes}})
        with pytest.raises(ValueError, match=expected):
            ss.validate_submission(path, images)
        stacks.write_stack(masks["v0"], (volume((5, 6, 7)) > 99).astype(np.uint8))

    refused(r"submission\.zip: other\.tif belongs to no volume", other=np.zeros((4, 4, 4), np.uint8))
    refused(r"v0\.tif: expected the shape \(5, 6, 7\), got \(5, 7, 6\)", v0=np.zeros((5, 7, 6), np.uint8))
    refused(r"v0\.tif: page 0: expected values 0 and 1 .* got values up to 255", v0=np.full((5, 6, 7), 255, np.uint8))
    stack(tmp_path / "v0.tif", np.zeros((5, 6, 7), np.uint8), compression="tiff_deflate")
    refused(r"v0\.tif: page 0: expected LZW \(compression 5\), got compression 8")
    (tmp_path / "v0.tif").write_bytes(b"II*\0")
    refused(r"v0\.tif: not a readable TIFF stack")
    Image.new("L", (7, 6)).save(tmp_path / "v0.tif", format="EPS")  # which Pillow would hand to Ghostscript
    refused(r"v0\.tif: not a readable TIFF stack: cannot identify")
    del masks["v1"]
    refused(r"v1\.tif is missing in the zip")
    path.write_bytes(before[:-40])
    with pytest.raises(ValueError, match="not a readable zip"):
        ss.validate_submission(path, images)
    spoilt = bytearray(before)
    spoilt[len(before) // 3] ^= 255
    path.write_bytes(spoilt)
    with pytest.raises(ValueError, match=r"submission\.zip: "):
        ss.validate_submission(path, images)


# The whole
@pytest.fixture(scope="module")
def finished(tmp_path_factory, made):
    """A run of one process on volumes of 24^3, a minute's training in small, and its config."""
    folder = tmp_path_factory.mktemp("finished")
    config = small(folder, made, patches_per_volume=4, max_steps=50, lr=4e-3, width=8, eval_every=25)
    task = SurfaceSegmentation(config)
    return config, task, ss.run(config, task)


def test_it_learns_and_beats_the_trivial_answers_on_an_unseen_scroll(finished):
    config, task, result = finished
    assert result.finished
    assert result.metrics["dice"] > 0.6
    trivial = ss.baselines(task)
    assert next(iter(trivial)) == "all is sheet"
    assert trivial.pop("this model")["dice"] == result.metrics["volume_dice"]
    assert len(trivial) == 2
    assert result.metrics["volume_dice"] > 0.05 + max(row["dice"] for row in trivial.values())
    out = Path(config.output_dir)
    assert json.loads((out / "result.json").read_text())["metrics"] == result.metrics
    per_volume = json.loads((out / "predictions" / "held_out" / "figures.json").read_text())
    assert per_volume["synthetic_1"]["dice"] == result.metrics["volume_dice"]
    with zipfile.ZipFile(out / "submission.zip") as archive:
        assert archive.namelist() == ["synthetic_4.tif", "synthetic_5.tif"]
    with Image.open(out / "slices.png") as image:
        assert image.width > 600
        assert image.convert("RGBA").getpixel((0, 0))[3] == 0, "the ground is the page's"


def test_again_it_goes_straight_to_what_is_missing(finished, monkeypatch):
    config, _, result = finished
    out = Path(config.output_dir)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("predictions/*/*.tif")}
    assert len(times) == 3
    gone = out / "predictions" / "test" / "synthetic_5.tif"
    content = gone.read_bytes()
    gone.unlink()
    monkeypatch.setattr(data, "survey", lambda *_: pytest.fail("no training data is needed"))
    again = ss.run(config)
    assert again.metrics == result.metrics
    assert again.step == result.step
    assert sum(record["kind"] == "start" for record in again.records()) == 1
    assert gone.read_bytes() == content
    assert all(path.stat().st_mtime_ns == before for path, before in times.items() if path != gone)


def again(config, task):
    """As under torchrun, where rank 0 has gone on and written that the predictions are to come before rank 1 looks."""
    if distributed.rank() == 1:
        saving.read_result = lambda *_: None
    return train(config, task)


def test_that_a_run_has_finished_is_for_rank_0_to_say(tmp_path, made):
    config = small(tmp_path, made, max_steps=1)
    task = SurfaceSegmentation(config)
    first = train(config, task)
    assert first.finished
    assert launch(again, config.replace(strategy="ddp", nproc=2), task) == [first, first]


def test_a_finished_run_among_the_inputs_is_not_trained_again(finished, tmp_path, monkeypatch):
    config, _, result = finished
    shutil.copytree(config.output_dir, tmp_path / "kaggle" / "input" / "notebooks" / "me" / "earlier" / "run")
    monkeypatch.setattr(data, "survey", lambda *_: pytest.fail("no training data is needed"))
    again = ss.run(config.replace(output_dir=str(tmp_path / "new"), cache_dir=str(tmp_path)))
    assert again.finished
    assert again.metrics == result.metrics
    assert [path.name for path in (tmp_path / "new" / "predictions" / "test").iterdir()] != []
    for changes in ({"max_steps": 60}, {"resume": "never"}):
        with pytest.raises(pytest.fail.Exception, match="no training data is needed"):
            ss.run(config.replace(output_dir=str(tmp_path / "new"), cache_dir=str(tmp_path), **changes))


def test_two_processes_predict_and_measure_what_one_does(finished, tmp_path):
    config, _, result = finished
    copy = Path(shutil.copytree(config.output_dir, tmp_path / "run"))
    shutil.rmtree(copy / "predictions")
    two = config.replace(output_dir=str(copy), strategy="ddp", nproc=2)
    both = launch(ss.infer, two, SurfaceSegmentation(two))  # three volumes: whole ones are shared out
    assert both.metrics == pytest.approx(result.metrics, abs=1e-6)
    for path in Path(config.output_dir).rglob("predictions/*/*.tif"):
        assert (copy / path.relative_to(config.output_dir)).read_bytes() == path.read_bytes()
    (copy / "predictions" / "held_out" / "synthetic_1.tif").unlink()
    both = launch(ss.infer, two, SurfaceSegmentation(two))  # one volume: both work on it
    assert both.metrics == pytest.approx(result.metrics, abs=1e-6)


def test_evaluation_in_training_is_the_same_in_one_and_two_processes(tmp_path, made):
    results = []
    for nproc in (1, 2):
        config = small(tmp_path, made, lr=0.0, min_lr=0.0, max_steps=1, global_batch_size=2, micro_batch_size=1)
        config = config.replace(nproc=nproc, strategy="ddp" if nproc == 2 else "single")
        config = config.replace(output_dir=str(tmp_path / f"run{nproc}"))
        results.append(launch(train, config, SurfaceSegmentation(config)))
    assert results[1].world_size == 2
    assert results[0].metrics == pytest.approx(results[1].metrics, abs=1e-6)


def test_other_weights_or_settings_start_the_predictions_anew(finished, tmp_path):
    config, _, _ = finished
    copy = Path(shutil.copytree(config.output_dir, tmp_path / "run"))
    config = config.replace(output_dir=str(copy))
    stamp = copy / "predictions" / "stamp.json"
    before, mask = stamp.read_text(), copy / "predictions" / "test" / "synthetic_4.tif"
    first = mask.read_bytes()
    weights = read_tensors(copy / "best" / "model.safetensors")
    weights["heads.0.bias"] += 100.0  # all is sheet
    replace_tensors(copy / "best" / "model.safetensors", weights)
    ss.infer(config, SurfaceSegmentation(config))
    assert stamp.read_text() != before
    assert stacks.read_stack(str(mask)).all()
    final = config.replace(weights="final")
    ss.infer(final, SurfaceSegmentation(final))
    assert not stacks.read_stack(str(mask)).all()
    assert len(first) > 0


def test_weights_alone_predict_and_nothing_is_trained(finished, tmp_path, monkeypatch):
    config, _, result = finished
    best = tmp_path / "input" / "model.safetensors"
    best.parent.mkdir()
    shutil.copyfile(Path(config.output_dir) / "best" / "model.safetensors", best)
    monkeypatch.setattr(ss.stages, "train", lambda *_: pytest.fail("trained anew"))
    alone = ss.run(config.replace(weights=str(best), output_dir=str(tmp_path / "alone")))
    assert alone.finished and alone.step == 0
    figures = {name: value for name, value in result.metrics.items() if name.startswith("volume_")}
    assert figures and alone.metrics == figures
    with pytest.raises(FileNotFoundError, match="weights: no such file: "):
        ss.run(config.replace(weights="/nowhere.safetensors", output_dir=str(tmp_path / "none")))
    with pytest.raises(ValueError, match=r"weights: expected best, final or .safetensors files, got 'last'"):
        config.replace(weights="last")


def test_there_is_nothing_to_predict_with_before_training(tmp_path, made):
    config = small(tmp_path, made)
    with pytest.raises(FileNotFoundError, match=r"run/result\.json: no such file\. Train first"):
        ss.infer(config, SurfaceSegmentation(config))


def test_when_the_time_is_up_the_run_does_not_look_finished(finished, tmp_path, capsys):
    config, _, _ = finished
    copy = Path(shutil.copytree(config.output_dir, tmp_path / "run"))
    shutil.rmtree(copy / "predictions")
    config = config.replace(output_dir=str(copy))
    result = ss.infer(config, SurfaceSegmentation(config), -1.0)
    assert (result.finished, result.reason) == (False, "time limit")
    assert "3 of 3 volumes have no prediction yet" in capsys.readouterr().out
    assert json.loads((copy / "result.json").read_text())["finished"] is False
    result = ss.run(config)
    assert result.finished
    assert json.loads((copy / "result.json").read_text())["finished"] is True


def test_between_training_and_prediction_it_does_not_look_finished(tmp_path, made, monkeypatch):
    config = small(tmp_path, made, max_steps=1)
    monkeypatch.setattr(stages, "infer", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        ss.run(config)
    said = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (said["finished"], said["step"], said["max_steps"]) == (False, 1, 1)


def test_predictions_among_the_inputs_are_not_made_again(finished, tmp_path, monkeypatch, capsys):
    """Of an earlier session that had time for two volumes of three."""
    config, _, result = finished
    earlier = tmp_path / "kaggle" / "input" / "notebooks" / "me" / "earlier" / "run"
    shutil.copytree(config.output_dir, earlier)
    (earlier / "predictions" / "test" / "synthetic_5.tif").unlink()
    (earlier / "result.json").write_text(json.dumps({**vars(result), "finished": False}))
    new = config.replace(output_dir=str(tmp_path / "new"), cache_dir=str(tmp_path))
    again = ss.run(new)
    said = capsys.readouterr().out
    assert "2 of 3 volumes have predictions in an earlier session's output" in said
    assert "predicted synthetic_5.tif" in said and "predicted synthetic_4.tif" not in said
    assert (again.finished, again.metrics) == (True, result.metrics)
    assert json.loads((tmp_path / "new" / "predictions" / "count.json").read_text()) == {"predicted": 3}
    # not those of other settings
    ss.infer(new.replace(overlap=0.5), SurfaceSegmentation(new.replace(overlap=0.5)))
    assert "an earlier session's output" not in capsys.readouterr().out


def test_on_kaggle_the_submission_is_in_the_working_folder_wherever_the_run_is(finished, tmp_path, monkeypatch):
    config, _, _ = finished
    working = tmp_path / "kaggle" / "working"
    shutil.copytree(config.output_dir, working)
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.chdir(working)
    whole = (working / "submission.zip").read_bytes()
    for output_dir in (str(working), "."):
        here = config.replace(output_dir=output_dir)
        assert ss.infer(here, SurfaceSegmentation(here)).finished
        assert (working / "submission.zip").read_bytes() == whole
    shutil.copytree(config.output_dir, working / "run")
    (working / "submission.zip").write_bytes(b"another")
    here = config.replace(output_dir="run")
    ss.infer(here, SurfaceSegmentation(here))
    assert (working / "submission.zip").read_bytes() == whole
    assert not list(working.rglob(".writing-*"))


def test_a_picture_that_fails_is_a_note_and_no_failed_run(finished, tmp_path, monkeypatch, capsys):
    config, _, _ = finished
    copy = Path(shutil.copytree(config.output_dir, tmp_path / "run"))
    config = config.replace(output_dir=str(copy))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert ss.infer(config, SurfaceSegmentation(config)).finished
    assert "slices.png was not drawn: ModuleNotFoundError" in capsys.readouterr().out
    assert json.loads((copy / "result.json").read_text())["finished"] is True


def test_killed_in_training_and_in_prediction_it_is_the_same_run(tmp_path, made):
    """SIGKILL of the whole process group: once after the first checkpoint, once after the first prediction."""
    changes = {"max_steps": 10, "save_every": 2, "keep_last": 9, "epochs": 9, "patches_per_volume": 4, "overlap": 0.75}
    undisturbed = small(tmp_path, made, **changes, output_dir=str(tmp_path / "undisturbed"))
    assert ss.run(undisturbed).finished
    config = undisturbed.replace(output_dir=str(tmp_path / "killed"), data_workers=1)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    script = tmp_path / "script.py"
    script.write_text(
        "from kaggle_mgpu.recipes.surface_segmentation import Config, run\n"
        f"if __name__ == '__main__':\n    print(run(Config.load({str(tmp_path / 'config.json')!r})).reason)\n"
    )
    out = Path(config.output_dir)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for sign, name in (
        ("checkpoints/step-*", r"/checkpoints/step-\d+$"),
        ("predictions/*/[!.]*.tif", r"/predictions/\w+/\w+\.tif$"),
    ):
        held = PauseAt(tmp_path / "hold" / name[1:12], "os.rename", name, before=1)
        log = (tmp_path / "log").open("ab")
        process = subprocess.Popen(
            [sys.executable, script],
            env={**environment, **held.variables(environment)},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        held.wait(process, tmp_path / "log")
        assert len(list(out.glob(sign))) == 1
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.close()
        state = json.loads((out / "result.json").read_text()) if (out / "result.json").is_file() else {}
        assert not state.get("finished")
    kept = {path: path.stat().st_mtime_ns for path in out.glob("predictions/*/[!.]*.tif")}
    assert len(kept) == 1
    assert ss.run(config.replace(data_workers=0)).finished
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())
    names = ["model.safetensors", "best/model.safetensors", "submission.zip"]
    names += [str(path.relative_to(out)) for path in out.glob("predictions/*/*.tif")]
    for name in names:
        assert (out / name).read_bytes() == (Path(undisturbed.output_dir) / name).read_bytes(), name


def test_pickled_tasks_keep_what_was_found(tmp_path, made):
    task, dataset = prepared(small(tmp_path, made))
    copy = pickle.loads(pickle.dumps(task))
    assert copy.describe() == task.describe()
    assert copy._facts == task._facts and isinstance(copy._facts["synthetic_0"], Facts)
    assert len(copy.train_data()) == len(dataset) == 3 * 2
    assert task.name == f"SurfaceSegmentation {task.catalogue.digest}"
    assert all(len(list(itertools.islice(copy.val_data(), 1))) == 1 for _ in range(2))
