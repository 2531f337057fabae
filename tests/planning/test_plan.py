"""plan: what is counted is compared with what torch holds, what is estimated with the arithmetic by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from kaggle_mgpu import Task, TrainConfig, devices, plan
from kaggle_mgpu.__main__ import main
from kaggle_mgpu.planning import Target, compare, planner
from kaggle_mgpu.planning.compare import Measured
from kaggle_mgpu.planning.counts import Facts, count_all
from kaggle_mgpu.planning.estimate import BUCKET, PUBLISHED, REACHED, exchange
from kaggle_mgpu.planning.selftest import all_reduce_bandwidth
from kaggle_mgpu.training import count_parameters
from tasks import Regression

WIDTH, SAMPLES, VAL = 64, 1000, 300


class Wide(Task):
    """Two matrices of 64 x 64 without biases: everything about it can be worked out by hand."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh(), nn.Linear(WIDTH, WIDTH, bias=False))

    def train_data(self) -> Dataset[Any]:
        return TensorDataset(torch.zeros(SAMPLES, WIDTH))

    def val_data(self) -> Dataset[Any] | None:
        return TensorDataset(torch.zeros(VAL, WIDTH))

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0]).square().sum()


def count(config: TrainConfig, task: Task, half: bool, *, on_cpu: bool = False) -> Facts:
    return count_all([(config, task, half)], on_cpu=on_cpu)[0]


def test_what_is_counted() -> None:
    facts = count(TrainConfig(), Wide(), half=False)
    matrix = WIDTH * WIDTH
    assert (facts.dataset_size, facts.val_samples, facts.parameters) == (SAMPLES, VAL, 2 * matrix)
    assert (facts.weight_bytes, facts.gradient_bytes) == (8 * matrix, 8 * matrix)
    # AdamW: two moments and a step count for each of the two
    assert facts.optimizer_bytes == 16 * matrix + 2 * 4
    # a matrix takes 2 operations a weight forward, as many for its own gradient, and for its input's, but the first
    assert facts.operations == 2 * matrix * (3 + 2)
    # forward: two products, tanh, the square, its sum; backward: a product for each gradient, and what is around them
    assert 5 + 3 <= facts.operators <= 25
    # kept: the input, tanh's output (also the second matrix's input), what is squared
    assert facts.sample_bytes == 3 * WIDTH * 4
    assert facts.fixed_bytes == 0


def test_half_precision_keeps_copies_of_the_weights_and_half_of_the_rest() -> None:
    facts = count(TrainConfig(), Wide(), half=True)
    # both inputs in half, tanh's own output again, and square's (fp32 under autocast: its input in half and fp32)
    assert facts.fixed_bytes > 0
    assert facts.sample_bytes < 3 * WIDTH * 4
    assert facts.weight_bytes == 8 * WIDTH * WIDTH


class Outer(Wide):
    """A product with more entries than any memory holds: 2^42 numbers for each sample."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        long = model(batch[0]).sum(1, keepdim=True).expand(-1, 2**21)
        return (long[:, :, None] * long[:, None, :]).sum()


def test_the_cost_is_counted_without_computing_anything() -> None:
    facts = count(TrainConfig(), Outer(), half=False)
    assert facts.sample_bytes < 2**30, "what is kept of an expanded number is the number"
    matrix = WIDTH * WIDTH
    assert facts.operations == 2 * matrix * (3 + 2)


class Looks(Wide):
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        out = model(batch[0]).square().sum()
        return out if out.item() >= 0 else -out


def test_a_loss_that_looks_at_values_is_counted_all_the_same() -> None:
    looks, wide = count(TrainConfig(), Looks(), half=False), count(TrainConfig(), Wide(), half=False)
    assert looks == dataclasses.replace(wide, operators=wide.operators + 1), "the look is an operator"


def test_weights_of_four_bits_are_counted_by_their_own_shape() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(WIDTH, 2 * WIDTH, bias=True, quant_type="nf4")
    layer = layer.to("cpu")
    packed = sum(p.numel() for p in layer.parameters())
    assert packed < 2 * WIDTH * WIDTH, "two weights in a byte"
    assert count_parameters(layer) == 2 * WIDTH * WIDTH + 2 * WIDTH


class Normed(Wide):
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.GroupNorm(4, WIDTH))


def test_a_gpu_keeps_group_norm_in_fp32_under_autocast_and_a_cpu_does_not() -> None:
    gpu = count(TrainConfig(), Normed(), half=True)
    cpu = count(TrainConfig(), Normed(), half=True, on_cpu=True)
    # kept on a GPU beyond a CPU's: the norm's input in fp32, not half; its output, which is squared, and the statistics
    assert gpu.sample_bytes >= cpu.sample_bytes + 2 * WIDTH
    assert gpu.sample_bytes >= (4 + 4 + 2) * WIDTH, "the norm's input and the square's in fp32, the layer's in half"


def test_steps_that_take_too_long_on_a_cpu_are_estimated_and_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "MEASURING_SECONDS", 0.0)
    monkeypatch.setattr(compare, "measure", lambda *_: pytest.fail("steps were taken"))
    found = plan(TrainConfig(global_batch_size=100, nproc=1), Wide())
    assert found.step_seconds is not None and found.seconds is not None
    assert "ESTIMATE, since measuring would take too long: 4.1e+06 operations" in str(found)


@pytest.mark.parametrize("recipe", ["activity_recognition", "sft"])
def test_a_recipe_is_planned_with_its_defaults(recipe: str, tmp_path: Any, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", recipe, "--on", "T4x2"]) == 0
    assert "on 2 x T4: strategy ddp, precision fp16" in capsys.readouterr().out


def test_a_recipe_of_several_stages_plans_them_all(capfd: pytest.CaptureFixture[str]) -> None:
    few = ["--scenes", "40", "--val-scenes", "4", "--preset", "fast"]
    assert main(["plan", "camouflage_segmentation", "--on", "T4x2", *few]) == 0
    said = capfd.readouterr().out
    batch = 32
    assert said.count(f"global batch {batch} = {batch // 2} per GPU x 2 GPUs") == 4
    for number, name in enumerate(["stage1", "stage2-1", "stage2-2", "stage2-3"], 1):
        assert f"{name} ({number} of 4)" in said
    each = 40 // batch + 1
    assert f"all 4 runs together: {each * (2 + 1 + 1 + 30)} steps, " in said


def test_an_estimate_is_the_arithmetic_of_the_docstring() -> None:
    config = TrainConfig(global_batch_size=100, gradient_accumulation_steps=2, epochs=3, eval_every=7)
    found = plan(config, Wide(), on="T4x2")
    facts = count(config, Wide(), half=True)
    gpu = PUBLISHED["T4"]
    assert found.sentence == (
        "global batch 100 = 25 per GPU x 2 GPUs x 2 accumulation steps; 1,000 samples, 10 steps an epoch, "
        "30 steps in all"
    )
    assert (found.strategy, found.precision, found.max_steps, found.measured_memory) == ("ddp", "fp16", 30, None)
    moving = (4 * (facts.fixed_bytes + 25 * facts.sample_bytes) + 3 * facts.weight_bytes) / gpu.bandwidth
    micro_step = max(25 * facts.operations / gpu.peak["fp16"] / REACHED, moving / REACHED, facts.operators * 1e-5)
    assert micro_step == facts.operators * 1e-5, "so small a model waits for its operators"
    optimizer = 2 * (facts.weight_bytes + facts.gradient_bytes + facts.optimizer_bytes) / gpu.bandwidth / REACHED
    exchange = (
        facts.gradient_bytes / gpu.link_bandwidth
    )  # 2 (n - 1) / n is 1 for two; below one bucket nothing is hidden
    assert found.step_seconds == pytest.approx(2 * micro_step + optimizer + exchange)
    assert found.seconds == pytest.approx(found.step_seconds * (30 + 5 * VAL / 3 / 100))
    assert (found.sessions, found.quota) == (1, pytest.approx(found.seconds / 30 / 3600))
    assert found.exchange is not None and found.exchange.exposed == pytest.approx(exchange)
    alone = 2 * (found.step_seconds - exchange)
    assert found.speedup == pytest.approx(alone / (alone / 2 + exchange))
    text = str(found)
    assert "ESTIMATE from T4's published figures, assuming that 33% of them are reached" in text
    assert "through shared memory, since two T4s have no peer access; NCCL's own figure for PCIe 3.0 x16" in text
    assert "2 GPUs over 1   up to " in text


def test_a_long_run_takes_sessions_and_quota(tmp_path: Path) -> None:
    once = plan(TrainConfig(max_steps=1, eval_every="end"), Regression(val_samples=0), on="T4")
    assert once.step_seconds is not None and (once.strategy, once.precision) == ("single", "fp16")
    steps = round(30 * 3600 / once.step_seconds)
    found = plan(TrainConfig(max_steps=steps, eval_every="end"), Regression(val_samples=0), on="T4")
    assert (found.sessions, found.quota) == (3, pytest.approx(1.0, rel=1e-3))
    assert "3 sessions of 12 h; 100.0 % of the week's 30 h" in str(found)
    assert "30 h 00 min" in str(found)


def test_a_gpu_that_is_not_known_is_unknown_and_no_guess() -> None:
    found = plan(TrainConfig(global_batch_size=8), Wide(), on="B300x2")
    assert (found.step_seconds, found.seconds, found.sessions, found.quota, found.speedup) == (None,) * 5
    text = str(found)
    assert "global batch 8 = 4 per GPU x 2 GPUs" in text
    assert "time            unknown: kaggle_mgpu has no figures of B300; known: T4, L4, A100, H100, A100-80GB, " in text
    assert f"2 GPUs over 1   unknown\n{'':15} the time of a step is not known" in text
    assert " of " not in text.split("memory per GPU")[1].splitlines()[0], "its memory is not known either"


@pytest.mark.parametrize(
    ("text", "name", "count"),
    [
        ("T4x2", "T4", 2),
        ("a100", "A100", 1),
        ("Tesla T4 x 2", "T4", 2),
        ("NVIDIA L4x4", "L4", 4),
        ("B300x8", "B300", 8),
        ("H200x4", "H200", 4),
        ("A100-80GBx2", "A100-80GB", 2),
        ("RTX4090x2", "RTX4090", 2),
        ("RTX4090", "RTX4090", 1),
        ("NVIDIA GeForce RTX 4090 x 2", "RTX4090", 2),
    ],
)
def test_names(text: str, name: str, count: int) -> None:
    found = Target.named(text)
    assert (found.name, found.count) == (name, count)
    assert (found.published is not None) == (name in PUBLISHED)


def test_the_gpus_of_the_example_settings_have_figures() -> None:
    assert {"T4", "L4", "A100-80GB", "H200", "RTX4090"} <= set(PUBLISHED)  # notebooks/configs


@pytest.mark.parametrize("text", ["", "2", "T4x0", "T4 and L4", 2])
def test_no_name(text: str) -> None:
    with pytest.raises(ValueError, match="expected a GPU and how many, such as 'T4x2'; known GPUs: T4, L4"):
        Target.named(text)


@pytest.mark.parametrize("text", ["T4x", "T4x-2", "t4X"])
def test_no_number(text: str) -> None:
    with pytest.raises(ValueError, match=r"how many\? Did you mean 'T4x2'\?"):
        Target.named(text)


@pytest.mark.parametrize(
    ("name", "known"),
    [("Tesla T4", "T4"), ("NVIDIA A100-SXM4-40GB", "A100"), ("NVIDIA L4", "L4"), ("NVIDIA L40S", None), ("B200", None)],
)
def test_gpus_at_hand_are_recognised_by_their_whole_name(name: str, known: str | None) -> None:
    found = Target.at_hand([devices.GPU(0, name, 15 << 30, (7, 5))])
    assert found.published is (PUBLISHED[known] if known else None)


def test_settings_that_cannot_be_are_the_errors_of_a_run() -> None:
    with pytest.raises(ValueError, match="global_batch_size 9 cannot be shared by 2 replicas"):
        plan(TrainConfig(global_batch_size=9), Wide(), on="T4x2")
    with pytest.raises(ValueError, match=r"precision='bf16': T4 has capability 7\.5"):
        plan(TrainConfig(precision="bf16"), Wide(), on="T4")
    with pytest.raises(ValueError, match="nproc=4, but the plan is for 2 x T4: expected at most 2"):
        plan(TrainConfig(nproc=4), Wide(), on="T4x2")


def test_the_micro_batch_that_is_to_be_found_is_reckoned() -> None:
    class Long(Wide):
        def loss(self, model: nn.Module, batch: Any) -> Tensor:
            x = batch[0][:, None, :].expand(-1, 20_000, -1)  # 15 MB a sample are kept, three times
            return model(x).square().sum()

    found = plan(TrainConfig(micro_batch_size="auto", global_batch_size=4096, precision="fp32"), Long(), on="T4")
    facts = count(TrainConfig(), Long(), half=False)
    assert found.precision == "fp32"
    assert found.micro_batch_size == 512
    assert facts.activations(512) < 0.9 * PUBLISHED["T4"].memory_bytes < facts.activations(2048)
    tight = plan(TrainConfig(micro_batch_size=4096, global_batch_size=4096, precision="fp32"), Long(), on="T4")
    assert any("micro_batch_size=512 with 8 accumulation steps gives the same batch" in text for text in tight.advice)


def facts(**changes: Any) -> Facts:
    values = {"dataset_size": 100, "val_samples": 0, "parameters": 25_000_000, "weight_bytes": 10**8}
    values |= {
        "gradient_bytes": 10**8,
        "optimizer_bytes": 2 * 10**8,
        "operations": 1e9,
        "operators": 9,
        "fixed_bytes": 0.0,
    }
    return Facts(**{**values, "sample_bytes": 1e6, **changes})


def test_an_exchange_hides_behind_the_backward_pass_but_for_its_last_bucket() -> None:
    got = exchange(facts(), 2, micro_step=3.0, link=1e8, source="")
    assert (got.seconds, got.hidden) == (1.0, 2.0)
    assert got.exposed == pytest.approx(BUCKET / 10**8)
    longer = exchange(facts(), 4, micro_step=0.3, link=1e8, source="")
    assert longer.seconds == pytest.approx(1.5)
    assert longer.exposed == pytest.approx(1.5 - 0.2)


def test_what_other_strategies_send_and_hold() -> None:
    whole = exchange(facts(), 2, micro_step=3.0, link=1e8, source="", strategy="fsdp")
    assert whole.seconds == pytest.approx(1.5)
    in_each = exchange(facts(), 2, micro_step=3.0, link=1e8, source="", strategy="fsdp", accumulation=2)
    assert (in_each.seconds, in_each.hidden) == (pytest.approx(3.0), pytest.approx(4.0))
    through_one = exchange(facts(), 3, micro_step=3.0, link=1e8, source="", strategy="dp", accumulation=2)
    assert (through_one.seconds, through_one.exposed) == (pytest.approx(8.0), pytest.approx(8.0))
    assert facts().memory(2, shards=4) == {
        "weights": 25e6, "gradients": 25e6, "optimizer": 50e6, "activations": 2e6
    }  # fmt: skip
    assert sum(facts().memory(2, ema=True).values()) == 5e8 + 2e6


def test_two_gpus_under_dp_gain_less(tmp_path: Path) -> None:
    config = TrainConfig(global_batch_size=64, gradient_accumulation_steps=4)
    dp, ddp = (plan(config.replace(strategy=strategy), Wide(), on="T4x2") for strategy in ("dp", "ddp"))
    assert dp.speedup is not None and ddp.speedup is not None and dp.speedup < ddp.speedup
    assert "sending weights from the first GPU and gradients back to it" in str(dp)


def test_advice_where_the_exchange_is_what_takes_the_time() -> None:
    class Heavy(Wide):
        """One sample a GPU of a model with 64 MB of weights: nothing to hide behind."""

        def model(self) -> nn.Module:
            return nn.Sequential(nn.Linear(WIDTH, 4096), nn.Linear(4096, 4096), nn.Linear(4096, 1))

    found = plan(TrainConfig(global_batch_size=2, max_steps=10), Heavy(), on="T4x2")
    advice = "\n".join(found.advice)
    assert "gradient_accumulation_steps=2 halves its share" in advice
    assert "gradients sent as fp16" in advice
    assert found.speedup is not None and found.speedup < 1.7
    easy = plan(TrainConfig(global_batch_size=2, max_steps=10), Heavy(), on="A100x2")
    assert easy.speedup is not None and easy.speedup > found.speedup


def test_two_gpus_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured stands for what is published, also where nothing is."""
    gpus = [devices.GPU(index, "NVIDIA B300", 200 << 30, (10, 3)) for index in (0, 1)]
    measured = Measured([0.2, 0.1, 0.1], 60, 60, [3 << 30, 4 << 30], micro_batch_size=5)
    rate = {"gigabytes_per_s": 0.01, "peers": False}
    monkeypatch.setattr(devices, "select", lambda _: gpus)
    monkeypatch.setattr(devices, "sample", lambda: [{"index": i, "memory_used": i << 30} for i in (0, 1)])
    monkeypatch.setattr(compare, "measure", lambda config, task, steps: measured)
    monkeypatch.setattr(planner, "launch", lambda function, **_: [rate] if function is all_reduce_bandwidth else None)
    found = plan(TrainConfig(global_batch_size="per_gpu:10"), Wide())
    assert (found.strategy, found.precision, found.step_seconds, found.measured_memory) == ("ddp", "bf16", 0.1, 4 << 30)
    assert found.sentence.startswith(
        "global batch 20 (per_gpu:10: the weights depend on the number of GPUs) = 5 per GPU"
    )
    exchange = 8 * WIDTH * WIDTH / 1e7
    assert found.exchange is not None and found.exchange.exposed == pytest.approx(exchange)
    alone = 2 * (0.1 - exchange)
    assert found.speedup == pytest.approx(alone / (alone / 2 + exchange))
    text = str(found)
    assert "measured peak 4.0 GiB" in text
    assert "in use now      GPU 0 0.0 MiB, GPU 1 1.0 GiB" in text
    assert "2 GPUs over 1   1.93x expected\n" in text
    assert "at 0.0 GB/s" in text and "the link between the GPUs: measured here, without peer access" in text


def test_what_does_not_fit_here_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Large(Wide):
        def loss(self, model: nn.Module, batch: Any) -> Tensor:
            if len(batch[0]) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().loss(model, batch)

    facts = count(TrainConfig(), Large(), half=False)
    assert (facts.sample_bytes, facts.fixed_bytes) == (3 * WIDTH * 4, 0), "counted with a single sample"
    found = plan(TrainConfig(global_batch_size=20, nproc=1), Large(), steps=1)
    assert (found.step_seconds, found.seconds) == (None, None)
    assert "time            unknown: out of memory with micro_batch_size 20" in str(found)
    assert found.advice[0].startswith("micro_batch_size='auto' finds the largest size that fits")


def test_here_and_now(tmp_path: Path) -> None:
    found = plan(
        TrainConfig(global_batch_size=20, epochs=2, nproc=2 if not devices.gpus() else "auto"), Wide(), steps=3
    )
    assert found.step_seconds is not None and found.seconds is not None
    assert "measured here over 3 steps" in str(found)
    if not devices.gpus():
        assert found.seconds == pytest.approx(found.step_seconds * (100 + 2 * VAL / 3 / 20))
        assert (found.speedup, found.sessions, found.quota) == (None, None, None)
        assert "on CPU: strategy ddp, precision fp32 (no GPU)" in str(found)
        assert "= 10 per process x 2 processes x 1 accumulation step" in str(found)
        assert "processes on a CPU share its cores; name GPUs for an estimate" in str(found)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    flags = "--tokenizer byte --n-layer 1 --n-head 1 --n-embd 8 --block-size 16 --global-batch-size 4 --max-steps 9"
    command = ["plan", "text_generation", *flags.split(), "--data-path", "text.txt", "--output-dir", "run"]
    assert main([*command, "--on", "T4x2"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("global batch 4 = 2 per GPU x 2 GPUs x 1 accumulation step; ")
    assert "9 steps in all" in said.out
    assert main([*command, "--on", "0"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("ValueError: on='0': expected a GPU and how many, such as 'T4x2'; known GPUs: ")
    assert len(said.err.splitlines()) == 1
