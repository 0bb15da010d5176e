"""The published prompts of vision-language judges, word for word, and how their answers are read.

`{prompt}` stands for the prompt of the image. A judge is trained on its prompt: another wording gives other scores.

* UnifiedReward (Wang et al., 2025): https://huggingface.co/papers/2503.05236
* UnifiedReward-Think (Wang et al., 2025): https://huggingface.co/papers/2505.03318
* DeQA-Score (You et al., 2025): https://huggingface.co/papers/2501.11561

The prompt of UniGenBench++ (Wang et al., 2025, https://arxiv.org/abs/2510.18701) and that for videos alone are in
words of our own.
"""

import json
import re
from pathlib import Path
from typing import Literal


Preference = Literal["a", "b", "tie"]

_LINES: dict[str, list[str]] = json.loads(Path(__file__).with_name("judge_prompts.json").read_text(encoding="utf-8"))
_PROMPTS = {name: "\n".join(lines) for name, lines in _LINES.items()}

UNIFIED_REWARD_SCORE = _PROMPTS["score"]  # answered at once: the wording of Flow-GRPO and the papers after it
UNIFIED_REWARD_SCORE_WITH_ELEMENTS = _PROMPTS["score_with_elements"]  # the wording of UnifiedReward's own script
UNIFIED_REWARD_AXES = _PROMPTS["axes"]  # three scores, of UnifiedReward 2.0
UNIFIED_REWARD_PAIR = _PROMPTS["pair"]  # which of two images is better, of UnifiedReward
UNIFIED_REWARD_THINK_PAIR = _PROMPTS["think_pair"]  # of UnifiedReward-Think, the judge of Pref-GRPO

VIDEO = _PROMPTS["video"]  # one score of a video by some of its frames, for any model

# Which parts of its prompt an image shows: asks for the same and is answered in the same form as UniGenBench++'s own
UNIGENBENCH = _PROMPTS["unigenbench"]
# Its 27 test points, by name and in the order of SLAS's Table 3, and what each is about
UNIGENBENCH_TESTPOINTS: dict[str, str] = dict(line.split(": ", 1) for line in _LINES["unigenbench_testpoints"])

_PASSED = {"1": 1, "1.0": 1, "true": 1, "0": 0, "0.0": 0, "false": 0}

DEQA_QUESTION = "How would you rate the quality of this image?"
DEQA_ANSWER_PREFIX = "The quality of the image is"
DEQA_LEVELS = {"excellent": 5, "good": 4, "fair": 3, "poor": 2, "bad": 1}


def final_score(answer: str) -> float | None:
    """The number after the first `Final Score:` of an answer, or None."""
    return _number_after("Final Score", answer)


def axis_score(answer: str, axis: Literal["alignment", "coherence", "style"]) -> float | None:
    """The number after `Alignment Score (1-5):` (the models leave `(1-5)` out at times), or another axis', or None."""
    return _number_after(f"{axis} Score", answer)


def preferred_image(answer: str) -> Preference | None:
    """
    Which image an answer prefers: `"a"` for `Image 1 is better`, `"b"` for `Image 2 is better`, `"tie"` for `Both
    images are equally good`, None for none or several of them. Where there is an `<answer>` only that is read.
    """
    tagged = re.search(r"<answer>(.*?)</answer>", answer, re.DOTALL)
    verdict = " ".join(_plain(tagged.group(1) if tagged else answer).lower().split())
    phrases = {"a": "image 1 is better", "b": "image 2 is better", "tie": "both images are equally good"}
    found = [preference for preference, phrase in phrases.items() if phrase in verdict]
    return found[0] if len(found) == 1 else None


def passed_testpoints(answer: str, number: int) -> list[int] | None:
    """
    The 0 or 1 of each of `number` test points in the last `<score>` list of an answer. None where there is no such
    list, or it has another length or another entry: it could not be told which test points were answered.
    """
    plain = _plain(answer).replace("，", ",").lower()
    lists = re.findall(r"<score>\s*\[([^<]*?),?\s*\]\s*</score>", plain)
    scores = [_PASSED.get(entry.strip(" \t\r\n'\"")) for entry in lists[-1].split(",")] if lists else []
    return scores if len(scores) == number and None not in scores else None


def _number_after(label: str, answer: str) -> float | None:
    # With the scale, in brackets, or with Chinese punctuation. A scale in the score's place repeats the prompt's
    scale = r"1\s*[-–~]\s*5"
    pattern = rf"{label}\s*(?:[(（\[]\s*{scale}\s*[)）\]])?\s*[:：][\s\[【]*(?!{scale})(\d+(?:\.\d+)?)"
    match = re.search(pattern, _plain(answer), re.IGNORECASE)
    return float(match.group(1)) if match else None


def _plain(answer: str) -> str:
    """Without the marks of bold, italics, code and JSON, which chat models like."""
    return re.sub(r'[*`\\"]|(?<!\w)_+|_+(?!\w)', "", answer)
