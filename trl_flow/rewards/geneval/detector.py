"""Mask2Former as GenEval's object detector."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.nn.functional import interpolate
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    Mask2FormerModel,
    Mask2FormerPreTrainedModel,
)

from trl_flow.prompt_words import CLASSES
from trl_flow.rewards.checkpoints import load_pretrained
from trl_flow.rewards.geneval.rules import Detection, geneval_class


class _Mask2Former(Mask2FormerForUniversalSegmentation):
    """transformers' model without its training loss, the one part that needs SciPy."""

    _keys_to_ignore_on_load_unexpected = [r"^criterion\."]

    def __init__(self, config: Mask2FormerConfig):
        Mask2FormerPreTrainedModel.__init__(self, config)
        self.model = Mask2FormerModel(config)
        self.class_predictor = nn.Linear(config.hidden_dim, config.num_labels + 1)
        self.post_init()


class Mask2FormerDetector:
    """
    Finds the objects of COCO's 80 classes and their masks by Mask2Former (Cheng et al., 2022,
    https://arxiv.org/abs/2112.01527), prepared and read out as by mmdetection, which GenEval uses.

    The default checkpoint is the Mask2Former authors' own (Swin-S, COCO instances). GenEval's is mmdetection's
    training of the same model on the same data, so that scores of single images can differ from published runs.

    Images are scaled so that the shorter edge has `shortest_edge` pixels, or the longer one `longest_edge` if that is
    less. Masks have the size of the image, where transformers' post-processing makes all of them 384 x 384.

    Args:
        model (`str`, defaults to `"facebook/mask2former-swin-small-coco-instance"`): hub id or folder of a Mask2Former
            whose labels are COCO's.
        revision, token, device, dtype: as in [`CLIPColorClassifier`].
        min_score (`float`, defaults to 0.3): detections of at most this score are left out.
        shortest_edge (`int`, defaults to 800), longest_edge (`int`, defaults to 1333): sizes in pixels.

    Attributes:
        classes (`frozenset[str]`): what it can find, in GenEval's words.

    Raises:
        CheckpointError: if the model or its image processor cannot be loaded.
        ValueError: if the model's labels are not COCO's, or the sizes are below 64 or in the wrong order.
    """

    classes = frozenset(CLASSES)

    def __init__(
        self,
        model: str = "facebook/mask2former-swin-small-coco-instance", *,
        revision: str | None = None, token: str | bool | None = None,
        device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
        min_score: float = 0.3, shortest_edge: int = 800, longest_edge: int = 1333,
    ):  # fmt: skip
        # Swin halves a quarter of the size three times: from less than 64 a single pixel could be left
        if not 64 <= shortest_edge <= longest_edge:
            given = f"shortest_edge={shortest_edge} and longest_edge={longest_edge}"
            raise ValueError(f"{given}, but the first must be at least 64 and the second not be less.")
        source: dict[str, Any] = {"revision": revision, "token": token}
        self._model = load_pretrained(_Mask2Former, model, **source).to(device, dtype)
        self._labels = [geneval_class(self._model.config.id2label[i]) for i in range(self._model.config.num_labels)]
        if missing := sorted(self.classes - set(self._labels)):
            lacks = f"it has none for {missing[:5]} and {max(len(missing) - 5, 0)} more of GenEval's classes"
            advice = "Give a Mask2Former trained on COCO's instances, or a detector of your own"
            raise ValueError(f"The labels of {model} are not COCO's: {lacks}. {advice}.")
        self._processor = load_pretrained(Mask2FormerImageProcessorPil, model, **source)
        self._size = {"shortest_edge": shortest_edge, "longest_edge": longest_edge}
        self.min_score = min_score

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image]) -> list[list[Detection]]:
        """What is on each of some RGB images, the most confident first, with masks and labels in GenEval's words."""
        # Narrower strips would be left with no pixel when scaled
        least = [max(32, max(image.size) // 40) for image in images]
        widened = [
            image.resize([max(edge, at_least) for edge in image.size]) if min(image.size) < at_least else image
            for image, at_least in zip(images, least, strict=True)
        ]
        # Padding, which images of different sizes would need in one batch, changes what the model sees at their edges
        by_size: dict[tuple[int, int], list[int]] = defaultdict(list)
        for i, image in enumerate(widened):
            by_size[image.size].append(i)
        found = {}
        for same in by_size.values():
            inputs = self._processor([widened[i] for i in same], size=self._size, return_tensors="pt")
            pixels = inputs["pixel_values"].to(self._model.device, self._model.dtype)
            outputs = self._model(pixel_values=pixels)
            for i, *logits in zip(same, outputs.class_queries_logits, outputs.masks_queries_logits, strict=True):
                found[i] = self._read_out(images[i], *logits, size=pixels.shape[2:])
        return [found[i] for i in range(len(images))]

    def _read_out(
        self, image: Image.Image, class_logits: torch.Tensor, mask_logits: torch.Tensor, *, size: tuple[int, int]
    ) -> list[Detection]:
        """
        One image's detections, from the logits of its Q queries, `(Q, number of classes + 1)` with "no object" last
        and `(Q, H / 4, W / 4)`. `size` is `(H, W)`, in which the model saw it.
        """
        # The score: the probability of the class times the mask's mean. A query may be of several classes
        scores, which = class_logits.float().softmax(-1)[:, :-1].flatten().topk(len(class_logits))
        # A mask's share only lowers the score: what is not above `min_score` here never will be
        which = which[scores > self.min_score]
        detections = []
        # One by one: masks of large images are large
        for score, query, label in zip(scores, which // len(self._labels), which % len(self._labels), strict=False):
            mask = mask_logits[query][None, None].float()
            mask = interpolate(mask, size=size, mode="bilinear", align_corners=False)
            mask = interpolate(mask, size=(image.height, image.width), mode="bilinear", align_corners=False)[0, 0]
            covered = mask > 0
            score = float(score * (mask.sigmoid() * covered).sum() / (covered.sum() + 1e-6))
            if score > self.min_score:
                rows, columns = (covered.any(axis).nonzero().flatten().tolist() for axis in (1, 0))
                box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
                detections.append(Detection(self._labels[label], score, box, covered.cpu().numpy()))
        return sorted(detections, key=lambda detection: -detection.score)
