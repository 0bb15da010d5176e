"""The Fisher eigenvalue is the dense matrix's, the measured KL the Gaussians', and the power goes where it should."""

import json
import math

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig
from safetensors.torch import load_file
from tiny_training import assert_equal, brightness, prompts, tiny_lora, tiny_trainer, train, trained_weights
from transformers import TrainerCallback

from trl_flow import FlowGRPOConfig, GuardConfig, SLASConfig
from trl_flow.functional import Transition, max_advantage_power
from trl_flow.trainer.advantage_power import (
    MAX_POWER,
    AdvantagePower,
    fisher_vector_product,
    largest_eigenvalue,
)


AUTO = {"advantage_power": "auto", "target_kl": 1e-4}
# Plain descent: the step follows the gradient, and so the advantages
SGD = {"optim": "sgd", "learning_rate": 1.0, "weight_decay": 0.0, "max_grad_norm": 1e9}


def logged(trainer, name: str) -> list[float]:
    return [logs[name] for logs in trainer.state.log_history if name in logs]


def first_batch(trainer):
    """The first micro-batch of a trainer that has not trained."""
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def transitions_of(trainer, batch):
    return trainer._measured_transitions(4, batch.prompts, batch.steps, batch.latents)


def two_samples(trainer):
    batch = first_batch(trainer)
    return trainer._measured_transitions(2, batch.prompts[:2], batch.steps, batch.latents[:2])


def dense_fisher(transitions, parameters) -> torch.Tensor:
    """`E[J^T J / (std^2 D)]`, with every row of every Jacobian by a backward pass of its own: `(P, P)`, float64."""
    total = torch.zeros(sum(p.numel() for p in parameters), sum(p.numel() for p in parameters), dtype=torch.float64)
    for transition in transitions:
        mean, std = transition()
        flat = mean.flatten()
        rows = []
        for i in range(flat.numel()):
            gradients = torch.autograd.grad(flat[i], parameters, retain_graph=True, allow_unused=True)
            row = [
                torch.zeros(p.numel()) if g is None else g.flatten()
                for p, g in zip(parameters, gradients, strict=True)
            ]
            rows.append(torch.cat(row).double())
        jacobian = torch.stack(rows).view(len(mean), -1, total.shape[0])
        dim = jacobian.shape[1]
        for sample, deviation in zip(jacobian, std.double(), strict=True):
            total += sample.T @ sample / (deviation**2 * dim) / (len(transitions) * len(mean))
    return total


def unflattened(vector: torch.Tensor, parameters) -> list[torch.Tensor]:
    parts = vector.float().split([p.numel() for p in parameters])
    return [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]


def flattened(vector) -> torch.Tensor:
    return torch.cat([part.flatten() for part in vector]).double()


@pytest.fixture(scope="module")
def fisher(tmp_path_factory):
    """A trainer of few weights that all matter, its measured transitions, and their dense Fisher matrix."""
    trainer = tiny_trainer(
        tmp_path_factory.mktemp("fisher"),
        lora=tiny_lora(r=1, init_lora_weights=False, target_modules=["attn.to_q", "attn.to_out.0"]),
        num_inference_steps=2,
        **AUTO,
    )
    transitions = two_samples(trainer)
    return trainer, transitions, dense_fisher(transitions, trainer.advantage_power.parameters)


# ---- The eigenvalue ----


def test_a_fisher_vector_product_is_the_dense_matrix_times_the_vector(fisher):
    trainer, transitions, matrix = fisher
    parameters = trainer.advantage_power.parameters
    values, vectors = torch.linalg.eigh(matrix)
    mixed = torch.randn(len(matrix), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for vector in (vectors[:, -1], mixed / mixed.norm()):
        curvature = (vector @ matrix @ vector).item()
        product = fisher_vector_product(
            transitions, parameters, unflattened(vector, parameters), 0.01 / math.sqrt(curvature)
        )
        error = (flattened(product) - matrix @ vector).norm() / (matrix @ vector).norm()
        assert error < 0.02


def test_the_eigenvalue_is_the_dense_matrix_s(fisher):
    trainer, transitions, matrix = fisher
    power = AdvantagePower(
        trainer.model, trainer.accelerator, target_kl=1.0, max_kl=1.0, fisher_steps=1, seed=0, log=lambda *_: None
    )
    power.estimate_if_due(transitions)
    expected = torch.linalg.eigvalsh(matrix)[-1].item()
    assert power.eigenvalue == pytest.approx(expected, rel=0.02)
    # from there on it has little to do
    before = power.eigenvalue
    iterations = []
    power.log = lambda name, value: iterations.append(value) if name == "fisher/iterations" else None
    power._updates = 1
    power.estimate_if_due(transitions)
    assert iterations == [1] or iterations == [2]
    assert power.eigenvalue == pytest.approx(expected, rel=0.02)
    assert power.eigenvalue >= before * (1 - 1e-3)


def test_power_iteration_by_hand():
    # diag(4, 1): from (1, 1) the k-th value is sqrt(16^k + 1) / sqrt(16^(k - 1) + 1)
    def product(vector, length):
        lengths.append(length)
        return [torch.tensor([4.0, 1.0]) * vector[0]]

    lengths = []
    eigenvalue, vector, iterations = largest_eigenvalue(product, [torch.tensor([3.0, 3.0])], guess=9.0)
    assert iterations == 4  # sqrt(17 / 2), 3.888, 3.993, 3.9996: the last change is below 1%
    assert eigenvalue == pytest.approx(math.sqrt((16**4 + 1) / (16**3 + 1)), rel=1e-5)
    torch.testing.assert_close(vector[0].norm(), torch.tensor(1.0))
    # differences move the means by 0.01 of a standard deviation
    assert lengths[0] == pytest.approx(0.01 / 3)
    assert lengths[1] == pytest.approx(0.01 / (17 / 2) ** 0.25, rel=1e-5)


def test_an_eigenvalue_of_zero():
    assert largest_eigenvalue(lambda v, _: [0 * v[0]], [torch.ones(2)], guess=1.0)[0] == 0


def test_measuring_disturbs_nothing(fisher):
    trainer, transitions, _ = fisher
    model, power = trainer.model, trainer.advantage_power
    for p in power.parameters:
        p.grad = torch.full_like(p, 3.0)
    weights, state = trained_weights(trainer), torch.get_rng_state()
    model.train()
    power.estimate_if_due(transitions)
    power.eigenvalue = None
    power.estimate_if_due(transitions)
    power.before_update(transitions)
    power.after_update(transitions)
    assert_equal(trained_weights(trainer), weights)
    assert all((p.grad == 3.0).all() for p in power.parameters)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and all(module.training for module in model.modules())
    assert power._kls == []  # nothing has moved, which says nothing of the power


@pytest.mark.parametrize("fields", [{"gradient_checkpointing": True}, {"bf16": True}], ids=str)
def test_checkpointing_and_half_precision_give_the_same_eigenvalue(fields, fisher, tmp_path):
    reference = fisher[0]
    lora = tiny_lora(r=1, init_lora_weights=False, target_modules=["attn.to_q", "attn.to_out.0"])
    trainer = tiny_trainer(tmp_path, lora=lora, num_inference_steps=2, **AUTO | fields)
    transitions = two_samples(trainer)  # which estimates from other samples
    trainer.advantage_power.eigenvalue = None
    trainer.advantage_power.estimate_if_due(transitions)
    expected = torch.linalg.eigvalsh(fisher[2])[-1].item()
    assert reference.args.num_inference_steps == 2
    assert trainer.advantage_power.eigenvalue == pytest.approx(expected, rel=0.1 if "bf16" in fields else 0.02)


# ---- The KL of an update ----


@pytest.mark.parametrize("sde_type", ["flow", "cps"])
def test_the_kl_of_an_update_is_the_gaussians(sde_type, tmp_path):
    seen = []

    class Watched(AdvantagePower):
        def before_update(self, transitions):
            seen.append([transition() for transition in transitions])
            super().before_update(transitions)

        def after_update(self, transitions):
            seen.append([transition() for transition in transitions])
            super().after_update(transitions)

    trainer = tiny_trainer(tmp_path, sde_type=sde_type, max_steps=1, **AUTO)
    trainer.advantage_power.__class__ = Watched
    trainer.train()
    before, after = seen
    normal = torch.distributions.Normal
    kls = []
    for old, new in zip(before, after, strict=True):
        std = old.std.view(-1, 1, 1, 1)
        assert torch.equal(old.std, new.std)
        kl = torch.distributions.kl_divergence(normal(old.mean.double(), std), normal(new.mean.double(), std))
        kls.append(kl.flatten(1).mean(1).mean().item())
    assert len(kls) == {"flow": 3, "cps": 2}[sde_type]
    assert logged(trainer, "kl_per_update") == [pytest.approx(sum(kls) / len(kls), rel=1e-3)]
    assert kls[0] > 1e-6


def test_the_kl_of_an_update_is_below_half_its_length_times_the_eigenvalue(tmp_path):
    """SLAS Eq. 85, on a real step of the optimizer that is small enough for second order."""
    trainer = tiny_trainer(tmp_path, max_steps=1, lora=tiny_lora(init_lora_weights=False), **AUTO | SGD)
    trainer.train()
    power = trainer.advantage_power
    assert 0 < power._kls[0] <= 0.5 * power.eigenvalue * power._squared_lengths[0]


# ---- The power ----


def fake_power(**fields) -> AdvantagePower:
    settings = {"target_kl": 1e-4, "max_kl": 1e-2, "fisher_steps": 5, "seed": 0, "log": lambda *_: None}
    return AdvantagePower(torch.nn.Linear(1, 1), Accelerator(cpu=True), **settings | fields)


def test_the_rule_by_hand():
    power, flat = fake_power(max_kl=1e9), torch.full((8,), 2.0)
    power.eigenvalue = 1.0
    assert power.choose(flat) == 0

    def after(kls):
        power._kls, power._squared_lengths = kls, [1e-6]
        return power.choose(flat)

    assert after([5e-5]) == pytest.approx(0.2 * math.log(2))  # half the target
    assert after([1e-6]) == pytest.approx(0.2 * math.log(2) + 0.2)  # a factor of e counts at most
    assert after([5e-5, 1.5e-4]) == pytest.approx(0.2 * math.log(2) + 0.2)  # the mean is the target
    assert after([2e-4]) == pytest.approx(0.2)
    assert after([1.0]) == pytest.approx(0)
    assert after([1.0]) == 0
    for _ in range(20):
        highest = after([1e-9])
    assert highest == MAX_POWER == 2
    # a sampling phase without a measured update, as after one that was resumed at its end, changes nothing
    power._kls = []
    assert power.choose(flat) == 2


def test_without_a_target_the_first_phases_kl_is_held():
    power, flat = fake_power(target_kl=None, max_kl=None), torch.full((8,), 2.0)
    power.eigenvalue = 1e-9
    assert power.choose(flat) == 0
    for kls, expected in (([2e-5, 4e-5], 0.0), ([1.5e-5], 0.2 * math.log(2)), ([3e-5], 0.2 * math.log(2))):
        power._kls, power._squared_lengths = kls, [1e-9]
        assert power.choose(flat) == pytest.approx(expected)
    assert power.target_kl == pytest.approx(3e-5)
    # the trust region is then 100 times that: C = 2 max_kl / (lambda ||d||^2 / moment), |A| = 2
    power._squared_lengths, power.eigenvalue, power._moment = [1e-3], 1.0, 1.0
    c = 2 * 100 * 3e-5 / 1e-3
    assert power._limit(flat) == pytest.approx(math.log(c) / (2 * math.log(2)) - 1)


def test_phases_of_equal_rewards_neither_set_the_target_nor_move_the_power():
    power, flat = fake_power(target_kl=None, max_kl=None), torch.full((8,), 2.0)
    power.eigenvalue = 1e-9
    assert power.choose(torch.zeros(8)) == 0
    for kl in (0.0, 1e-12):  # nothing but weight decay
        power._kls, power._squared_lengths = [kl], [1e-9]
        assert power.choose(torch.zeros(8)) == 0
        assert power.target_kl is None
    assert power.choose(flat) == 0
    power._kls, power._squared_lengths = [3e-5], [1e-9]
    power.choose(flat)
    assert power.target_kl == pytest.approx(3e-5)
    power.power = 1.0
    power._moment, power._kls = 0.0, [1e-12]
    assert power.choose(flat) == 1


def test_a_first_phase_without_a_signal_can_be_trained_on(tmp_path):
    calls = []

    def late(prompts, images, **kwargs):
        calls.append(len(images))
        return [0.0] * len(images) if len(calls) == 1 else brightness(prompts, images)

    # A LoRA that begins at 0 stays there: its KL is exactly 0
    trainer = tiny_trainer(tmp_path, reward_funcs=late, lora=LoraConfig(r=4), max_steps=3, advantage_power="auto")
    trainer.train()
    assert logged(trainer, "kl_per_update")[0] == 0
    assert trainer.advantage_power.target_kl == logged(trainer, "kl_per_update")[1] > 0


def test_the_bound_is_theorem_4_for_the_step_that_was_taken():
    """With `lr^2 B = ||d||^2 / moment`: as from a gradient's norm, which drops out."""
    power, advantages = fake_power(), torch.tensor([3.0, -1.0, 0.5, -0.25])
    power.eigenvalue, power._moment, power._squared_lengths, power._kls = 7.0, 4.0, [1e-4, 2e-4], [1e-9]
    gradient_norm = 0.37
    bound = max_advantage_power(
        advantages,
        grad_sq_norm=gradient_norm**2 / 4.0,
        fisher_eigenvalue=7.0,
        learning_rate=math.sqrt(2e-4) / gradient_norm,
        max_kl=1e-2,
    )
    assert 0.1 < bound < 2
    power.power = 1.9
    assert power.choose(advantages) == pytest.approx(bound, rel=1e-9)
    # the moment that the next bound starts from is that of the power chosen
    assert power._moment == pytest.approx(sum(abs(a) ** (2 * (1 + bound)) for a in advantages.tolist()) / 4, rel=1e-6)


def powers_of(tmp_path, target_kl: float, steps: int = 12, start: float = 0.0, **fields):
    trainer = tiny_trainer(
        tmp_path,
        max_steps=steps,
        reward_funcs=spread_rewards,
        lora=tiny_lora(init_lora_weights=False),
        **SGD | {"advantage_power": "auto", "target_kl": target_kl, "max_kl": 1e6} | fields,
    )

    class Start(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            trainer.advantage_power.power = start

    trainer.add_callback(Start())
    trainer.train()
    return trainer


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(math.log(value) for value in values) / len(values))


def spread_rewards(prompts, images, **kwargs):
    """One of each four far above the others, so that its advantage is above 1 and the power matters."""
    return [3.0 if i % 4 == 0 else 1e-3 * value for i, value in enumerate(brightness(prompts, images))]


def test_the_power_moves_the_kl_to_its_target_from_below_and_from_above(tmp_path):
    low = geometric_mean(logged(powers_of(tmp_path / "low", 1e-12), "kl_per_update"))
    high = geometric_mean(logged(powers_of(tmp_path / "high", 1e6, start=2.0), "kl_per_update"))
    assert high > 4 * low, "the KL does not follow the power: the test shows nothing"
    target = math.sqrt(low * high)
    ends = []
    for start in (0.0, 2.0):
        trainer = powers_of(tmp_path / f"from {start}", target, steps=24, start=start)
        powers, kls = logged(trainer, "advantage_power"), logged(trainer, "kl_per_update")
        assert powers[0] == start
        assert (powers[4] > 0.2) if start == 0 else (powers[4] < 1.8)
        # The KL of a single update varies by a factor of several
        assert abs(math.log(geometric_mean(kls[8:]) / target)) < 0.5 * math.log(high / target)
        ends.append(sum(powers[16:]) / 8)
    assert 0.2 < min(ends) and max(ends) < 1.8
    assert abs(ends[0] - ends[1]) < 0.3


def test_the_power_never_exceeds_the_bound_of_its_phase(tmp_path):
    free = powers_of(tmp_path / "free", 1.0, steps=6)
    assert logged(free, "advantage_power")[-1] == pytest.approx(1.0)  # it would rise for ever
    length = free.advantage_power._squared_lengths[0]
    worst = 0.5 * free.advantage_power.eigenvalue * length
    bound = powers_of(tmp_path / "bound", 1.0, steps=10, max_kl=worst)
    powers, limits = logged(bound, "advantage_power"), logged(bound, "advantage_power/max")
    assert all(power <= limit for power, limit in zip(powers, limits, strict=True))
    assert any(power == limit < 1 for power, limit in zip(powers[1:], limits[1:], strict=True))
    assert max(powers) > 0.1


def test_the_whole_sampling_phase_is_shaped_by_one_power(tmp_path):
    fields = {"per_device_train_batch_size": 4, "steps_per_generation": 2, "num_iterations": 2, "max_steps": 8}
    trainer = tiny_trainer(tmp_path, **AUTO | fields)
    chosen = []
    choose = trainer.advantage_power.choose
    trainer.advantage_power.choose = lambda advantages: chosen.append(choose(advantages)) or chosen[-1]
    trainer.train()
    assert len(chosen) == 2
    assert len(logged(trainer, "kl_per_update")) == 8


def test_the_eigenvalue_is_estimated_every_so_many_updates(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=7, fisher_steps=3, **AUTO)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "kl_per_update" in entry]
    assert [i for i, entry in enumerate(logs) if "fisher/eigenvalue" in entry] == [0, 3, 6]
    assert all(entry["fisher/time"] > 0 for entry in logs[::3])


@pytest.mark.parametrize(
    ("cls", "fields"),
    [
        (SLASConfig, {}),
        (SLASConfig, {"lora": None, "learning_rate": 1e-3}),
        (GuardConfig, {"dense_rewards": True, "value_scale": 0.1, "beta": 0.1, "sde_window_size": 2}),
        (FlowGRPOConfig, {"sde_type": "cps", "timestep_fraction": 0.5, "use_ema": True}),
    ],
)
def test_every_recipe_trains_with_it(cls, fields, tmp_path):
    trainer = tiny_trainer(tmp_path, cls=cls, max_steps=3, **AUTO | fields)
    before = trained_weights(trainer)
    trainer.train()
    assert any(not torch.equal(before[name], value) for name, value in trained_weights(trainer).items())
    assert all(value > 0 for value in logged(trainer, "kl_per_update"))
    assert logged(trainer, "fisher/eigenvalue")[0] > 0
    assert logged(trainer, "advantage_power")[0] == 0


def test_a_power_of_zero_trains_what_linear_advantages_train(tmp_path):
    # Measuring changes no bit of the training
    linear = train(tmp_path / "linear", max_steps=3)
    assert_equal(train(tmp_path / "auto", max_steps=3, advantage_power="auto", target_kl=1e-12), linear)


# ---- Resuming ----


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_resuming_gives_the_same_powers_and_weights(stop, tmp_path):
    # two updates to a sampling phase, an estimate every three updates
    fields = {
        "per_device_train_batch_size": 4,
        "steps_per_generation": 2,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": stop,
        "fisher_steps": 3,
        "target_kl": 1e-4,
        "advantage_power": "auto",
    }
    whole = tiny_trainer(tmp_path, **fields)
    whole.train()
    rest = tiny_trainer(tmp_path, **fields)
    rest.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert_equal(trained_weights(rest), trained_weights(whole))
    for name in ("advantage_power", "advantage_power/max", "kl_per_update", "fisher/eigenvalue"):
        assert logged(rest, name) == logged(whole, name)
    assert logged(whole, "advantage_power")[-1] > 0
    assert rest.advantage_power.power == whole.advantage_power.power


def test_a_checkpoint_holds_the_state(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2, **AUTO)
    trainer.train()
    state = json.loads((tmp_path / "checkpoint-2" / "flow_grpo_state.json").read_text())["advantage_power"]
    assert state["power"] == trainer.advantage_power.power
    assert state["eigenvalue"] == trainer.advantage_power.eigenvalue
    vector = load_file(tmp_path / "checkpoint-2" / "fisher_vector.safetensors")
    assert [vector[str(i)].shape for i in range(len(vector))] == [p.shape for p in trainer.advantage_power.parameters]
    assert sum(part.square().sum() for part in vector.values()).item() == pytest.approx(1, rel=1e-5)


# ---- The effective sample size ----


@pytest.mark.parametrize(
    ("rewards", "power", "share"),
    [
        ([0, 1, 0, 1, 1, 0, 1, 0], 0.0, 1.0),  # all advantages alike
        ([0, 0, 0, 0, 1, 0, 1, 0], 0.0, 0.5),  # a group without any
        # 3 and three times -1, but for the scale s: (2 (3 + 3))^2 / (8 * 2 (9 + 3)), and with squares
        # (2 (9 + 3))^2 / (8 * 2 (81 + 3))
        ([0, 0, 0, 1, 1, 0, 0, 0], 0.0, 0.75),
        ([0, 0, 0, 1, 1, 0, 0, 0], 1.0, 3 / 7),
        ([0.0] * 8, 0.5, 0.0),
    ],
)
def test_the_effective_share_of_the_samples(rewards, power, share, tmp_path):
    trainer = tiny_trainer(tmp_path, reward_funcs=lambda prompts, images, **_: rewards, advantage_power=power)
    trainer._generate_and_score([{"prompt": text} for text in prompts(2)["prompt"] for _ in range(4)])
    assert trainer._metrics["train"]["advantage/effective_share"] == [pytest.approx(share, rel=1e-5)]


def test_a_transition_is_what_the_trainer_trains(tmp_path):
    trainer = tiny_trainer(tmp_path, **AUTO)
    batch = first_batch(trainer)
    chosen = trainer.advantage_power.measured(len(batch.prompts), 4)
    assert chosen == [0, 2, 4, 6]
    for index, transition in enumerate(transitions_of(trainer, batch)):
        with torch.no_grad(), trainer.accelerator.autocast():
            current = transition()
        assert isinstance(current, Transition)
        torch.testing.assert_close(current.mean, batch.means[chosen, index], rtol=1e-5, atol=1e-6)


def test_measured_samples_are_spread_over_the_micro_batch():
    power = fake_power()
    assert power.measured(144, 4) == [0, 36, 72, 108]
    assert power.measured(3, 4) == [0, 1, 2]


def test_training_anew_begins_with_a_power_of_zero(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=3, **SGD | AUTO)
    trainer.train()
    assert trainer.advantage_power._vector is not None
    trainer.train()
    powers = [logs["advantage_power"] for logs in trainer.state.log_history if "advantage_power" in logs]
    assert powers[0] == 0
