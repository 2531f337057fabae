"""The surface recipe around its model: unlabelled voxels, 16-bit volumes, mirrored and averaged predictions, masks."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from kaggle_mgpu.checkpoints import read_tensors
from kaggle_mgpu.checkpoints.files import replace_tensors
from kaggle_mgpu.launching import launch
from kaggle_mgpu.recipes import surface_segmentation as ss
from kaggle_mgpu.recipes.surface_segmentation import (
    Config,
    SurfaceSegmentation,
    data,
    ensemble,
    inference,
    metrics,
    patches,
    postprocessing,
    stacks,
    stages,
    synthetic,
)
from kaggle_mgpu.recipes.surface_segmentation.data import Cache, Volume
from kaggle_mgpu.recipes.surface_segmentation.model import UNet, segmentation_loss, skeleton_recall_loss
from kaggle_mgpu.recipes.surface_segmentation.patches import Patches, cut
from kaggle_mgpu.recipes.surface_segmentation.postprocessing import Choice
from surface_cases import volume


@pytest.fixture(autouse=True)
def _no_inputs(monkeypatch, tmp_path):
    monkeypatch.setenv("KAGGLE_MGPU_KAGGLE_ROOT", str(tmp_path / "kaggle"))


@pytest.fixture
def scrolls(tmp_path):
    """Volumes of 16^3: three to train on, two to hold out, one to predict."""
    folder = tmp_path / "scrolls"
    synthetic.synthesise(folder, size=16, train=5, test=1)
    rows = [f"synthetic_{i},{scroll}\n" for i, scroll in enumerate("aaabb")]
    (folder / "train.csv").write_text("id,scroll_id\n" + "".join(rows))
    return folder


def small(tmp_path, folder, **changes):
    values = {
        "data_path": str(folder), "cache_dir": str(tmp_path), "patch_size": 8, "width": 4, "val_fraction": 0.4,
        "data_workers": 0, "output_dir": str(tmp_path / "run"), "nproc": 1, "strategy": "single", **changes,
    }  # fmt: skip
    return Config(**values)


def weights(path, seed=0):
    """A file of untrained weights whose probabilities spread over 0 to 1."""
    torch.manual_seed(seed)
    tensors = UNet(4, 1).state_dict()
    tensors["heads.0.weight"] *= 8
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_tensors(path, tensors)
    return str(path)


def relabel(folder, old, new):
    for path in (folder / "train_labels").iterdir():
        label = stacks.read_stack(str(path))
        stacks.write_stack(path, np.where(label == old, new, label).astype(np.uint8))


# Unlabelled voxels
def test_unlabelled_voxels_may_have_another_number(tmp_path, scrolls):
    usual = SurfaceSegmentation(small(tmp_path, scrolls))
    wanted = [usual.val_data()[i] for i in range(4)]
    before = usual.catalogue.digest
    relabel(scrolls, 2, 255)
    with pytest.raises(ValueError, match=r"labels 0, 1 and 2 \(unlabelled; see ignore_label\), got 255 at"):
        SurfaceSegmentation(small(tmp_path, scrolls, cache_dir=str(tmp_path / "a"))).prepare()
    for room in (1, 0):  # kept decoded, and decoded for each patch
        config = small(tmp_path, scrolls, ignore_label=255, cache_dir=str(tmp_path / f"b{room}"), cache_gb=room)
        task = SurfaceSegmentation(config)
        task.prepare()
        got = [task.val_data()[i] for i in range(4)]
        assert any((label == 2).any() for _, label in got)
        assert all(torch.equal(a[1], b[1]) for a, b in zip(got, wanted, strict=True))
        assert task.catalogue.digest != before
    label = data.read_label(task.split[1][0])
    assert set(np.unique(label)) == {0, 1, 2}
    assert metrics.measures(label, label)["dice"] == 1
    relabel(scrolls, 255, 2)
    with pytest.raises(ValueError, match=r"labels 0, 1 and 255 .*, got 2 at"):
        SurfaceSegmentation(small(tmp_path, scrolls, ignore_label=255, cache_dir=str(tmp_path / "c"))).prepare()
    with pytest.raises(ValueError, match=r"ignore_label: expected 2 to 65535, got 1"):
        Config(ignore_label=1)


def test_a_patch_without_labels_is_no_term_of_the_loss(tmp_path, scrolls):
    task = SurfaceSegmentation(small(tmp_path, scrolls))
    image, label = torch.randn(3, 1, 8, 8, 8), torch.randint(0, 2, (3, 8, 8, 8), dtype=torch.uint8)
    label[1], label[2, :4] = 2, 2
    assert task.count((image, label)) == 2
    torch.manual_seed(0)
    model = UNet(4, 1)
    total, count = task.metrics(model, (image, label))["loss"]
    assert count == 2
    alone = [segmentation_loss(model(image[i : i + 1]), label[i : i + 1]).item() for i in (0, 2)]
    assert total.item() / count == pytest.approx(sum(alone) / 2, rel=1e-5)
    logits = torch.randn(3, 1, 8, 8, 8)
    moved = torch.where(label[:, None] == 2, 50 * torch.randn(3, 1, 8, 8, 8), logits)
    one, other = (task.metrics(lambda _, given=given: given, (image, label)) for given in (logits, moved))
    assert torch.equal(one["voxels"][0], other["voxels"][0])
    assert torch.equal(one["loss"][0], other["loss"][0])


def test_patches_are_drawn_where_labels_are(tmp_path):
    label = np.full((32, 32, 32), 2, np.uint8)
    label[:, :8] = 0
    stacks.write_stack(tmp_path / "i.tif", volume((32, 32, 32)))
    stacks.write_stack(tmp_path / "l.tif", label)
    one, cache = Volume("one", str(tmp_path / "i.tif"), str(tmp_path / "l.tif")), Cache.at(str(tmp_path), 1)
    cache.kept = {"one"}
    facts = {"one": data.survey(one, cache)}
    torch.manual_seed(0)
    drawn = Patches([one], facts, cache, size=8, per_volume=50, sheet_fraction=0.5, augment=False)
    assert all((drawn[i][1] != 2).any() for i in range(50))
    stacks.write_stack(tmp_path / "l.tif", np.full((32, 32, 32), 2, np.uint8))
    with pytest.raises(ValueError, match=r"l\.tif: all voxels are 2 \(unlabelled\): leave the volume out"):
        data.survey(one, cache)


# The medial surface
def test_the_medial_surface_is_the_middle_of_sheets():
    z, y, x = np.indices((24, 24, 24))
    flat = patches.medial_surface(abs(z - 9) <= 2)
    assert np.array_equal(flat, z == 9)
    radius = np.sqrt(z**2 + y**2 + x**2)
    bent = abs(radius - 20) < 2.5
    middle = patches.medial_surface(bent)
    assert abs(radius[middle] - 20).mean() < 0.7 < abs(radius[bent] - 20).mean()
    assert middle.sum() < 0.35 * bent.sum()
    assert (ndimage.binary_dilation(middle, np.ones((3, 3, 3)), iterations=2) >= bent).all(), "no part is left out"
    assert not patches.medial_surface(z < 0).any()


def test_patches_bring_the_medial_surface_which_changes_nothing_else(tmp_path, scrolls):
    usual, more = (
        SurfaceSegmentation(small(tmp_path, scrolls, skeleton_recall=weight)).train_data() for weight in (0, 1)
    )
    for i in range(6):
        torch.manual_seed(i)
        image, label = usual[i]
        torch.manual_seed(i)
        same_image, same_label, medial = more[i]
        assert torch.equal(image, same_image) and torch.equal(label, same_label)
        assert not (medial & (label != 1)).any(), "no voxel that is background or unlabelled"
        assert medial.any() == (label == 1).any()
        # found before the patch is turned
        assert torch.equal(medial, torch.from_numpy(patches.medial_surface(label.numpy() == 1)))


def test_skeleton_recall_is_added_for_each_patch_alone(tmp_path, scrolls):
    task = SurfaceSegmentation(small(tmp_path, scrolls, skeleton_recall=0.5))
    torch.manual_seed(0)
    model, image = UNet(4, 1), torch.randn(3, 1, 8, 8, 8)
    label = torch.randint(0, 3, (3, 8, 8, 8), dtype=torch.uint8)
    label[2] = 0
    medial = (label == 1) & (torch.rand(label.shape) < 0.3)
    total = task.loss(model, (image, label, medial))
    alone = [task.loss(model, tuple(part[i : i + 1] for part in (image, label, medial))) for i in range(3)]
    assert total.item() == pytest.approx(sum(part.item() for part in alone), rel=1e-5)
    logits = model(image)
    p, m = logits[0, 0].sigmoid().double(), medial[0]
    by_hand = 0.5 * (1 - (p[m].sum() + 1) / (m.sum() + 1))
    assert alone[0].item() == pytest.approx((segmentation_loss(logits[:1], label[:1]) + by_hand).item(), rel=1e-5)
    assert alone[2].item() == pytest.approx(segmentation_loss(logits[2:], label[2:]).item(), rel=1e-5)
    assert skeleton_recall_loss([logits, logits[:, :, ::2, ::2, ::2]], medial) == skeleton_recall_loss(logits, medial)
    with pytest.raises(ValueError, match=r"Config\.skeleton_recall: expected 0 or more, got -1"):
        Config(skeleton_recall=-1)


# 16-bit volumes
@pytest.mark.parametrize("compression", ["tiff_lzw", None])
def test_a_16_bit_volume_is_read_and_standardised_as_an_8_bit_one(tmp_path, compression):
    grey = volume((9, 10, 11))
    pages = [Image.fromarray(page) for page in grey.astype(np.uint16) * 257]
    pages[0].save(tmp_path / "i.tif", save_all=True, append_images=pages[1:], compression=compression)
    stacks.write_stack(tmp_path / "eight.tif", grey)
    stacks.write_stack(tmp_path / "l.tif", (grey > 128).astype(np.uint8))
    read = stacks.read_stack(str(tmp_path / "i.tif"))
    assert read.dtype == np.uint16 and np.array_equal(read, grey.astype(int) * 257)
    assert stacks.bytes_of(str(tmp_path / "i.tif")) == 2 * stacks.bytes_of(str(tmp_path / "eight.tif")) == 2 * 990
    cubes, cache = [], Cache.at(str(tmp_path), 1)
    for name in ("i", "eight"):
        one = Volume(name, str(tmp_path / f"{name}.tif"), str(tmp_path / "l.tif"))
        cubes.append(cut(cache, one, data.survey(one, cache), (1, 1, 1), 8)[0])
    assert torch.allclose(*cubes, atol=1e-5)
    assert abs(float(cubes[0].std()) - 1) < 0.1
    windows = [
        np.concatenate([slab for _, slab in inference.sliding_window(lambda x: x, array, size=8)])
        for array in (read, grey)
    ]
    assert np.allclose(*windows, atol=1e-5)
    sixteen = [Volume("i", str(tmp_path / "i.tif"), str(tmp_path / "l.tif"))]
    for room, kept in ((3, {"i"}), (2, set())):  # bytes a voxel of image and label
        cache.max_bytes = room * 990
        assert cache.plan(sixteen) == kept


# Mirrored and averaged
def test_flips_and_models_are_averaged_as_probabilities():
    torch.manual_seed(0)
    models, x = [UNet(4, 2).eval(), UNet(4, 2).eval()], torch.randn(2, 1, 8, 8, 8)
    with torch.no_grad():
        assert ensemble.averaged(models[:1]) is models[0]
        for axes, some in (((0, 1, 2), models[:1]), ((1, 2), models[:1]), ((), models), ((0,), models)):
            passes = [
                model(x.flip(dims)).sigmoid().flip(dims)
                for model in some
                for n in range(len(axes) + 1)
                for dims in ([axis + 2 for axis in chosen] for chosen in itertools.combinations(axes, n))
            ]
            assert len(passes) == len(some) * 2 ** len(axes)
            forward = ensemble.averaged(some, axes)
            assert torch.allclose(forward(x).sigmoid(), sum(passes) / len(passes), atol=1e-5)
            for axis in axes:
                assert torch.allclose(forward(x.flip(axis + 2)), forward(x).flip(axis + 2), atol=1e-4)
        assert torch.isfinite(ensemble.averaged(models)(1e6 * x)).all()
    with pytest.raises(ValueError, match=r"tta_axes: expected some of 0, 1 and 2, each once, got \(1, 3\)"):
        Config(tta_axes=(1, 3))
    assert Config.from_dict({"tta_axes": "0,2"}).tta_axes == (0, 2)


def test_evaluations_during_training_mirror_only_where_it_is_asked_for(tmp_path, scrolls):
    torch.manual_seed(0)
    model, image = UNet(4, 2).eval(), torch.randn(2, 1, 8, 8, 8)
    label = torch.randint(0, 3, (2, 8, 8, 8))
    losses = []
    for asked in (False, True):
        task = SurfaceSegmentation(small(tmp_path, scrolls, tta_axes=(0, 1, 2), tta_in_training=asked))
        with torch.no_grad():
            losses.append(task.metrics(model, (image, label))["loss"][0].item())
    with torch.no_grad():
        assert losses[0] == pytest.approx(segmentation_loss(model(image), label).item())
        mirrored = ensemble.averaged([model], (0, 1, 2))(image)
        assert losses[1] == pytest.approx(segmentation_loss(mirrored, label).item())
    assert abs(losses[0] - losses[1]) > 1e-5


# Threshold and smallest part
def test_dice_by_threshold_and_size_is_that_of_the_masks():
    rng = np.random.default_rng(0)
    probability = rng.integers(0, 256, (12, 13, 14)).astype(np.uint8)
    probability[3:6] |= 128  # a large part, and specks
    label = rng.integers(0, 3, probability.shape).astype(np.uint8)
    curve = postprocessing.dice_by_step(probability, label)
    for k in (1, 60, 128, 255):
        by_hand = metrics.measures((probability >= k).astype(np.uint8), label)["dice"]
        assert curve[k - 1] == pytest.approx(by_hand, abs=1e-12)
    mask = probability >= 240
    for size, got in zip((0, 3, 20), postprocessing.dice_by_size(mask, label, (0, 3, 20)), strict=True):
        by_hand = metrics.measures(metrics.without_specks(mask, size), label)["dice"]
        assert got == pytest.approx(by_hand, abs=1e-12)
    nothing = np.zeros_like(label)
    assert postprocessing.dice_by_step(nothing, nothing).tolist() == [1.0] * 255
    assert [postprocessing.step(t) for t in (0.5, 127.5 / 255, 128.5 / 255, 1e-6)] == [128, 128, 129, 1]
    logits = np.array([-99, -1, 0, 1, 99], np.float32)
    assert postprocessing.quantised(logits).tolist() == [0, 69, 128, 186, 255]


def test_the_best_of_both_is_chosen_and_ties_keep_the_usual(tmp_path):
    label = np.zeros((16, 16, 16), np.uint8)
    label[4:8] = 1
    probability = np.where(label == 1, 200, 150).astype(np.uint8)  # above 0.5 everywhere
    probability[12, 2:5, 2] = 220  # a speck as sure as the sheet
    one = Volume("one", "", str(tmp_path / "l.tif"))
    stacks.write_stack(tmp_path / "l.tif", label)
    stacks.write_stack(tmp_path / "p" / "one.tif", probability)
    chosen = postprocessing.choose_by_dice([one], tmp_path / "p", "auto", "auto")
    assert postprocessing.step(chosen.threshold) == 151  # the nearest to 0.5 of those that part them
    assert (chosen.min_component, chosen.dice_after) == (10, 1.0)
    assert chosen.dice_before == pytest.approx(2 * 1024 / (4096 + 1024))
    assert np.array_equal(chosen.mask(probability), label)
    assert postprocessing.choose_by_dice([one], tmp_path / "p", 0.9, "auto").threshold == 0.9
    assert postprocessing.choose_by_dice([one], tmp_path / "p", "auto", 0).min_component == 0


def test_a_choice_is_read_for_the_same_weights_and_settings_alone(tmp_path, capsys):
    made_for = {"weights": [1], "settings": [8]}
    (tmp_path / "a.json").write_text(Choice(0.3, 30, 2, 0.5, 0.6, made_for).to_json())

    def known(held, *given, **changes):
        return postprocessing.known(*(given or ("auto", "auto")), {**made_for, **changes}, [tmp_path / "a.json"], held)

    assert known(True) == Choice.read(tmp_path / "a.json", made_for) != Choice()
    assert known(True, 0.4, 7) == Choice(0.4, 7)
    assert known(True, settings=[9]) is None
    assert known(False, settings=[9]).threshold == 0.3  # there is nothing to choose anew on
    assert known(False, weights=[2]) == Choice()
    assert "to choose threshold and min_component on; using threshold 0.500" in capsys.readouterr().out
    for content in ("{", "[1]", '{"other": 1}', '{"threshold": 2}'):
        (tmp_path / "a.json").write_text(content)
        assert known(True) is None


def test_what_is_chosen_on_held_out_volumes_makes_all_masks_and_is_kept(tmp_path, scrolls, monkeypatch, capsys):
    config = small(tmp_path, scrolls, threshold="auto", min_component="auto", save_probabilities=True)
    out, task = Path(config.output_dir), SurfaceSegmentation(config)
    weights(out / "model.safetensors")
    stages._write(out, stages._untrained(config))
    result = ss.infer(config, task)
    assert result.finished
    chosen = Choice(**json.loads((out / "postprocessing.json").read_text()))
    assert (chosen.volumes, chosen.dice_after) == (2, pytest.approx(result.metrics["volume_dice"], abs=1e-12))
    assert chosen.dice_after > chosen.dice_before
    assert f"chosen on 2 held-out volumes: Dice {chosen.dice_before:.4f} -> " in capsys.readouterr().out
    masks = sorted((out / "predictions").glob("*/*.tif"))
    assert len(masks) == 3
    for mask in masks:
        probability = stacks.read_stack(str(out / "predictions" / "probabilities" / mask.parent.name / mask.name))
        assert np.array_equal(stacks.read_stack(str(mask)), chosen.mask(probability))
    # another run with these weights and settings reads the choice and makes the same masks
    monkeypatch.setattr(stages, "choose_by_dice", lambda *_: pytest.fail("chosen anew"))
    alone = config.replace(weights=str(out / "model.safetensors"), output_dir=str(tmp_path / "b"))
    alone = alone.replace(save_probabilities=False)
    assert ss.infer(*_begun(alone)).metrics == result.metrics
    monkeypatch.undo()
    monkeypatch.setenv("KAGGLE_MGPU_KAGGLE_ROOT", str(tmp_path / "kaggle"))
    # two processes choose the same; what they needed for it alone does not stay
    two = alone.replace(output_dir=str(tmp_path / "two"), strategy="ddp", nproc=2)
    (out / "postprocessing.json").unlink()
    assert launch(ss.infer, *_begun(two)).metrics == pytest.approx(result.metrics, abs=1e-9)
    for mask in masks:
        other = tmp_path / "two" / mask.relative_to(out)
        assert other.read_bytes() == mask.read_bytes()
    assert not (tmp_path / "two" / "predictions" / "probabilities").exists()
    assert (tmp_path / "two" / "predictions" / "postprocessing.json").is_file()
    assert not (out / "postprocessing.json").exists()


def _begun(config):
    stages._write(Path(config.output_dir), stages._untrained(config))
    return config, SurfaceSegmentation(config)


def test_probabilities_of_a_killed_session_are_not_computed_again(tmp_path, scrolls, monkeypatch):
    given = weights(tmp_path / "w.safetensors")
    config = small(tmp_path, scrolls, threshold="auto", weights=given)
    with monkeypatch.context() as patch:
        patch.setattr(stages, "choose_by_dice", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            ss.infer(*_begun(config))
    earlier = tmp_path / "kaggle" / "input" / "notebooks" / "me" / "earlier"
    earlier.parent.mkdir(parents=True)
    Path(config.output_dir).rename(earlier)
    windows, whole = [], inference.sliding_window
    monkeypatch.setattr(
        inference, "sliding_window", lambda *given, **options: (windows.append(1), whole(*given, **options))[1]
    )
    assert ss.infer(*_begun(config)).finished
    assert len(windows) == 1, "of the test volume"


def test_several_weights_predict_by_their_mean(tmp_path, scrolls):
    files = [weights(tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2)]
    config = small(tmp_path, scrolls, weights=",".join(files), save_probabilities=True, tta_axes=(2,))
    assert ss.infer(*_begun(config)).finished
    models = [UNet(4, 1).eval() for _ in files]
    for model, file in zip(models, files, strict=True):
        model.load_state_dict(read_tensors(Path(file)))
    forward = ensemble.averaged(models, (2,))
    grey = stacks.read_stack(str(scrolls / "test_images" / "synthetic_5.tif"))
    wanted = np.concatenate([slab for _, slab in inference.sliding_window(forward, grey, size=8)])
    found = Path(config.output_dir) / "predictions" / "probabilities" / "test" / "synthetic_5.tif"
    assert np.array_equal(stacks.read_stack(str(found)), postprocessing.quantised(wanted))
    assert config.replace(weights=files).weight_files == config.weight_files == tuple(files)
    stamp = json.loads((found.parents[2] / "stamp.json").read_text())
    assert len(stamp["weights"]) == 2
    with pytest.raises(ValueError, match=r"weights: expected best, final or \.safetensors files, got 'best,"):
        config.replace(weights=f"best,{files[0]}")
    with pytest.raises(FileNotFoundError, match=r"weights: no such file: .*3\.safetensors"):
        ss.infer(config.replace(weights=[files[0], str(tmp_path / "3.safetensors")]), SurfaceSegmentation(config))


# Folds
def test_volumes_of_a_scroll_stay_in_one_fold_and_each_volume_is_held_out_once():
    scrolls = dict(zip("abcdefgh", ["one"] * 4 + ["two"] * 2 + ["three", ""], strict=True))
    volumes = [Volume(name, name, name, scroll) for name, scroll in scrolls.items()]
    parts = data.folds_of(volumes, 3)
    assert sorted(len(part) for part in parts) == [2, 2, 4]
    assert sorted(volume.id for part in parts for volume in part) == sorted(scrolls)
    for part in parts:
        assert not {v.scroll for v in part} & {v.scroll for other in parts if other is not part for v in other}
    alone = data.folds_of([Volume(name, name, name, "one") for name in scrolls], 3)
    assert sorted(len(part) for part in alone) == [2, 3, 3]
    assert alone == data.folds_of([Volume(name, name, name, "one") for name in reversed(scrolls)], 3)
    for wrong in (1, 5):
        with pytest.raises(ValueError, match=f"folds: expected 2 to 4, the number of scrolls with labels, got {wrong}"):
            data.folds_of(volumes, wrong)
    with pytest.raises(ValueError, match=r"Config\.fold: expected 0 to 4 \(below folds\), got 5"):
        Config(folds=5, fold=5)
    with pytest.raises(ValueError, match=r"Config\.fold: fold=1 needs folds, the number of folds"):
        Config(fold=1)


def test_cross_validation_refuses_given_weights(tmp_path, scrolls):
    with pytest.raises(ValueError, match=r"weights: expected best or final, got 'a\.safetensors'"):
        ss.cross_validate(small(tmp_path, scrolls, weights="a.safetensors"), 2)


def test_folds_are_trained_and_measured_and_predict_by_their_mean(tmp_path, scrolls, capsys):
    config = small(tmp_path, scrolls, max_steps=1, nproc=2)
    found = ss.cross_validate(config, 2)
    assert found.volumes == [("synthetic_0", "synthetic_1", "synthetic_2"), ("synthetic_3", "synthetic_4")]
    folders = sorted((tmp_path / "run" / "2-fold").iterdir())
    for folder, held, figures in zip(folders, found.volumes, found.figures, strict=True):
        rows = json.loads((folder / "predictions" / "held_out" / "figures.json").read_text())
        assert sorted(rows) == [*held]
        assert figures["dice"] == pytest.approx(np.mean([row["dice"] for row in rows.values()]))
        assert not [*(folder / "predictions" / "test").iterdir()], "five times the work, and for nothing"
    assert float(str(found).splitlines()[-2].split()[1]) == pytest.approx(
        np.mean([row["dice"] for row in found.figures]), abs=1e-4
    )
    shutil.rmtree(folders[0] / "predictions")  # the choice is also beside the weights
    assert ss.cross_validate(config, 2) == found
    ensemble = found.ensemble(config)
    assert ensemble.threshold == np.mean([choice.threshold for choice in found.choices])
    assert ss.run(ensemble.replace(nproc=1)).finished
    stamp = json.loads((folders[0].parent / "ensemble" / "predictions" / "stamp.json").read_text())
    assert stamp["weights"] == [stages._checksum(Path(file)) for file in found.weights]
    assert (folders[0].parent / "ensemble" / "submission.zip").is_file()
    assert found.ensemble(config.replace(threshold=0.3, min_component=7)).threshold == 0.3
    shutil.copytree(folders[0], tmp_path / "kaggle" / "input" / "notebooks" / "me" / "earlier" / "fold0")
    for fold, trained in ((0, True), (1, False)):  # in the next session
        task = SurfaceSegmentation(config.replace(folds=2, fold=fold, output_dir=str(tmp_path / "next")))
        assert task.split[2] == f"fold {fold} of 2"
        assert task._trained() == trained
