"""`python killed_run.py FOLDER`: two training runs whose processes are killed in the third of four updates.

The one in `FOLDER/between` while rewards are computed, with `checkpoint-2` behind it; the one in `FOLDER/during` while
it writes `checkpoint-3`. Prints the signal that ended each.
"""

import os
import signal
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))  # tiny_training
sys.path.insert(0, str(Path(__file__).parents[2]))  # trl_flow, where it is not installed

import torch
from tiny_training import brightness, tiny_trainer


def train_until_killed(folder: str, when: str) -> None:
    calls = []
    save = torch.save

    def dying_reward(prompts, images, **kwargs):
        calls.append(len(prompts))
        if when == "between" and len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return brightness(prompts, images)

    def dying_save(content, file, *args, **kwargs):
        save(content, file, *args, **kwargs)
        if when == "during" and "checkpoint-3" in str(file):
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = dying_save
    save_steps = {"between": 2, "during": 1}[when]
    tiny_trainer(
        os.path.join(folder, when),
        reward_funcs=dying_reward,
        max_steps=4,
        save_strategy="steps",
        save_steps=save_steps,
        lr_scheduler_type="linear",
    ).train()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for when in ("between", "during"):
        # Forked, so that what takes longest, the imports, is done once
        child = os.fork()
        if child == 0:
            train_until_killed(sys.argv[1], when)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(when, os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0)
