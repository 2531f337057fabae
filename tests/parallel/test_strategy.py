"""From micro-batches to gradients and steps: precision, clipping, skipping, replicas, and state that fits them all."""

from __future__ import annotations

import itertools
import re
import warnings
from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kaggle_mgpu import distributed, launch
from kaggle_mgpu.parallel import Distributed, Replicated, Strategy, choose_strategy
from kaggle_mgpu.parallel.data_parallel import CPUReplicas
from kaggle_mgpu.parallel.state import load_named_optimizer_state, named_optimizer_state

Pair = namedtuple("Pair", "x y")
CPU = torch.device("cpu")


class Net(nn.Module):
    """Nested modules, a weight used twice, a buffer, and a note of the dtype and thread-visible state of each pass."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(4, 4)
        self.body = nn.Sequential(nn.Tanh(), nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
        self.head = nn.Linear(4, 4)
        self.head.weight = self.first.weight
        self.register_buffer("shift", torch.tensor(0.5))
        self.seen: list[tuple[torch.dtype, bool, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.body(self.first(x)) + self.shift)
        self.seen.append((y.dtype, torch.is_grad_enabled(), self.training))
        return y


def loss(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return (model(x) - y).square().sum()


def metrics(model: nn.Module, batch: Any) -> dict[str, tuple[Tensor, int]]:
    x, y = batch
    difference = model(x) - y
    return {"loss": (difference.square().sum(), len(x)), "outer": (difference.T @ difference, len(x))}


def make(
    kind: type[Strategy], model: nn.Module, precision: str = "fp32", replicas: int = 1, loss: Any = loss
) -> Strategy:
    strategy = kind(loss, metrics, precision=precision, device=CPU, num_replicas=replicas)
    assert strategy.prepare(model) is model
    return strategy


def samples(count: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, generator=generator), torch.randn(count, 4, generator=generator)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).clone()


def one_step(strategy: Strategy, optimizer: Any, batch: Any, terms: int, max_norm: float | None = None) -> Tensor:
    strategy.backward(batch, 1.0, lambda: terms)
    return strategy.step(optimizer, max_norm=max_norm)


ALL = [(Strategy, 1), (Replicated, 2), (Replicated, 3)]


class TestGradients:
    @pytest.mark.parametrize(("kind", "replicas"), ALL)
    @pytest.mark.parametrize("max_norm", [None, 1e-2, 1e6])
    def test_clipping_is_torchs_on_the_mean_loss(
        self, kind: type[Strategy], replicas: int, max_norm: float | None
    ) -> None:
        x, y = samples(11)
        model, other = Net(), Net()
        other.load_state_dict(model.state_dict())
        strategy, optimizer = make(kind, model, replicas=replicas), torch.optim.SGD(model.parameters(), lr=0.5)
        total = 0.0
        for part in (slice(0, 5), slice(5, 6), slice(6, 11)):  # 5 samples for 2 and 3 replicas, 1 for either
            total += float(strategy.backward((x[part], y[part]), 1.0, lambda: 11))
        norm = strategy.step(optimizer, max_norm=max_norm)

        mean = loss(other, (x, y)) / 11
        mean.backward()
        expected = nn.utils.clip_grad_norm_(other.parameters(), max_norm or float("inf"))
        torch.optim.SGD(other.parameters(), lr=0.5).step()
        assert norm.item() == pytest.approx(expected.item(), rel=1e-5)
        assert total / 11 == pytest.approx(mean.item(), rel=1e-5)
        torch.testing.assert_close(flat(model), flat(other), rtol=1e-5, atol=1e-6)
        assert all(p.grad is None for p in model.parameters()), "the next step begins with none"

    @pytest.mark.parametrize(("kind", "replicas"), ALL)
    def test_a_stand_in_gives_no_gradient_and_no_loss(self, kind: type[Strategy], replicas: int) -> None:
        model = Net()
        strategy = make(kind, model, replicas=replicas)
        strategy.backward(samples(4), 1.0, lambda: 4)
        alone = gradient(model)
        assert float(strategy.backward(samples(1, seed=9), 0.0, lambda: 4)) == 0
        assert torch.equal(gradient(model), alone)

    @pytest.mark.parametrize(("kind", "replicas"), ALL)
    def test_the_loss_must_be_a_scalar(self, kind: type[Strategy], replicas: int) -> None:
        for wrong, says in (
            (lambda model, batch: model(batch[0]).square(), r"shape \(\d, 4\)"),
            (lambda model, batch: model(batch[0]).sum().reshape(1), r"shape \(1,\)"),
            (lambda model, batch: model(batch[0]).sum().item(), "a float"),
            (lambda model, batch: {"loss": model(batch[0]).sum()}, "a dict"),
        ):
            strategy = make(kind, Net(), replicas=replicas, loss=wrong)
            with pytest.raises(
                ValueError,
                match=f"^Task.loss must return a scalar tensor, the sum over the batch's terms, or .*; got {says}$",
            ):
                strategy.backward(samples(6), 1.0, lambda: 6)

    def test_a_step_without_any_term(self) -> None:
        strategy = make(Strategy, Net())
        with pytest.raises(ValueError, match=r"^Task.count gave 0 for every batch of this step, so its loss has no"):
            strategy.backward(samples(2), 1.0, lambda: 0)

    def test_frozen_parameters_stay_and_do_not_count(self) -> None:
        x, y = samples(6)
        for kind, replicas in ALL:
            model = Net()
            model.body.requires_grad_(False)
            frozen = [p.clone() for p in model.body.parameters()]
            strategy = make(kind, model, replicas=replicas)
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)  # frozen ones too, as people do
            before = flat(model)
            norm = one_step(strategy, optimizer, (x, y), 6, 1.0)
            assert all(map(torch.equal, frozen, model.body.parameters()))
            assert not torch.equal(flat(model), before)
            trainable = [p for p in model.parameters() if p.requires_grad]
            model.load_state_dict({**model.state_dict(), **Net().state_dict()})
            (loss(model, (x, y)) / 6).backward()
            assert norm.item() == pytest.approx(nn.utils.get_total_norm([p.grad for p in trainable]).item(), rel=1e-5)
            state = strategy.full_state(optimizer)
            assert not [name for name in state["optimizer"]["state"] if name.startswith("body")]
            strategy.load_full_state(optimizer, state)


@pytest.mark.parametrize("dtypes", [[torch.float32] * 3, [torch.bfloat16] * 2, [torch.float32, torch.float16], []])
def test_the_norm_has_the_bits_of_torchs_function(dtypes: list[torch.dtype]) -> None:
    torch.manual_seed(0)
    gradients = [torch.randn(257, 3).to(dtype) for dtype in dtypes]
    norm = make(Strategy, Net()).total_norm(gradients)
    expected = nn.utils.get_total_norm(gradients)
    assert norm.dtype == expected.dtype and torch.equal(norm, expected)


class TestNotFinite:
    @pytest.mark.parametrize(("kind", "replicas"), ALL)
    @pytest.mark.parametrize("bad", [float("inf"), float("nan")])
    def test_fp32_leaves_the_step_out(self, kind: type[Strategy], replicas: int, bad: float) -> None:
        model = Net()
        strategy, optimizer = make(kind, model, replicas=replicas), torch.optim.AdamW(model.parameters(), lr=0.1)
        one_step(strategy, optimizer, samples(5), 5, 1.0)
        before, state = flat(model), named_optimizer_state(model, optimizer)
        x, y = samples(5)
        x[4, 2] = bad
        assert not one_step(strategy, optimizer, (x, y), 5, 1.0).isfinite()
        assert torch.equal(flat(model), before)
        assert same(named_optimizer_state(model, optimizer), state)
        assert int(strategy.skipped) == 1
        one_step(strategy, optimizer, samples(5), 5, 1.0)
        assert flat(model).isfinite().all()
        assert not torch.equal(flat(model), before)
        assert int(strategy.skipped) == 1

    @pytest.mark.parametrize(("kind", "replicas"), ALL)
    def test_fp16_leaves_it_out_and_halves_the_scale(self, kind: type[Strategy], replicas: int) -> None:
        model, exact = Net(), Net()
        strategy, optimizer = make(kind, model, "fp16", replicas), torch.optim.SGD(model.parameters(), lr=0.1)
        norm = one_step(strategy, optimizer, samples(6), 600, 0.01)
        (loss(exact, samples(6)) / 600).backward()
        expected = nn.utils.clip_grad_norm_(exact.parameters(), 0.01)
        torch.optim.SGD(exact.parameters(), lr=0.1).step()
        # clipped after unscaling: what the scale is does not show
        assert norm.item() == pytest.approx(expected.item(), rel=0.01)
        torch.testing.assert_close(flat(model), flat(exact), rtol=0, atol=2e-5)
        assert {dtype for dtype, *_ in model.seen} == {torch.float16}
        assert strategy.scaler.get_scale() == 65536

        before = flat(model)
        x, y = samples(6)
        y[0, 0] = float("inf")
        one_step(strategy, optimizer, (x, y), 600, 0.01)
        assert torch.equal(flat(model), before)
        assert strategy.scaler.get_scale() == 32768
        assert int(strategy.skipped) == 1
        # a scale that fits no fp16 number finds its way down by itself
        strategy.scaler.update(2.0**40)
        for _ in range(40):
            one_step(strategy, optimizer, samples(6), 600, 0.01)
        assert strategy.scaler.get_scale() < 2**30
        assert 10 < int(strategy.skipped) < 40
        assert not torch.equal(flat(model), before)

    def test_fp16_goes_on_from_its_state_as_if_never_stopped(self) -> None:
        def steps(strategy: Strategy, optimizer: Any, count: int) -> None:
            for _ in range(count):
                one_step(strategy, optimizer, samples(6), 600, 0.1)

        made = []
        for _ in range(2):
            model = Net()
            strategy = make(Strategy, model, "fp16")
            strategy.scaler.set_growth_interval(5)
            made.append((strategy, torch.optim.AdamW(model.parameters(), lr=0.01)))
        (first, optimizer), (second, other) = made
        steps(first, optimizer, 3)
        bad = samples(6)
        bad[0][0, 0] = float("inf")
        one_step(first, optimizer, bad, 600)
        steps(first, optimizer, 3)
        state = first.full_state(optimizer)
        assert (state["scaler"]["scale"], state["scaler"]["_growth_tracker"], state["skipped"]) == (32768.0, 3, 1)

        second.load_full_state(other, clone(state))
        assert same(second.full_state(other), state)
        steps(first, optimizer, 2)
        steps(second, other, 2)
        assert first.scaler.get_scale() == second.scaler.get_scale() == 65536, "it grew after five good steps"
        assert same(second.full_state(other), first.full_state(optimizer))

    def test_a_state_of_fp16_fits_fp32_and_back(self) -> None:
        model = Net()
        half, optimizer = make(Strategy, model, "fp16"), torch.optim.SGD(model.parameters(), lr=0.1)
        one_step(half, optimizer, samples(6), 600)
        full = make(Strategy, model)
        full.load_full_state(optimizer, half.full_state(optimizer))
        state = full.full_state(optimizer)
        assert state["scaler"] == {}
        half.load_full_state(optimizer, state)
        assert half.scaler.get_scale() == 65536


class TestReplicas:
    @pytest.mark.parametrize(("count", "replicas"), [(6, 2), (7, 2), (7, 3), (2, 4), (1, 3), (5, 4)])
    @pytest.mark.parametrize("shape", ["tuple", "list", "dict", "namedtuple"])
    def test_gradients_equal_singles(self, count: int, replicas: int, shape: str) -> None:
        x, y = samples(count)
        batch = {
            "tuple": (x, y),
            "list": [x, y],
            "dict": {"x": x, "y": y, "unit": "m", "none": []},
            "namedtuple": Pair(x, y),
        }

        def of_any(model: nn.Module, part: Any) -> Tensor:
            if isinstance(part, dict):
                assert part["unit"] == "m"
                return loss(model, (part["x"], part["y"]))
            assert type(part) is type(batch[shape])
            return loss(model, (part.x, part.y) if isinstance(part, Pair) else part)

        single, several = Net(), Net()
        a = make(Strategy, single, loss=of_any).backward(batch[shape], 1.0, lambda: count)
        b = make(Replicated, several, replicas=replicas, loss=of_any).backward(batch[shape], 1.0, lambda: count)
        assert b.ndim == 0
        assert b.item() == pytest.approx(a.item(), rel=1e-6)
        torch.testing.assert_close(gradient(several), gradient(single), rtol=1e-5, atol=1e-6)
        # as many passes as torch's chunks: no replica computes nothing
        assert len(several.seen) == len(x.chunk(replicas))

    @pytest.mark.parametrize(("kind", "replicas"), ALL)
    @pytest.mark.parametrize(
        ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
    )
    def test_every_replica_computes_in_the_precision_asked_for(
        self, kind: type[Strategy], replicas: int, precision: str, dtype: torch.dtype
    ) -> None:
        model = Net()
        strategy = make(kind, model, precision, replicas)
        strategy.backward(samples(6), 1.0, lambda: 600)
        assert model.seen == [(dtype, True, True)] * replicas
        assert gradient(model).dtype == torch.float32
        # evaluation: no gradients in any thread, and the model's own mode
        model.seen.clear()
        model.eval()
        strategy.evaluate(iter([samples(6)]))
        assert model.seen == [(dtype, False, False)] * replicas

    def test_autocast_around_the_call_would_not_reach_the_threads(self) -> None:
        # why _Call enters it itself
        model = Net()
        replicas = CPUReplicas(make(Strategy, model).call, 2)
        with torch.autocast("cpu", torch.bfloat16):
            replicas(samples(6), "losses")
        assert [dtype for dtype, *_ in model.seen] == [torch.float32] * 2

    @pytest.mark.parametrize("what", ["loss", "metrics"])
    def test_an_exception_in_a_replica_surfaces(self, what: str) -> None:
        def picky(model: nn.Module, batch: Any) -> Any:
            if batch[0][0, 0] > 100:
                raise ZeroDivisionError("in the second replica")
            return loss(model, batch) if what == "loss" else metrics(model, batch)

        strategy = Replicated(picky, picky, precision="fp32", device=CPU, num_replicas=3)
        strategy.prepare(Net())
        x, y = samples(6)
        x[2, 0] = 1000
        with pytest.raises(ZeroDivisionError, match="in the second replica"):
            strategy.backward((x, y), 1.0, lambda: 6) if what == "loss" else strategy.evaluate(iter([(x, y)]))

    def test_a_layer_without_bias_still_has_the_name(self) -> None:
        model, batch = nn.Linear(4, 4, bias=False), samples(6)
        assert make(Replicated, model, replicas=2).forward(batch).item() == pytest.approx(loss(model, batch).item())

    def test_buffers_are_the_first_replicas(self) -> None:
        class Normed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.norm = nn.BatchNorm1d(4)

            def forward(self, x: Tensor) -> Tensor:
                return self.norm(x)

        x, y = samples(8)
        model, first = Normed(), Normed()
        strategy = make(Replicated, model, replicas=2)
        strategy.backward((x, y), 1.0, lambda: 8)
        first(x[:4])
        assert same(dict(model.named_buffers()), dict(first.named_buffers()))
        assert int(model.norm.num_batches_tracked) == 1

    def test_dropout_repeats_with_its_seed(self) -> None:
        found = []
        for _ in range(8):
            model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 4))
            for p in model.parameters():
                nn.init.constant_(p, 0.1)
            strategy = make(Replicated, model, replicas=4)
            torch.manual_seed(5)
            strategy.backward(samples(40), 1.0, lambda: 40)
            found.append(gradient(model))
        assert all(torch.equal(found[0], other) for other in found)

    @pytest.mark.parametrize(("kind", "replicas"), ALL)
    def test_metrics_are_sums_and_counts(self, kind: type[Strategy], replicas: int) -> None:
        model = Net()
        strategy = make(kind, model, replicas=replicas)
        parts = [samples(n, seed=n) for n in (5, 1, 4)]
        found = strategy.evaluate(iter(parts))
        with torch.no_grad():
            d = torch.cat([model(x) - y for x, y in parts]).double()
        assert {name: count for name, (_, count) in found.items()} == {"loss": 10, "outer": 10}
        assert all(total.dtype == torch.float64 for total, _ in found.values())
        assert found["loss"][0].item() == pytest.approx(d.square().sum().item(), rel=1e-6)
        torch.testing.assert_close(found["outer"][0], d.T @ d, rtol=1e-5, atol=1e-5)
        assert strategy.evaluate(iter([])) == {}


class TestChoose:
    @pytest.mark.parametrize(
        ("wanted", "gpus", "replicas", "world", "kind", "why"),
        [
            ("auto", 0, 1, 1, Strategy, "one process"),
            ("auto", 2, 2, 1, Strategy, "one process"),
            ("auto", 2, 2, 2, Distributed, "2 processes"),
            ("single", 2, 2, 1, Strategy, "asked for"),
            ("dp", 2, 2, 1, Replicated, "asked for"),
            ("dp", 0, 5, 1, Replicated, "asked for"),
            ("ddp", 2, 2, 2, Distributed, "asked for"),
            ("ddp", 1, 1, 1, Strategy, "with one process, ddp is the same as single"),
        ],
    )
    def test_and_why(self, wanted: Any, gpus: int, replicas: int, world: int, kind: type[Strategy], why: str) -> None:
        assert choose_strategy(wanted, num_gpus=gpus, num_replicas=replicas, world_size=world) == (kind, why)

    @pytest.mark.parametrize(
        ("wanted", "gpus", "replicas", "world", "says"),
        [
            (
                "single", 2, 2, 2,
                "strategy 'single' runs in one process, but there are 2. Use strategy='ddp', or start one process.",
            ),
            ("dp", 2, 2, 3, "strategy 'dp' runs in one process, but there are 3."),
            ("dp", 2, 3, 1, "strategy 'dp' with nproc=3: this machine has 2 GPUs"),
        ],
    )  # fmt: skip
    def test_what_cannot_be(self, wanted: Any, gpus: int, replicas: int, world: int, says: str) -> None:
        with pytest.raises(ValueError, match=f"^{re.escape(says)}"):
            choose_strategy(wanted, num_gpus=gpus, num_replicas=replicas, world_size=world)


def same(a: Any, b: Any) -> bool:
    """Equal to the last bit, tensors included."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return bool(a == b)


def clone(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: clone(item) for key, item in value.items()}
    return [clone(item) for item in value] if isinstance(value, list) else value


def adamw(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0, "lr_scale": 0.5},
    ]
    return torch.optim.AdamW(groups, lr=0.02, **options)


def some_steps(kind: type[Strategy], state: Any, first: int, replicas: int = 1) -> tuple[dict[str, Any], bool]:
    """Two steps on from `state`, this rank's half of 8 samples in each; then the state, and whether it loaded whole."""
    distributed.init()
    model = Net(seed=99)
    strategy = make(kind, model, replicas=replicas)
    optimizer = adamw(model)
    kept = True
    if state is not None:
        strategy.load_full_state(optimizer, clone(state))
        kept = same(strategy.full_state(optimizer), state)
    else:
        model.load_state_dict(Net().state_dict())
    ranks, rank = (distributed.world_size(), distributed.rank()) if kind is Distributed else (1, 0)
    for step in (first, first + 1):
        x, y = (part[rank * 8 // ranks : (rank + 1) * 8 // ranks] for part in samples(8, seed=step))
        strategy.backward((x, y), 1.0, lambda: 8)
        strategy.step(optimizer, max_norm=0.5)
    return clone(strategy.full_state(optimizer)), kept


class TestState:
    def test_from_any_strategy_into_any_other(self) -> None:
        undisturbed: Any = None
        for first in (0, 2, 4, 6):
            undisturbed, _ = some_steps(Strategy, undisturbed, first)
        state, _ = some_steps(Strategy, None, 0)
        state, from_single = some_steps(Replicated, state, 2, replicas=3)
        ranks = launch(some_steps, Distributed, state, 4, nproc=2)
        assert same(ranks[0][0], ranks[1][0]), "every rank holds the same"
        _, from_ddp = some_steps(Replicated, ranks[0][0], 6, replicas=2)
        state, back_in_single = some_steps(Strategy, ranks[0][0], 6)
        # what was loaded is what was saved, to the last bit
        assert from_single and ranks[0][1] and ranks[1][1] and from_ddp and back_in_single
        assert "module" not in repr(state)
        assert state["optimizer"]["param_groups"] == undisturbed["optimizer"]["param_groups"]
        assert state["optimizer"]["state"].keys() == undisturbed["optimizer"]["state"].keys()
        for name, expected in undisturbed["model"].items():
            torch.testing.assert_close(state["model"][name], expected, rtol=1e-5, atol=1e-6)
        for name, values in undisturbed["optimizer"]["state"].items():
            for key, expected in values.items():
                torch.testing.assert_close(state["optimizer"]["state"][name][key], expected, rtol=1e-4, atol=1e-6)

    def test_names_are_the_plain_models(self) -> None:
        model = Net()
        optimizer = adamw(model)
        one_step(make(Replicated, model, replicas=2), optimizer, samples(4), 4)
        state = named_optimizer_state(model, optimizer)
        names = ["first.weight", "body.1.0.weight", "first.bias", "body.1.0.bias", "head.bias"]  # tied: once
        assert sorted(state["state"]) == sorted(names)
        assert [group["params"] for group in state["param_groups"]] == [names[:2], names[2:]]
        assert [group["lr_scale"] for group in state["param_groups"][1:]] == [0.5]

    def test_the_state_goes_by_name_not_by_place(self) -> None:
        class Swapped(Net):
            def __init__(self) -> None:
                super().__init__()
                self._modules["body"] = self._modules.pop("body")  # registered last

        model, other = Net(), Swapped()
        order = [n for n, _ in other.named_parameters()]
        assert order != [n for n, _ in model.named_parameters()]
        named = dict(model.named_parameters())
        optimizer = torch.optim.AdamW([named[name] for name in order])
        one_step(make(Strategy, model), optimizer, samples(4), 4)
        into = torch.optim.AdamW(other.parameters())
        load_named_optimizer_state(other, into, named_optimizer_state(model, optimizer))
        for name, p in other.named_parameters():
            assert torch.equal(into.state[p]["exp_avg"], optimizer.state[named[name]]["exp_avg"])

    def test_other_parameters_are_refused(self) -> None:
        model = Net()
        state = named_optimizer_state(model, adamw(model))
        wider = nn.Sequential(Net(), nn.Linear(4, 1))
        with pytest.raises(
            ValueError,
            match=r"^the checkpoint's optimizer holds other parameters than this run's: 0.body.1.0.bias, 0.body.1.0.w",
        ):
            load_named_optimizer_state(wider, adamw(wider), state)
        fewer = torch.optim.AdamW([model.head.bias])
        with pytest.raises(
            ValueError, match=r"than this run's: body.1.0.bias, body.1.0.weight, first.bias, first.weight$"
        ):
            load_named_optimizer_state(model, fewer, state)

    def test_other_groups_are_refused(self) -> None:
        model = Net()
        state = named_optimizer_state(model, adamw(model))
        with pytest.raises(
            ValueError,
            match=r"^the checkpoint's optimizer has the parameters in other groups, or another order, than this run's: "
            r"groups of \[2, 3\] then, of \[5\] now$",
        ):
            load_named_optimizer_state(model, torch.optim.AdamW(model.parameters()), state)

    @pytest.mark.parametrize("fused", [False, True])
    def test_the_kernel_is_this_machines_choice(self, fused: bool) -> None:
        # else a checkpoint from a CPU would undo the fused kernel that skips non-finite steps on a GPU
        model = Net()
        theirs, mine = adamw(model, fused=not fused), adamw(model, fused=fused)
        one_step(make(Strategy, model), theirs, samples(4), 4)
        theirs.param_groups[0]["weight_decay"] = 0.3
        load_named_optimizer_state(model, mine, named_optimizer_state(model, theirs))
        assert [group["fused"] for group in mine.param_groups] == [fused, fused]
        assert mine.param_groups[0]["weight_decay"] == 0.3
        one_step(make(Strategy, model), mine, samples(4), 4)
        assert {int(state["step"]) for state in mine.state.values()} == {2}


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.register_buffer("mask", torch.tensor([True, False, True, True]))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x)) * self.mask


def in_two_processes() -> dict[str, Any]:
    distributed.init()
    rank, found = distributed.rank(), {}

    # Only rank 1 meets an infinity, in the first of two micro-steps: that one is not even exchanged by itself
    for precision in ("fp32", "fp16", "bf16"):
        model = Net()
        strategy, optimizer = make(Distributed, model, precision), torch.optim.SGD(model.parameters(), lr=0.1)
        trace = []
        for step, bad in itertools.product(range(3), [True, False]):
            x, y = samples(4, seed=10 * step + rank)
            if bad and rank == 1 and step == 1:
                x[0, 0] = float("inf")
            with strategy.micro_step(sync=not bad):
                strategy.backward((x, y), 1.0, lambda: 1600)
            if not bad:
                norm = strategy.step(optimizer, max_norm=1.0)
                trace.append((flat(model), bool(norm.isfinite()), int(strategy.skipped), strategy.scaler.get_scale()))
        found[precision] = trace
        found[precision + " dtypes"] = {dtype for dtype, *_ in model.seen}

    # Each rank's own statistics, until rank 0's are everybody's
    normed = Normed()
    strategy = make(Distributed, normed)
    normed.mask[rank] = not normed.mask[rank]
    strategy.backward(samples(6, seed=rank), 1.0, lambda: 12)
    found["own buffers"] = clone(dict(normed.named_buffers()))
    strategy.sync_buffers()
    found["shared buffers"] = clone(dict(normed.named_buffers()))

    # A rank whose share is empty stands in with any one sample
    model = Net()
    strategy = make(Distributed, model)
    strategy.backward(samples(4, seed=0) if rank == 0 else samples(1, seed=7), float(rank == 0), lambda: 4)
    found["stand-in"] = gradient(model)

    # Different weights at the start: rank 0's are taken
    found["start"] = flat(make(Distributed, Net(seed=rank)).model)

    # A frozen part
    model = Net()
    model.body.requires_grad_(False)
    strategy, optimizer = make(Distributed, model), torch.optim.AdamW(model.parameters(), lr=0.1)
    for step in range(2):
        one_step(strategy, optimizer, samples(4, seed=10 * step + rank), 8, 1.0)
    found["frozen"] = (torch.equal(model.body[1][0].weight, Net().body[1][0].weight), flat(model))

    # Images in channels_last: a depthwise convolution, whose gradient may have other strides than the weight
    conv = nn.Conv2d(8, 8, 3, groups=8)
    strategy = make(Distributed, conv, loss=lambda model, x: model(x).square().sum())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        strategy.backward(torch.ones(2, 8, 6, 6).to(memory_format=torch.channels_last), 1.0, lambda: 4)
    found["warnings"] = [str(each.message) for each in caught]

    # Errors of the loss
    strategy = make(Distributed, Net(), loss=lambda model, batch: model(batch[0]).square().sum(1))
    try:
        strategy.backward(samples(3), 1.0, lambda: 6)
    except ValueError as error:
        found["error"] = str(error)
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return list(launch(in_two_processes, nproc=2))


class TestTwoProcesses:
    @pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
    def test_an_infinity_on_one_rank_is_skipped_on_both(self, ranks: list[dict[str, Any]], precision: str) -> None:
        (a0, *a), (b0, *b), (c0, *c) = ranks[0][precision]
        assert a == [True, 0, 65536.0 if precision == "fp16" else 1.0]
        assert b == [False, 1, 32768.0 if precision == "fp16" else 1.0]
        assert c == [True, 1, b[2]]
        assert torch.equal(a0, b0)
        assert not torch.equal(b0, c0)
        assert c0.isfinite().all()
        for (mine, *facts), (theirs, *others) in zip(ranks[0][precision], ranks[1][precision], strict=True):
            assert torch.equal(mine, theirs)
            assert facts == others
        expected = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
        assert [found[precision + " dtypes"] for found in ranks] == [{expected}] * 2

    def test_buffers_become_rank_0s(self, ranks: list[dict[str, Any]]) -> None:
        own = [found["own buffers"] for found in ranks]
        assert not torch.equal(own[0]["norm.running_mean"], own[1]["norm.running_mean"])
        assert not torch.equal(own[0]["mask"], own[1]["mask"])
        for found in ranks:
            assert same(found["shared buffers"], own[0])

    def test_a_stand_in_adds_nothing(self, ranks: list[dict[str, Any]]) -> None:
        model = Net()
        (loss(model, samples(4, seed=0)) / 4).backward()
        for found in ranks:
            torch.testing.assert_close(found["stand-in"], gradient(model), rtol=1e-5, atol=1e-6)

    def test_all_start_from_rank_0s_weights(self, ranks: list[dict[str, Any]]) -> None:
        assert not torch.equal(flat(Net(0)), flat(Net(1)))
        assert all(torch.equal(found["start"], flat(Net(0))) for found in ranks)

    def test_frozen_parameters_stay(self, ranks: list[dict[str, Any]]) -> None:
        assert [found["frozen"][0] for found in ranks] == [True, True]
        assert torch.equal(ranks[0]["frozen"][1], ranks[1]["frozen"][1])
        assert not torch.equal(ranks[0]["frozen"][1], flat(Net()))

    def test_gradients_of_images_in_channels_last_have_the_layout_of_their_weights(
        self, ranks: list[dict[str, Any]]
    ) -> None:
        assert [found["warnings"] for found in ranks] == [[], []]

    def test_a_loss_that_is_no_scalar(self, ranks: list[dict[str, Any]]) -> None:
        for found in ranks:
            assert found["error"].startswith("Task.loss must return a scalar tensor") and "shape (3,)" in found["error"]
