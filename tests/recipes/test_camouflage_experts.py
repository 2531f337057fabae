"""The camouflage recipe's decoder of seven kinds of experts: shapes, gradients, half precision, processes, old runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kaggle_mgpu.checkpoints import read_tensors
from kaggle_mgpu.checkpoints.format import read_facts, write_facts
from kaggle_mgpu.errors import CheckpointError
from kaggle_mgpu.launching import launch
from kaggle_mgpu.recipes.camouflage_segmentation import PRESETS, CamouflageSegmentation, Config, experts, model
from kaggle_mgpu.training import train
from test_camouflage_segmentation import _no_inputs, batch_of, tiny

__all__ = ["_no_inputs"]


def network(top_k: int | None = None) -> model.Segmenter:
    torch.manual_seed(0)
    body = model.Compact(8, (1, 1, 1, 1))
    net = model.Segmenter(body, width=8, num_experts=7, top_k=top_k, decoder=experts.ExpertsDecoder)
    for layer in (*net.decoder.refine, *(mixture.expand for mixture in net.decoder.mixtures)):  # type: ignore[union-attr]
        torch.nn.init.normal_(layer.weight, std=0.1)  # they begin at 0: after one step the experts have gradients
    return net


@pytest.mark.parametrize("kind", experts.KINDS)
def test_an_expert_keeps_the_shape_sees_one_image_and_takes_any_memory_format(kind: str) -> None:
    torch.manual_seed(0)
    expert = experts.KINDS[kind](64)
    for height, width in ((1, 1), (3, 5), (11, 10)):
        x = (1e3 * torch.randn(2, 64, height, width)).requires_grad_()
        together = expert(x)
        assert together.shape == x.shape
        assert torch.allclose(together[1:], expert(x[1:]), atol=1e-5)
        assert torch.allclose(together, expert(x.to(memory_format=torch.channels_last)), atol=1e-5)
        together.square().sum().backward()
        assert x.grad is not None and x.grad.isfinite().all()
    with torch.autocast("cpu", torch.float16):
        assert expert(x).isfinite().all()


@pytest.mark.parametrize("size", [32, 96, 160])
def test_outputs_are_those_of_the_small_decoder(size: int) -> None:
    images, _ = batch_of(2)
    images = torch.nn.functional.interpolate(images, size)
    small = model.Segmenter(model.Compact(8, (1, 1, 1, 1)), width=8, num_experts=2)(images)
    output = network()(images)
    assert [logits.shape for logits in output.logits] == [logits.shape for logits in small.logits]
    assert output.boundary.shape == small.boundary.shape and output.balance.shape == (2,)


@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_the_gradient_does_not_depend_on_the_split_and_reaches_every_kind(top_k: int | None) -> None:
    images, masks = batch_of(4)
    gradients = []
    for cuts in ([4], [1, 3], [1, 1, 1, 1]):
        net = network(top_k).double()
        for image, mask in zip(images.split(cuts), masks.double().split(cuts), strict=True):
            model.loss_terms(net(image), mask, balance_weight=0.5).sum().backward()
        assert [name for name, p in net.named_parameters() if p.grad is None] == []
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
    for other in gradients[1:]:
        # losses are computed in fp32
        assert (other - gradients[0]).abs().max() < 1e-5 * gradients[0].abs().max()
    for number, kind in enumerate(experts.KINDS):  # at one scale at least, where a position uses few
        of_kind = [m.experts[number] for m in net.decoder.mixtures]  # type: ignore[union-attr]
        assert any(p.grad.abs().max() > 0 for expert in of_kind for p in expert.parameters()), kind


def test_the_mixture_is_the_weighted_sum_of_its_experts() -> None:
    torch.manual_seed(0)
    mixture = experts.Mixture(8, 9, top_k=2)  # two more than there are kinds: they come again, in turn
    assert [type(expert) for expert in mixture.experts[6:]] == [experts.Contrast, experts.Texture, experts.Attention]
    x = torch.randn(1, 8, 6, 5)
    out, _ = mixture(x)
    y = mixture.norm(x)
    weights, _ = model.gates(mixture.router(y), 2)
    assert ((weights > 0).sum(1) == 2).all()
    by_hand = x + mixture.expand.bias.view(1, -1, 1, 1)
    for number, expert in enumerate(mixture.experts):
        rows = slice(4 * number, 4 * number + 4)
        its = torch.nn.functional.conv2d(y, mixture.reduce.weight[rows], mixture.reduce.bias[rows])
        by_hand = by_hand + torch.nn.functional.conv2d(
            weights[:, number : number + 1] * expert(its), mixture.expand.weight[:, rows]
        )
    assert torch.allclose(out, by_hand, atol=1e-5)


def test_half_precision_and_gradient_checkpointing_change_little_and_nothing() -> None:
    images, masks = batch_of(1, 96)  # maps of 24, 12, 6 and 3: no powers of two
    gradients = []
    for on in (False, True):
        net = network(2).train()
        if on:
            net.gradient_checkpointing_enable()
        loss = model.loss_terms(net(images), masks, balance_weight=0.01).sum()
        loss.backward()
        gradients.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    with torch.autocast("cpu", torch.float16):
        output = net(images)
    assert model.loss_terms(output, masks, balance_weight=0.01).sum().item() == pytest.approx(loss.item(), rel=0.01)


class WithSGD(CamouflageSegmentation):
    def optimizer(self, model: torch.nn.Module, config: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=config.lr)


def test_two_processes_give_the_weights_of_one(tmp_path: Path) -> None:
    # Adam would hide a wrong scale
    values = {"decoder": "experts", "num_experts": 7, "routing": "topk", "ema_decay": None, "lr": 0.1, "max_steps": 2}
    sets = []
    for name, how in {"ddp": {"strategy": "ddp", "nproc": 2}, "single": {"strategy": "single"}}.items():
        config = tiny(tmp_path, **values, **how, output_dir=str(tmp_path / name)).settled(drawn=True)
        result = launch(train, config, WithSGD(config))
        assert (result.strategy, result.finished) == (name, True)
        sets.append(read_tensors(tmp_path / name / "model.safetensors"))
    torch.manual_seed(config.seed)
    begun = WithSGD(config).model().state_dict()
    for key, tensor in sets[0].items():
        assert (tensor - sets[1][key]).abs().max() <= 1e-5 * max(1.0, float(tensor.abs().max())), key
    moved = [key for key in begun if not torch.equal(begun[key], sets[1][key])]
    assert {key.split(".")[4] for key in moved if ".experts." in key} == {str(number) for number in range(7)}


def test_a_run_from_before_the_setting_is_gone_on_with_and_another_decoder_is_refused(tmp_path: Path) -> None:
    config = tiny(tmp_path, max_steps=1).settled(drawn=True)
    train(config, CamouflageSegmentation(config))
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    facts = read_facts(saved)
    assert facts["config"].pop("decoder") == "small"
    write_facts(saved, facts.pop("files"), facts)
    longer = config.replace(max_steps=2)
    other = longer.replace(decoder="experts")
    with pytest.raises(CheckpointError, match="decoder was 'small', is 'experts'"):
        train(other, CamouflageSegmentation(other))
    result = train(longer, CamouflageSegmentation(longer))
    assert result.step == 2 and [r["step"] for r in result.records() if r["kind"] == "start"] == [0, 1]


def test_the_experts_own_values_of_each_preset() -> None:
    for preset, values in PRESETS.items():
        small, large = (Config(preset=preset, decoder=name).settled(drawn=False) for name in ("small", "experts"))  # type: ignore[arg-type]
        assert (small.decoder_width, small.num_experts) == (values["decoder_width"], values["num_experts"])
        assert large.num_experts == len(experts.KINDS) and large.image_size == small.image_size
    assert Config(decoder="experts", preset="fast", routing="topk", top_k=7).settled(drawn=True).top_k == 7
    with pytest.raises(ValueError, match="top_k: expected at most num_experts = 7, got 8"):
        Config(decoder="experts", routing="topk", top_k=8)
