"""Rates by hand, groups by name, averages by plain arithmetic; bit for bit where the room says so."""

import math
import re
from itertools import pairwise

import pytest
import torch
from torch import nn

from kaggle_mgpu.training.optim import EMA, SCHEDULES, adamw, lr_at, parameter_groups, resolve_warmup, set_lr


def rates(schedule, steps, **given):
    options = {"lr": 1.0, "max_steps": 10, "warmup_steps": 2, **given}
    return [lr_at(step, schedule=schedule, **options) for step in steps]


class TestLearningRate:
    @pytest.mark.parametrize("schedule", SCHEDULES)
    def test_warm_up_is_linear_and_reaches_the_rate(self, schedule):
        assert rates(schedule, range(5), warmup_steps=4, lr=0.8) == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])

    @pytest.mark.parametrize("schedule", SCHEDULES)
    def test_without_warm_up_the_first_step_has_the_full_rate(self, schedule):
        assert lr_at(0, schedule=schedule, lr=0.3, max_steps=5) == 0.3

    def test_linear(self):
        assert rates("linear", range(2, 12)) == pytest.approx([1, 7 / 8, 6 / 8, 5 / 8, 0.5, 3 / 8, 2 / 8, 1 / 8, 0, 0])

    def test_cosine(self):
        got = rates("cosine", (2, 4, 6, 8, 10, 99), min_lr=0.2)
        half = math.sqrt(0.5)
        assert got == pytest.approx([1, 0.6 + 0.4 * half, 0.6, 0.6 - 0.4 * half, 0.2, 0.2])

    def test_cosine_restarts(self):
        got = rates("cosine_restarts", (2, 4, 5, 6, 8, 10), cycles=2)
        assert got == pytest.approx([1, 0.5, (1 - math.sqrt(0.5)) / 2, 1, 0.5, 0])

    def test_one_cycle_of_restarts_is_the_cosine(self):
        assert rates("cosine_restarts", range(12)) == rates("cosine", range(12))

    def test_polynomial(self):
        got = rates("polynomial", (2, 6, 10), power=2.0, min_lr=0.2)
        assert got == pytest.approx([1, 0.2 + 0.8 * 0.25, 0.2])
        assert rates("polynomial", range(12), power=1.0) == rates("linear", range(12))

    def test_constant_stays(self):
        assert rates("constant", (2, 5, 10, 99), min_lr=0.5) == [1.0, 1.0, 1.0, 1.0]

    @pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name not in ("constant", "cosine_restarts")])
    def test_it_never_rises_after_the_warm_up_nor_wastes_the_last_step(self, schedule):
        falling = rates(schedule, range(20, 201), max_steps=200, warmup_steps=20, power=3.0)
        assert all(a >= b for a, b in pairwise(falling))
        assert falling[-2] > 0 == falling[-1]

    def test_agrees_with_torch_where_torch_has_the_schedule(self):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.7)
        theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=0.1)
        for step in range(50):
            ours = lr_at(step, schedule="cosine", lr=0.7, min_lr=0.1, max_steps=50)
            assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
            optimizer.step()
            theirs.step()

    def test_a_run_that_is_all_warm_up(self):
        assert rates("cosine", (0, 9, 10), warmup_steps=10) == [0.1, 1.0, 0.0]

    @pytest.mark.parametrize(
        ("wrong", "says"),
        [
            ({"schedule": "cosin"}, "schedule='cosin': expected one of constant, linear, cosine"),
            ({"max_steps": 0}, "max_steps=0, warmup_steps=2: expected step >= 0"),
            ({"warmup_steps": 11}, "warmup_steps=11: expected"),
            ({"warmup_steps": -1}, "warmup_steps=-1: expected"),
            ({"step": -1}, "step=-1, "),
            ({"lr": -1.0}, "lr=-1.0, min_lr=0.0: expected finite rates"),
            ({"lr": math.nan}, "lr=nan"),
            ({"lr": math.inf}, "lr=inf"),
            ({"min_lr": 2.0}, "min_lr=2.0: expected finite rates with 0 <= min_lr <= lr"),
            ({"min_lr": math.nan}, "min_lr=nan"),
            ({"cycles": 0}, "cycles=0"),
            ({"power": 0.0}, "power=0.0"),
        ],
    )
    def test_nonsense_is_refused(self, wrong, says):
        given = {"step": 0, "schedule": "cosine", "lr": 1.0, "max_steps": 10, "warmup_steps": 2, **wrong}
        with pytest.raises(ValueError, match=re.escape(says)):
            lr_at(given.pop("step"), **given)


class TestWarmup:
    @pytest.mark.parametrize(
        ("given", "steps"),
        [(0, 0), (0.0, 0), (10, 10), (0.05, 10), (0.1, 20), (100.0, 100), (200, 200), (1, 1)],
    )
    def test_steps_and_fractions(self, given, steps):
        got = resolve_warmup(given, 200)
        assert got == steps
        assert type(got) is int

    @pytest.mark.parametrize(
        ("given", "says"),
        [
            (-1, "warmup_steps=-1 with max_steps=200: expected a number of steps, or a fraction"),
            (math.nan, "warmup_steps=nan"),
            (True, "warmup_steps=True"),
            (1.5, "neither a whole number of steps nor a fraction below 1"),
            (201, "the run would end before the warm-up does"),
        ],
    )
    def test_nonsense_is_refused(self, given, says):
        with pytest.raises(ValueError, match=re.escape(says)):
            resolve_warmup(given, 200)


class Everything(nn.Module):
    """One of each kind of parameter there is a rule for, one tied, one frozen."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.norm = nn.LayerNorm((3, 4))
        self.batch_norm = nn.BatchNorm2d(3)
        self.recurrent = nn.GRU(4, 4)
        self.convolution = nn.Conv1d(4, 4, 3)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.head = nn.Linear(4, 11)
        self.head.weight = self.embedding.weight


class TestGroups:
    def names(self, model):
        name = {id(p): n for n, p in model.named_parameters()}
        return [[name[id(p)] for p in group["params"]] for group in parameter_groups(model, 0.1)]

    def test_matrices_decay_and_nothing_else(self):
        assert self.names(Everything()) == [
            [
                "embedding.weight",
                "attention.in_proj_weight",
                "attention.out_proj.weight",
                "recurrent.weight_ih_l0",
                "recurrent.weight_hh_l0",
                "convolution.weight",
            ],
            [
                "scale",
                "attention.in_proj_bias",
                "attention.bias_k",
                "attention.bias_v",
                "attention.out_proj.bias",
                "norm.weight",
                "norm.bias",
                "batch_norm.weight",
                "batch_norm.bias",
                "recurrent.bias_ih_l0",
                "recurrent.bias_hh_l0",
                "convolution.bias",
                "head.bias",
            ],
        ]
        assert [group["weight_decay"] for group in parameter_groups(Everything(), 0.1)] == [0.1, 0.0]

    def test_every_trainable_parameter_once_and_no_frozen_one(self):
        model = Everything()
        found = [id(p) for group in parameter_groups(model, 0.1) for p in group["params"]]
        assert len(found) == len(set(found))
        assert set(found) == {id(p) for p in model.parameters() if p.requires_grad}

    def test_a_group_with_nothing_in_it_is_left_out(self):
        assert [g["weight_decay"] for g in parameter_groups(nn.Linear(2, 2, bias=False), 0.1)] == [0.1]

    def test_nothing_to_train(self):
        with pytest.raises(ValueError, match="Linear: nothing to train, no parameter requires a gradient; unfreeze"):
            parameter_groups(nn.Linear(2, 2).requires_grad_(False), 0.1)


class TestAdamW:
    def test_fused_on_the_cpu_and_the_same_numbers_as_plain_adamw(self):
        torch.manual_seed(0)
        ours, theirs = Everything(), Everything()
        theirs.load_state_dict(ours.state_dict())
        fused = adamw(ours, lr=0.01, weight_decay=0.1)
        plain = torch.optim.AdamW(
            parameter_groups(theirs, 0.1), lr=0.01, betas=(0.9, 0.95), eps=1e-8, foreach=False, fused=False
        )
        assert fused.defaults["fused"] is True
        for seed in range(5):
            for model in (ours, theirs):
                torch.manual_seed(seed)
                for parameter in model.parameters():
                    parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
            fused.step()
            plain.step()
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine, other)

    def test_foreach_where_there_is_no_fused_kernel(self):
        optimizer = adamw(nn.Linear(2, 2, device="meta"), lr=0.01, weight_decay=0.1)
        assert (optimizer.defaults["fused"], optimizer.defaults["foreach"]) == (False, True)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_fused_on_a_gpu_but_not_across_devices(self):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).cuda()
        assert adamw(model, lr=0.01, weight_decay=0.1).defaults["fused"] is True
        model[1].cpu()
        assert adamw(model, lr=0.01, weight_decay=0.1).defaults["fused"] is False

    def test_set_lr_reaches_the_step_and_honours_the_groups_scale(self):
        slow, fast = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([{"params": [slow], "lr_scale": 0.1}, {"params": [fast]}], lr=7.0)
        slow.grad = fast.grad = torch.ones(1)
        set_lr(optimizer, 2.0)
        optimizer.step()
        assert slow.item() == pytest.approx(-0.2)
        assert fast.item() == -2.0

    def test_the_scale_survives_a_save(self):
        def make():
            return torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr_scale": 0.1}], lr=1.0)

        saved = make().state_dict()
        fresh = make()
        fresh.load_state_dict(saved)
        set_lr(fresh, 5.0)
        assert fresh.param_groups[0]["lr"] == 0.5

    def test_a_rate_held_in_a_tensor_is_changed_in_place(self):
        rate = torch.tensor(1.0)
        optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=rate)
        set_lr(optimizer, 0.25)
        assert optimizer.param_groups[0]["lr"] is rate
        assert rate.item() == 0.25


def small():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def move(model, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    model.train()(torch.randn(8, 3))  # moves the BatchNorm statistics


class TestEMA:
    def test_the_formula_with_its_warm_up(self):
        model = nn.Linear(1, 1, bias=False)
        model.weight.data.fill_(1.0)
        ema = EMA(model, decay=0.3)
        expected = 1.0
        for n, value in enumerate((2.0, 5.0, -3.0, 8.0, 13.0)):
            model.weight.data.fill_(value)
            ema.update(model)
            decay = min(0.3, (1 + n) / (10 + n))  # 0.1, 0.18, 0.25, then 0.3
            expected = decay * expected + (1 - decay) * value
            assert ema.state_dict()["weight"].item() == pytest.approx(expected, rel=1e-6)

    def test_the_model_is_searched_once_and_its_new_buffers_are_found(self):
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        ema, searches, search = EMA(model, decay=0.9), [], model.named_parameters
        model.named_parameters = lambda *args, **options: searches.append(1) or search(*args, **options)
        for value in (1.0, 2.0, 3.0):
            model[1].running_mean = torch.full((2,), value)  # another tensor in the buffer's place
            ema.update(model)
            assert ema.state_dict()["1.running_mean"].tolist() == [value, value]
        assert len(searches) == 1

    def test_swap_shows_the_average_and_gives_back_every_bit(self):
        model = small()
        ema = EMA(model, decay=0.9)
        move(model, 2)
        ema.update(model)
        before, average = bits(model), ema.state_dict()
        where = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
        with ema.swap(model):
            inside = bits(model)
            assert all(torch.equal(inside[name], average[name]) for name in average if name in inside)
            assert not same(inside, before)
            assert {n: t.data_ptr() for n, t in model.state_dict().items()} == where
        assert same(bits(model), before)

    def test_swap_gives_back_on_an_error(self):
        model = small()
        ema = EMA(model, decay=0.9)
        move(model, 2)
        before = bits(model)

        def broken_evaluation():
            with ema.swap(model):
                nn.init.zeros_(model[0].weight)
                raise KeyError("evaluation")

        with pytest.raises(KeyError, match="evaluation"):
            broken_evaluation()
        assert same(bits(model), before)
        ema.update(model)  # and the average can go on

    def test_swap_leaves_the_average_alone(self):
        model = small()
        ema = EMA(model, decay=0.9)
        move(model, 2)
        ema.update(model)
        average = {name: tensor.clone() for name, tensor in ema.state_dict().items()}
        with ema.swap(model):
            move(model, 3)
        assert same(ema.state_dict(), average)

    def test_update_inside_swap_is_refused(self):
        model = small()
        ema = EMA(model, decay=0.9)
        with ema.swap(model), pytest.raises(RuntimeError, match=r"EMA\.update inside EMA\.swap"):
            ema.update(model)

    def test_a_resumed_average_is_the_undisturbed_one_bit_for_bit(self, tmp_path):
        def run(stop):
            model = small()
            ema = EMA(model, decay=0.99)
            for seed in range(8):
                if seed == stop:  # a new session: everything from the file
                    torch.save(ema.state_dict(), tmp_path / "ema.pt")
                    ema = EMA(small(), decay=0.99)
                    ema.load_state_dict(torch.load(tmp_path / "ema.pt", weights_only=True))
                move(model, seed)
                ema.update(model)
            return ema.state_dict()

        assert same(run(stop=None), run(stop=5))

    def test_only_what_is_trained_and_saved_is_kept(self):
        model = small()
        model[0].requires_grad_(False)
        model.register_buffer("cache", torch.zeros(3), persistent=False)
        names = set(EMA(model, decay=0.9).state_dict())
        assert names == {
            "1.weight", "1.bias", "2.weight", "2.bias", "1.running_mean", "1.running_var", ".num_updates",
        }  # fmt: skip

    def test_buffers_are_copied(self):
        model = small()
        ema = EMA(model, decay=0.9)
        move(model, 2)
        ema.update(model)
        assert torch.equal(ema.state_dict()["1.running_mean"], model[1].running_mean)
        assert ema.state_dict()["1.running_mean"].data_ptr() != model[1].running_mean.data_ptr()

    def test_tied_parameters_stay_tied(self):
        model = Everything()
        ema = EMA(model, decay=0.9)
        assert "head.weight" not in ema.state_dict()
        with ema.swap(model):
            assert model.head.weight is model.embedding.weight

    def test_half_precision_is_averaged_in_single(self):
        model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
        model.weight.data.fill_(1.0)
        ema = EMA(model, decay=0.999)
        ema.num_updates = 10**6  # past the warm-up: in bfloat16 a step of 0.001 from 1 would be rounded away
        model.weight.data.fill_(2.0)
        ema.update(model)
        assert ema.state_dict()["weight"].item() == pytest.approx(1.001)
        with ema.swap(model):
            assert model.weight.dtype == torch.bfloat16
            assert model.weight.item() == 1.0
        assert model.weight.item() == 2.0

    def test_the_averages_carry_no_gradients(self):
        model = small()
        ema = EMA(model, decay=0.9)
        ema.update(model)
        assert not any(tensor.requires_grad for tensor in ema.state_dict().values())

    def test_a_wrapper_is_refused(self):
        ema = EMA(small(), decay=0.9)
        with pytest.raises(ValueError, match=r"the model has no '0.weight' \(6 names missing\); give the plain model"):
            ema.update(nn.Sequential(small()))

    def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(self):
        ema = EMA(small(), decay=0.9)
        before = {name: tensor.clone() for name, tensor in ema.state_dict().items()}
        missing = dict(before)
        del missing["2.weight"]
        with pytest.raises(ValueError, match=r"missing \['2.weight'\], not in the model \['x'\] \(1 and 1 names"):
            ema.load_state_dict({**missing, "x": torch.zeros(1)})
        wrong = {**before, "0.weight": torch.ones(4, 3), "2.weight": torch.zeros(2, 5)}
        with pytest.raises(ValueError, match=r"EMA state of 2.weight: expected shape \(2, 4\), got \(2, 5\)"):
            ema.load_state_dict(wrong)
        assert same(ema.state_dict(), before)

    @pytest.mark.parametrize("decay", [-0.1, 1.0, math.nan])
    def test_a_decay_that_is_none_is_refused(self, decay):
        with pytest.raises(ValueError, match=f"ema_decay={decay}: expected 0 <= decay < 1"):
            EMA(small(), decay=decay)
