import logging

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_geneval import OTHER_NAMES, save_tiny_clip, save_tiny_mask2former
from torch.nn.functional import normalize
from transformers import CLIPImageProcessorPil, Mask2FormerImageProcessorPil

from trl_flow.rewards.geneval import CLASSES, COLORS, CLIPColorClassifier, Detection, Mask2FormerDetector, crop_object


SIZE = 64


@pytest.fixture(scope="session")
def mask2former(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mask2former")
    return folder, save_tiny_mask2former(folder)


def picture(width=SIZE, height=SIZE, seed=0):
    """Coarse blobs of random colors."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def test_detections_equal_those_of_transformers(mask2former):
    # At 384 x 384, the one size at which transformers' post-processing looks at masks, both must see the same
    folder, model = mask2former
    images = [picture(384, 384, seed) for seed in (0, 1)]
    detector = Mask2FormerDetector(str(folder), shortest_edge=384, longest_edge=384, min_score=0.2)
    processor = Mask2FormerImageProcessorPil.from_pretrained(folder)
    inputs = processor(images, return_tensors="pt")
    with torch.inference_mode():
        outputs = model(**inputs)
    expected = processor.post_process_instance_segmentation(
        outputs, threshold=0.2, target_sizes=[(384, 384)] * 2, return_binary_maps=True
    )
    for found, wanted in zip(detector(images), expected, strict=True):
        segments = sorted(
            zip(wanted["segments_info"], wanted["segmentation"], strict=True), key=lambda s: -s[0]["score"]
        )
        assert len(found) == len(segments) > 1
        assert {one.label for one in found} <= {"dog", "cat"}
        for one, (segment, mask) in zip(found, segments, strict=True):
            assert one.label == CLASSES[segment["label_id"]]
            assert one.score == pytest.approx(segment["score"], abs=1e-5)
            # At its edge a pixel may fall on either side
            assert (one.mask != mask.bool().numpy()).mean() < 1e-3
    masks = [one.mask for one in found]
    assert not all((mask == masks[0]).all() for mask in masks)


def test_boxes_are_those_of_the_masks(mask2former):
    for one in Mask2FormerDetector(str(mask2former[0]), shortest_edge=64)([picture(50, 70)])[0]:
        assert one.mask.shape == (70, 50)
        left, top, right, bottom = (int(edge) for edge in one.box)
        inside = one.mask[top:bottom, left:right]
        assert inside.sum() == one.mask.sum()
        assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()


def test_only_what_exceeds_the_score_is_found(mask2former):
    folder = str(mask2former[0])
    scores = [one.score for one in Mask2FormerDetector(folder, shortest_edge=64, min_score=0.0)([picture()])[0]]
    assert scores == sorted(scores, reverse=True)
    threshold = (scores[0] + scores[1]) / 2
    found = Mask2FormerDetector(folder, shortest_edge=64, min_score=threshold)([picture()])[0]
    assert [one.score for one in found] == pytest.approx(scores[:1], abs=1e-5)
    assert Mask2FormerDetector(folder, shortest_edge=64, min_score=1.0)([picture()]) == [[]]


def test_pictures_of_a_batch_do_not_touch_each_other(mask2former):
    # Padding differs, so that the last digits may
    detector = Mask2FormerDetector(str(mask2former[0]), shortest_edge=64)
    images = [picture(64, 64, 0), picture(64, 64, 1), picture(128, 128, 2)]
    together = detector(images)
    for image, found in zip(images, together, strict=True):
        alone = detector([image])[0]
        assert [one.label for one in found] == [one.label for one in alone]
        assert [one.score for one in found] == pytest.approx([one.score for one in alone], abs=1e-4)
    assert detector([]) == []


def test_pictures_of_other_sizes_change_no_mask(mask2former):
    # In one batch 64 x 64 would be padded for 128 x 64, and 15 % of its masks' pixels would change
    detector = Mask2FormerDetector(str(mask2former[0]), shortest_edge=64)
    images = [picture(64, 64, 0), picture(128, 64, 1), picture(64, 64, 2), picture(20, 64, 3)]
    for image, found in zip(images, detector(images), strict=True):
        alone = detector([image])[0]
        assert len(found) == len(alone) > 0
        for one, other in zip(found, alone, strict=True):
            assert one.mask.shape == (image.height, image.width)
            assert (one.mask != other.mask).mean() < 1e-3  # rounding, at the edges


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (1, 20_000), (33, 47)])
def test_pictures_of_any_size_are_read(mask2former, size):
    found = Mask2FormerDetector(str(mask2former[0]), shortest_edge=64, longest_edge=128)([picture(*size)])[0]
    assert all(one.mask.shape == size[::-1] for one in found)


def test_half_precision(mask2former):
    folder = str(mask2former[0])
    exact = Mask2FormerDetector(folder, shortest_edge=64)([picture()])[0]
    half = Mask2FormerDetector(folder, shortest_edge=64, dtype=torch.bfloat16)([picture()])[0]
    assert [one.label for one in half] == [one.label for one in exact]
    assert [one.score for one in half] == pytest.approx([one.score for one in exact], abs=0.05)


def test_labels_become_geneval_words(mask2former):
    labels = Mask2FormerDetector(str(mask2former[0]), shortest_edge=64)._labels
    assert labels == list(CLASSES)


def test_checkpoints_of_the_older_coco_names_are_read(tmp_path):
    older = {"airplane": "aeroplane", "motorcycle": "motorbike", "couch": "sofa", "tv": "tvmonitor"}
    older |= {"potted plant": "pottedplant", "dining table": "diningtable"}
    save_tiny_mask2former(tmp_path, [older.get(name, OTHER_NAMES.get(name, name)) for name in CLASSES])
    assert Mask2FormerDetector(str(tmp_path))._labels == list(CLASSES)


def test_other_labels_are_refused(tmp_path):
    save_tiny_mask2former(tmp_path, [f"LABEL_{i}" for i in range(80)])
    with pytest.raises(ValueError, match="labels of .* are not COCO's: it has none for .'airplane'.*75 more"):
        Mask2FormerDetector(str(tmp_path))


def test_nothing_is_said_of_the_missing_loss(mask2former, caplog):
    assert any(key.startswith("criterion.") for key in mask2former[1].state_dict())
    with caplog.at_level(logging.INFO, logger="transformers"):
        Mask2FormerDetector(str(mask2former[0]))
    assert "criterion" not in caplog.text


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    return folder, *save_tiny_clip(folder)


def test_colors_are_those_of_the_nearest_sentences(clip):
    folder, model, tokenizer = clip
    sentences_of = {}
    for name in ("dog", "stop sign"):
        for color in COLORS:
            sentences = [f"a photo of a {color} {name}", f"a photo of a {color}-colored {name}"]
            sentences.append(f"a photo of a {color} object")
            with torch.inference_mode():
                # One by one: no sentence is padded
                tokens = [tokenizer(sentence, return_tensors="pt") for sentence in sentences]
                features = [model.get_text_features(**one).pooler_output[0] for one in tokens]
            sentences_of[name, color] = sum(normalize(feature, dim=0) for feature in features)
    images = [picture(40, 32, seed) for seed in range(12)]
    names = ["dog", "stop sign"] * 6
    expected = []
    for image, name in zip(images, names, strict=True):
        with torch.inference_mode():
            pixels = CLIPImageProcessorPil.from_pretrained(folder)(image, return_tensors="pt")
            seen = model.get_image_features(**pixels).pooler_output[0]
        cosines = [float(torch.cosine_similarity(seen, sentences_of[name, color], dim=0)) for color in COLORS]
        expected.append(COLORS[int(np.argmax(cosines))])
    assert len(set(expected)) > 1  # else any constant would do
    assert CLIPColorClassifier(str(folder))(images, names) == expected
    assert CLIPColorClassifier(str(folder), batch_size=5)(images, names) == expected
    assert CLIPColorClassifier(str(folder))([], []) == []


@pytest.mark.parametrize("extra, left", [(3, 2), (7, 4), (1, 0), (4, 2)])
def test_an_object_is_cropped_as_by_open_clip(clip, extra, left):
    """Half margins are rounded to even, where transformers' processor rounds 1.5 and 3.5 down."""
    classifier, seen = CLIPColorClassifier(str(clip[0])), []
    image = picture(32 + extra, 32)

    def take(module, args, kwargs):
        seen.append(kwargs["pixel_values"])

    with classifier._model.vision_model.register_forward_pre_hook(take, with_kwargs=True):
        classifier([image], ["dog"])
    shown = np.asarray(image, dtype=np.float32)[:, left : left + 32] / 255
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    np.testing.assert_allclose(seen[0][0].permute(1, 2, 0).numpy(), (shown - mean) / std, atol=1e-5)


RED, BLUE = (255, 0, 0), (0, 0, 255)


def test_crop_shows_the_object_on_grey():
    image = Image.new("RGB", (20, 10), BLUE)
    image.paste(RED, (4, 2, 8, 6))
    mask = np.zeros((10, 20), dtype=bool)
    mask[2:6, 4:6] = True
    crop = np.asarray(crop_object(image, Detection("dog", 0.9, (4, 2, 9, 6), mask)))
    assert crop.shape == (4, 5, 3)
    assert (crop[:, :2] == RED).all()
    assert (crop[:, 2:] == 0x99).all()  # also what is red but not of the object


def test_crop_without_a_mask_shows_the_box():
    image = Image.new("RGB", (20, 10), BLUE)
    image.paste(RED, (4, 2, 8, 6))
    crop = np.asarray(crop_object(image, Detection("dog", 0.9, (4, 2, 9, 6))))
    assert (crop[:, :4] == RED).all() and (crop[:, 4:] == BLUE).all()


@pytest.mark.parametrize(
    "box, size",
    [
        ((-5, -5, 7, 3), (7, 3)),
        ((15, 5, 99, 99), (5, 5)),
        ((3.4, 2.6, 8.6, 6.4), (6, 3)),  # rounded to 3, 3, 9, 6
        ((3.2, 2.0, 3.4, 6.0), (1, 4)),
        ((3, 2, 3, 6), (1, 4)),
        ((0, 0, 20, 10), (20, 10)),
    ],
)
def test_crop_stays_in_the_picture(box, size):
    assert crop_object(Image.new("RGB", (20, 10)), Detection("dog", 0.9, box)).size == size


def test_crop_refuses_what_is_not_of_this_picture():
    image = Image.new("RGB", (20, 10))
    with pytest.raises(ValueError, match="shape .20, 10., but the image is .10, 20."):
        crop_object(image, Detection("dog", 0.9, (0, 0, 5, 5), np.ones((20, 10), dtype=bool)))
    with pytest.raises(ValueError, match="lies outside of the image, which is 20 x 10"):
        crop_object(image, Detection("dog", 0.9, (20, 0, 25, 5)))


def test_sizes_that_leave_nothing_are_refused(mask2former):
    for sizes in ({"shortest_edge": 32}, {"shortest_edge": 256, "longest_edge": 128}):
        with pytest.raises(ValueError, match="the first must be at least 64"):
            Mask2FormerDetector(str(mask2former[0]), **sizes)
