"""An algorithm of one's own takes a class and a trainer of a few lines, and no change in the package."""

import torch
from tiny_models import tiny_sd3_pipeline
from tiny_training import brightness, prompts, tiny_config, tiny_lora

from trl_flow.algorithms import Algorithm, LossOutput, MicroBatch, PhaseScores, StepPlan
from trl_flow.dynamics import make_dynamics
from trl_flow.functional import combine_rewards, gaussian_log_prob, group_advantages
from trl_flow.rollout import Rollout
from trl_flow.trainer.flow_rl_config import FlowRLConfig
from trl_flow.trainer.flow_rl_trainer import FlowRLTrainer


class Reinforce(Algorithm):
    """REINFORCE on the transitions, with the group's mean reward as baseline: no ratio, no clipping."""

    def __init__(self, args, backbone, reward_weights):
        self.args = args
        self.reward_weights = reward_weights
        self.dynamics = make_dynamics(backbone.schedule(args.num_inference_steps), sde_type="flow", noise_level=0.7)
        self.updates = 0

    def plan(self, generation: int) -> StepPlan:
        steps = tuple(self.dynamics.stochastic_steps)
        return StepPlan(stochastic=steps, kept=steps)

    def keep(self, rollout: Rollout) -> dict[str, torch.Tensor]:
        return {"latents": rollout.latents, "next_latents": rollout.next_latents}

    def advantages(self, scores: PhaseScores) -> tuple[torch.Tensor, dict[str, float]]:
        rewards = combine_rewards(scores.rewards_per_func, self.reward_weights)
        advantages = group_advantages(rewards, self.args.num_generations, scale_rewards="none")
        return advantages, {"advantage/largest": advantages.abs().max().item()}

    def loss(self, policy, batch: MicroBatch, unit: int, condition) -> LossOutput:
        index = batch.steps.index(unit)
        latents, next_latents = (batch.tensors[name][:, index] for name in ("latents", "next_latents"))
        prediction = policy.predict(latents, self.dynamics.schedule.timesteps[unit], condition)
        log_prob = gaussian_log_prob(next_latents, self.dynamics.transition(prediction, latents, unit))
        return LossOutput(-batch.advantages * log_prob, {"log_prob": log_prob.detach()})

    def after_update(self, policy) -> dict[str, float]:
        self.updates += 1
        return {"updates": self.updates}

    def state_dict(self):
        return {"updates": self.updates}

    def load_state_dict(self, state):
        self.updates = state.get("updates", 0)


class ReinforceTrainer(FlowRLTrainer):
    _name = "REINFORCE"

    def create_algorithm(self) -> Reinforce:
        return Reinforce(self.args, self.backbone, self.reward_weights)


class Watched(ReinforceTrainer):
    """Compares each gradient with that of the loss by hand, from other functions than the algorithm's."""

    compared = 0

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.zero_grad_before = all(p.grad is None or not p.grad.any() for p in self.policy.trained_parameters)
        loss = super().training_step(model, inputs, num_items_in_batch)
        expected = torch.autograd.grad(self.loss_by_hand(), self.policy.trained_parameters, allow_unused=True)
        largest = max(gradient.abs().max() for gradient in expected if gradient is not None)
        assert self.zero_grad_before and largest > 1e-6
        for parameter, gradient in zip(self.policy.trained_parameters, expected, strict=True):
            if gradient is not None:
                torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-4 * largest.item())
        self.compared += 1
        return loss

    def _prepare_inputs(self, generation_batch):
        self.batch = super()._prepare_inputs(generation_batch)
        self.rewards = brightness([], self.images)
        return self.batch

    def loss_by_hand(self) -> torch.Tensor:
        batch, sigmas, total = self.batch, self.algorithm.dynamics.schedule.sigmas, 0.0
        groups = torch.tensor(self.rewards).view(2, 4)
        advantages = (groups - groups.mean(1, keepdim=True)).flatten()
        encoded = [self.backbone.encode_prompt(prompt) for prompt in batch.prompts]
        condition = {key: torch.cat([one[key] for one in encoded]) for key in encoded[0]}
        for step in range(3):
            t, dt = sigmas[step], sigmas[step] - sigmas[step + 1]
            x = batch.tensors["latents"][:, step]
            v = self.backbone.predict(self.model, x, self.algorithm.dynamics.schedule.timesteps[step], condition)
            diffusion = 0.7 * (t / (1 - (t if t < 1 else sigmas[1]))).sqrt()
            mean = x - (v + diffusion**2 / (2 * t) * (x + (1 - t) * v)) * dt
            normal = torch.distributions.Normal(mean, diffusion * dt.sqrt())
            log_prob = normal.log_prob(batch.tensors["next_latents"][:, step]).flatten(1).mean(1)
            total = total - (advantages * log_prob).mean() / 3
        return total


def reinforce(tmp_path, cls=ReinforceTrainer, **fields):
    drawn = []

    def reward(prompts, images, **kwargs):
        drawn[:] = images
        return brightness(prompts, images)

    fields |= {"num_inference_steps": 3}
    args = tiny_config(tmp_path, cls=FlowRLConfig, guidance_scale=1.0, overlap_rewards=False, **fields)
    lora = tiny_lora(init_lora_weights=False)
    trainer = cls(tiny_sd3_pipeline(), reward, args, train_dataset=prompts(), peft_config=lora)
    trainer.images = drawn
    return trainer


def test_an_algorithm_of_ones_own_trains_on_its_own_gradient(tmp_path):
    trainer = reinforce(tmp_path, cls=Watched)
    trainer.train()
    assert trainer.compared == 2
    logs = trainer.state.log_history
    assert [entry["updates"] for entry in logs[:2]] == [1, 2]
    assert all(entry["advantage/largest"] > 0 and entry["grad_norm"] > 0 for entry in logs[:2])
    # by default, statistics of the loss are logged as means
    assert all(-5 < entry["log_prob"] < 5 for entry in logs[:2])
    assert not any("ratio" in name or "clip" in name for name in logs[0])


def test_its_state_is_saved_and_resumed(tmp_path):
    fields = {"save_strategy": "steps", "save_steps": 1}
    reinforce(tmp_path, **fields).train()
    rest = reinforce(tmp_path, max_steps=3, **fields)
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert rest.algorithm.updates == 3
