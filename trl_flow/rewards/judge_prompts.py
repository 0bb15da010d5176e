"""The published prompts of vision-language judges, word for word, and how their answers are read.

`{prompt}` stands for the prompt of the image. A judge is trained on its prompt: another wording gives other scores.

* UnifiedReward (Wang et al., 2025): https://huggingface.co/papers/2503.05236
* UnifiedReward-Think (Wang et al., 2025): https://huggingface.co/papers/2505.03318
* DeQA-Score (You et al., 2025): https://huggingface.co/papers/2501.11561
"""

import re
from typing import Literal


Preference = Literal["a", "b", "tie"]

_CRITERIA = (
    "You are given a text caption and a generated image based on that caption. Your task is to evaluate this image "
    "based on two key criteria:\n"
    "1. Alignment with the Caption: Assess how well this image aligns with the provided caption. Consider the "
    "accuracy of depicted objects, their relationships, and attributes as described in the caption.\n"
    "2. Overall Image Quality: Examine the visual quality of this image, including clarity, detail preservation, "
    "color accuracy, and overall aesthetic appeal.\n"
)
_TASK = "Your task is provided as follows:\nText Caption: [{prompt}]"

UNIFIED_REWARD_SCORE = (
    _CRITERIA + "Based on the above criteria, assign a score from 1 to 5 after 'Final Score:'.\n" + _TASK
)
"""One score, answered at once: the wording of Flow-GRPO and of the papers that evaluate as it does."""

UNIFIED_REWARD_SCORE_WITH_ELEMENTS = (
    _CRITERIA + "Extract key elements from the provided text caption, evaluate their presence in the generated image "
    "using the format: 'element (type): value' (where value=0 means not generated, and value=1 means generated), and "
    "assign a score from 1 to 5 after 'Final Score:'.\n" + _TASK
)
"""One score, after a list of what is in the image: the wording of UnifiedReward's own script."""

UNIFIED_REWARD_AXES = (
    "You are presented with a generated image and its associated text caption. Your task is to analyze the image "
    "across multiple dimensions in relation to the caption. Specifically:\n"
    "Provide overall assessments for the image along the following axes (each rated from 1 to 5):\n"
    "- Alignment Score: How well the image matches the caption in terms of content.\n"
    "- Coherence Score: How logically consistent the image is (absence of visual glitches, object distortions, "
    "etc.).\n"
    "- Style Score: How aesthetically appealing the image looks, regardless of caption accuracy.\n\n"
    "Output your evaluation using the format below:\n\n"
    "Alignment Score (1-5): X\n"
    "Coherence Score (1-5): Y\n"
    "Style Score (1-5): Z\n\n" + _TASK
)
"""Three scores, of UnifiedReward 2.0."""

UNIFIED_REWARD_PAIR = (
    "You are given a text caption and two generated images based on that caption. Your task is to evaluate and "
    "compare these images based on two key criteria:\n"
    "1. Alignment with the Caption: Assess how well each image aligns with the provided caption. Consider the "
    "accuracy of depicted objects, their relationships, and attributes as described in the caption.\n"
    "2. Overall Image Quality: Examine the visual quality of each image, including clarity, detail preservation, "
    "color accuracy, and overall aesthetic appeal.\n"
    "Compare both images using the above criteria and select the one that better aligns with the caption while "
    "exhibiting superior visual quality.\n"
    'Provide a clear conclusion such as "Image 1 is better.", "Image 2 is better." and '
    '"Both images are equally good."\n' + _TASK
)
"""Which of two images is better, of UnifiedReward."""

UNIFIED_REWARD_THINK_PAIR = (
    "Given a caption and two images generated based on this caption, please analyze in detail the two provided "
    "images. Evaluate them on various dimensions such as semantic consistency (how closely the image content "
    "aligns with the caption), aesthetics (composition, color usage, artistic expression), authenticity (realism "
    "and attention to detail), and any other factors you deem relevant. For each evaluation dimension, provide a "
    "score between 1-10 for both images (e.g., Image 1: 8/10, Image 2: 6/10) and provide a concise rationale for "
    "the score. Calculate the total score for each image by summing all dimension scores. Use a chain-of-thought "
    "process to detail your reasoning steps, and enclose all your detailed reasoning within <think> and </think> "
    "tags. Then, in the <answer> tag, output exactly one of the following strings: 'Image 1 is better' or 'Image "
    "2 is better' based on the total scores. No additional text is allowed in the <answer> section.\n\n"
    "Example output format:\n"
    "<think>\n"
    "1. Semantic consistency: Image 1 (9/10) - ...; Image 2 (7/10) - ...\n"
    "2. Aesthetics: Image 2 (8/10) - ...; Image 1 (8/10) - ...\n"
    "3. Authenticity: Image 1 (8/10) - ...; Image 2 (5/10) - ...\n"
    "[Additional dimensions if any]: Image 2 (8/10) - ...; Image 1 (6/10) - ...\n"
    "Total score:\n"
    "Image 1: 9+8+8+6=31\n"
    "Image 2: 7+8+5+8=28\n"
    "</think>\n"
    "<answer>Image 1 is better</answer>\n"
    "**Note: In the example above, scores and the final answer are placeholders meant only to demonstrate the format. "
    "Your actual evaluation should be based on the quality of two given images.**\n\n" + _TASK
)
"""Which of two images is better, after a chain of thought: of UnifiedReward-Think, the judge of Pref-GRPO."""

DEQA_QUESTION = "How would you rate the quality of this image?"
DEQA_ANSWER_PREFIX = "The quality of the image is"
DEQA_LEVELS = {"excellent": 5, "good": 4, "fair": 3, "poor": 2, "bad": 1}


def final_score(answer: str) -> float | None:
    """The number after the first `Final Score:` of an answer, or None."""
    return _number_after("Final Score", answer)


def axis_score(answer: str, axis: Literal["alignment", "coherence", "style"]) -> float | None:
    """The number after `Alignment Score (1-5):`, or that of another axis, or None."""
    return _number_after(rf"{axis} Score \(1-5\)", answer)


def preferred_image(answer: str) -> Preference | None:
    """
    Which image an answer prefers: `"a"` for `Image 1 is better`, `"b"` for `Image 2 is better`, `"tie"` for `Both
    images are equally good`, None for none or several of them. Where there is an `<answer>` only that is read.
    """
    tagged = re.search(r"<answer>(.*?)</answer>", answer, re.DOTALL)
    verdict = tagged.group(1) if tagged else answer
    phrases: dict[Preference, str] = {
        "a": "Image 1 is better",
        "b": "Image 2 is better",
        "tie": "Both images are equally good",
    }
    found = [preference for preference, phrase in phrases.items() if phrase.lower() in verdict.lower()]
    return found[0] if len(found) == 1 else None


def _number_after(label: str, answer: str) -> float | None:
    # Asterisks: chat models like to write the label in bold
    match = re.search(rf"{label}\**:[\s*]*(\d+(?:\.\d+)?)", answer, re.IGNORECASE)
    return float(match.group(1)) if match else None
