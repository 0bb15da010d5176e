"""When the reward rises and the gold score falls: what is seen, what is kept, and that a resume forgets nothing."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_sd3_pipeline
from tiny_training import assert_equal, brightness, darkness, prompts, tiny_trainer, trained_weights, warnings_of
from transformers import TrainerControl, TrainerState

from trl_flow import OverOptimizationCallback
from trl_flow.evaluation.gold import gold_score
from trl_flow.trainer.evaluator import EvaluationResult


LOGGER = "trl_flow.trainer.over_optimization"


def scored(average: float, noise: float = 0.0):
    """The gold score of two prompts with these scores, the base model having 1 for both."""
    return gold_score({"gold": [1.0, 1.0]}, {"gold": [average - noise, average + noise]})


class Run:
    """Evaluations one after another, as the trainer announces them."""

    def __init__(self, tmp_path, callback, state=None, fields=None):
        settings = {"load_best_model_at_end": False, "importance_ratio": "standard", "beta": 0.0}
        self.args = SimpleNamespace(output_dir=str(tmp_path), **settings | (fields or {}))
        self.callback = callback
        self.callback.watched = None
        self.state = TrainerState()
        self.control = TrainerControl()
        self.saved = []
        self.name = None
        if state is not None:
            callback.load_state_dict(state)  # as resuming does, before training begins
        callback.on_train_begin(self.args, self.state, self.control)

    def evaluate(self, reward, gold, key="key"):
        """Returns the warnings."""
        self.state.global_step += 1

        def save(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self.saved.append(self.state.global_step)

        evaluation = EvaluationResult(
            name=self.name,
            metrics={},
            images=[],
            prompts=[],
            key=key,
            reward=reward,
            base_reward=0.0,
            gold=gold,
            num_samples=2,
            save=save,
        )
        with warnings_of(LOGGER) as messages:
            result = self.callback.on_evaluate(
                self.args, self.state, self.control, evaluation=evaluation, metrics={}, model=None
            )
        assert result is self.control
        return messages


def warned(run, evaluations) -> list[int]:
    """The numbers of the evaluations at which it is warned."""
    return [i for i, (reward, gold) in enumerate(evaluations, start=1) if run.evaluate(reward, scored(gold))]


# ---- What is seen ----


@pytest.mark.parametrize(
    "patience, evaluations, expected",
    [
        # reward and gold average; the base model has 0 and 1
        (2, [(1, 1.1), (2, 1.0), (3, 0.9), (4, 0.8), (5, 0.7)], [3]),  # once for the whole episode
        (1, [(1, 1.1), (2, 1.0), (3, 0.9)], [2]),
        (2, [(1, 0.9), (2, 0.8)], [2]),  # worse than the base model from the start
        (2, [(1, 1.1), (2, 1.0), (3, 1.2), (4, 1.1), (5, 1.1)], [5]),  # a new best between: the count begins anew
        (2, [(1, 1.1), (2, 1.0), (0.5, 1.0), (2, 1.0), (2, 1.0)], [5]),  # the reward was not higher in the third
        (2, [(1, 1.1), (0.9, 0.5), (0.8, 0.3)], []),  # both fall: that is no over-optimization
        (2, [(1, 1.1), (2, 1.2), (3, 1.3)], []),  # both rise
        (2, [(1, 1.1), (2, 1.1), (3, 1.1)], []),  # gold stays
        (2, [(1, 1.1), (2, 1.0), (3, 1.0), (4, 1.1), (5, 1.0), (6, 1.0)], [3, 6]),  # two episodes
    ],
)
def test_it_warns_when_the_reward_rises_and_gold_falls(patience, evaluations, expected, tmp_path):
    run = Run(tmp_path, OverOptimizationCallback(patience=patience))
    assert warned(run, evaluations) == expected
    assert not run.control.should_training_stop


def test_what_is_within_the_noise_is_not_seen(tmp_path):
    # The best has 1.1 without noise. Prompts at 1.0 ± 0.06: the difference of -0.1 has a standard error of
    # sqrt(2) 0.06 / sqrt(2) = 0.06, and is 1.67 of them away
    for number, expected in ((1.5, 1), (1.8, 0)):
        run = Run(tmp_path, OverOptimizationCallback(patience=1, num_standard_errors=number))
        run.evaluate(1.0, scored(1.1))
        assert len(run.evaluate(2.0, scored(1.0, noise=0.06))) == expected


def test_the_noise_is_that_of_the_difference(tmp_path):
    # Both evaluations have large errors of their own, but fall together
    run = Run(tmp_path, OverOptimizationCallback(patience=1))
    run.evaluate(1.0, scored(1.1, noise=0.5))
    assert run.evaluate(2.0, scored(1.09, noise=0.5))


def test_the_message_has_the_numbers_and_what_to_do(tmp_path):
    run = Run(tmp_path, OverOptimizationCallback(patience=1, stop=True))
    run.evaluate(1.0, scored(1.25))
    (message,) = run.evaluate(2.5, scored(0.75))
    for part in ("update 2", "2.5", "above 1 of update 1", "0.75, below 1.25", "-0.5", "GuardConfig", "beta"):
        assert part in message
    assert "images" not in message  # none are written
    assert f"1.25 at update 1, is in {tmp_path / 'best_gold'}. Training stops here;" in message
    assert f"the weights in {tmp_path} will be these, the last ones." in message
    assert "with a standard error over the prompts of 0" in message
    # What is in use is not recommended, and the best checkpoint is loaded if that is asked for
    fields = {"load_best_model_at_end": True, "importance_ratio": "ratio_norm", "beta": 0.04}
    run = Run(tmp_path / "guard", OverOptimizationCallback(patience=1, stop=True), fields=fields)
    run.evaluate(1.0, scored(1.25))
    (message,) = run.evaluate(2.5, scored(0.75))
    assert "GuardConfig" not in message and "beta" not in message and "a lower learning_rate, or a reward" in message
    assert "will be those of the best checkpoint" in message


def test_it_stops_if_asked_to(tmp_path):
    run = Run(tmp_path, OverOptimizationCallback(stop=True))
    for reward, gold, stops in ((1, 1.1, False), (2, 1.0, False), (3, 1.0, True)):
        run.evaluate(reward, scored(gold))
        assert run.control.should_training_stop == stops


def test_the_model_of_the_highest_gold_average_is_kept(tmp_path):
    run = Run(tmp_path, OverOptimizationCallback())
    for reward, gold in ((1, 0.8), (2, 0.9), (3, 0.85), (4, 1.2), (5, 1.1)):
        run.evaluate(reward, scored(gold, noise=0.1))
    # below the base model too: no better one has been trained
    assert run.saved == [1, 2, 4]
    scores = json.loads((tmp_path / "best_gold" / "scores.json").read_text())
    assert (scores["step"], scores["reward"], scores["base_reward"]) == (4, 4, 0.0)
    assert scores["gold_average"] == pytest.approx(1.2)
    assert scores["gold_average_std_err"] == pytest.approx(0.1)
    assert scores["gold"] == scores["gold_relative_to_base"] == {"gold": pytest.approx(1.2)}


def test_evaluations_outside_of_training_or_of_other_sets_do_not_count(tmp_path):
    run = Run(tmp_path, OverOptimizationCallback(patience=1))
    run.name = "other"
    assert not run.evaluate(1.0, scored(0.1))
    run.name = None
    run.callback.on_train_end(run.args, run.state, run.control)
    assert not run.evaluate(1.0, scored(0.1))
    assert run.saved == []


def test_its_state_brings_it_back(tmp_path):
    evaluations = [(1, 1.1), (2, 1.0), (3, 1.05), (4, 1.0), (5, 1.2), (6, 1.0), (7, 0.9), (8, 0.8)]
    whole = Run(tmp_path, OverOptimizationCallback(patience=3, stop=True))
    states = []
    for reward, gold in evaluations:
        states.append(json.loads(json.dumps(whole.callback.state_dict())))
        whole.evaluate(reward, scored(gold, noise=gold / 30))
    assert states[0] == {}
    for stop in range(len(evaluations)):
        rest = Run(tmp_path, OverOptimizationCallback(patience=3, stop=True), states[stop])
        rest.state.global_step = stop
        for reward, gold in evaluations[stop:]:
            rest.evaluate(reward, scored(gold, noise=gold / 30))
        assert rest.callback.state_dict() == whole.callback.state_dict()
        assert rest.saved == [step for step in whole.saved if step > stop]


def test_a_model_that_is_not_there_any_more_is_kept_again(tmp_path):
    run = Run(tmp_path, OverOptimizationCallback())
    run.evaluate(1.0, scored(1.2))
    rest = Run(tmp_path / "elsewhere", OverOptimizationCallback(), run.callback.state_dict())
    rest.evaluate(2.0, scored(1.1))
    assert rest.saved == [1]


def test_a_changed_evaluation_begins_anew(tmp_path):
    run = Run(tmp_path, OverOptimizationCallback(patience=1))
    run.evaluate(1.0, scored(1.2))
    (message,) = run.evaluate(2.0, scored(1.1), key="other settings")
    assert "have changed" in message
    assert run.evaluate(3.0, scored(1.0), key="other settings")


@pytest.mark.parametrize(
    "fields", [{"patience": 0}, {"patience": 1.5}, {"patience": True}, {"num_standard_errors": -1.0}]
)
def test_numbers_that_make_no_sense_are_refused(fields):
    with pytest.raises(ValueError, match=f"{next(iter(fields))} is"):
        OverOptimizationCallback(**fields)


# ---- In training ----


def growing(prompts, images, trainer_state, **kwargs):
    """A reward that rises with every update, whatever is drawn."""
    return [value + trainer_state.global_step for value in brightness(prompts, images)]


def faked(prompts, images, trainer_state, **kwargs):
    """A gold score that is highest after the second update."""
    level = [1.0, 1.1, 1.3, 1.2, 1.1, 1.0, 0.9][trainer_state.global_step]
    return [level + 1e-3 * value for value in darkness(prompts, images)]


def watched_trainer(tmp_path, callback=None, **fields):
    defaults = {"reward_funcs": growing, "eval_reward_funcs": faked, "eval_dataset": prompts(3), "max_steps": 6}
    defaults |= {"eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.03}
    callback = OverOptimizationCallback(stop=True) if callback is None else callback
    return tiny_trainer(tmp_path, callbacks=[callback], **defaults | fields)


@pytest.mark.parametrize("use_ema", [False, True])
def test_training_stops_and_the_best_adapter_is_kept(use_ema, tmp_path):
    trainer = watched_trainer(tmp_path / "out", use_ema=use_ema)
    trainer.train()
    assert trainer.state.global_step == 4
    assert json.loads((tmp_path / "out" / "best_gold" / "scores.json").read_text())["step"] == 2

    # A stock pipeline with what was kept draws what a run of two updates draws
    two = watched_trainer(tmp_path / "two", use_ema=use_ema, max_steps=2)
    two.train()
    two.save_model(str(tmp_path / "saved"))
    drawn = []
    for folder in (tmp_path / "out" / "best_gold", tmp_path / "saved", None):
        stock = tiny_sd3_pipeline()
        if folder is not None:
            stock.load_lora_weights(str(folder))
        settings = {"num_inference_steps": 2, "max_sequence_length": 16, "height": 16, "width": 16}
        generator = torch.Generator().manual_seed(0)
        drawn.append(stock("a cat", generator=generator, output_type="np", **settings).images)
    np.testing.assert_allclose(drawn[0], drawn[1], atol=1e-5)
    assert abs(drawn[0] - drawn[2]).max() > 1e-3


def test_watching_changes_no_weight(tmp_path):
    watched = watched_trainer(tmp_path / "watched", OverOptimizationCallback(), max_steps=3)
    watched.train()
    alone = watched_trainer(tmp_path / "alone", OverOptimizationCallback(), max_steps=3)
    alone.remove_callback(OverOptimizationCallback)
    alone.train()
    assert not (tmp_path / "alone" / "best_gold").exists()
    assert_equal(trained_weights(watched), trained_weights(alone))


def test_a_resumed_run_stops_where_the_whole_one_did(tmp_path):
    fields = {"save_strategy": "steps", "save_steps": 1, "logging_steps": 1}
    whole = watched_trainer(tmp_path, OverOptimizationCallback(patience=3, stop=True), **fields)
    whole.train()
    assert whole.state.global_step == 5
    # in the middle of the episode, and at another place, where nothing has been kept
    for place in (tmp_path, tmp_path / "elsewhere"):
        callback = OverOptimizationCallback(patience=3, stop=True)
        rest = watched_trainer(place, callback, **fields)
        rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert rest.state.global_step == 5
        assert_equal(trained_weights(rest), trained_weights(whole))
        kept = json.loads((place / "best_gold" / "scores.json").read_text())["step"]
        assert kept == (2 if place == tmp_path else 4)
    # training anew forgets
    callback = OverOptimizationCallback(patience=3, stop=True)
    whole_callback = OverOptimizationCallback.by_name(whole.callback_handler.callbacks)["over_optimization"]
    callback.load_state_dict(whole_callback.state_dict())
    anew = watched_trainer(tmp_path / "anew", callback, **fields)
    anew.train()
    assert anew.state.global_step == 5


def test_which_set_is_watched(tmp_path):
    data = {"first": prompts(2), "second": prompts(3)}
    for name, watched in ((None, "first"), ("second", "second")):
        callback = OverOptimizationCallback(stop=True, eval_name=name)
        trainer = watched_trainer(tmp_path / watched, callback, eval_dataset=data)
        trainer.train()
        assert trainer.state.global_step == 4
        scores = json.loads((tmp_path / watched / "best_gold" / "scores.json").read_text())
        assert scores["eval_dataset"] == watched


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"eval_reward_funcs": None}, "eval_reward_funcs is empty"),
        ({"eval_strategy": "no"}, "eval_strategy is 'no'"),
        ({"eval_dataset": prompts(1)}, "a single one"),
        (
            {"eval_dataset": {"a": prompts(2)}, "callback": OverOptimizationCallback(eval_name="b")},
            r"sets are \['a'\]",
        ),
        ({"callback": OverOptimizationCallback(eval_name="b")}, "a single one without a name"),
    ],
)
def test_a_callback_that_could_see_nothing_is_refused(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        watched_trainer(tmp_path / "out", pipeline="nowhere", **fields)
    assert not (tmp_path / "out").exists()


def test_a_callback_that_is_added_later_is_refused_before_training(tmp_path):
    trainer = tiny_trainer(tmp_path)
    trainer.add_callback(OverOptimizationCallback())
    with pytest.raises(ValueError, match="eval_reward_funcs is empty"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_the_end_and_the_card_say_that_the_best_model_is_elsewhere(tmp_path, capsys):
    trainer = watched_trainer(tmp_path, save_strategy="steps", save_steps=1, log_images=True)
    trainer.train()
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith(f"Trained 4 updates. The adapter is in {tmp_path}, which pipeline.load_lora_weights(")
    assert "These are the weights of update 4. The gold average was highest after update 2: 1.3" in said
    assert said.endswith(f"That model is in {tmp_path / 'best_gold'}.")
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "These are the weights of update 4. The gold average was highest after update 2" in card
    assert str(tmp_path) not in card.split("How to load")[0]


def test_with_load_best_model_at_end_the_best_by_gold_is_what_is_saved(tmp_path, capsys):
    fields = {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True}
    watched_trainer(tmp_path, **fields).train()
    assert "These are the weights of update" not in capsys.readouterr().out
    best, saved, last = (
        load_file(folder / "pytorch_lora_weights.safetensors")
        for folder in (tmp_path / "best_gold", tmp_path, tmp_path / "checkpoint-4")
    )
    assert all(torch.equal(saved[name], best[name]) for name in best)
    assert any(not torch.equal(saved[name], last[name]) for name in last)
