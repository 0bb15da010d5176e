"""How different the images, or videos, of one prompt are."""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from trl_flow.images import Sample, frames_of, spread, to_rgb


# Images are compared at this size: layout and colors count, grain does not. Videos are by so many frames
_SIDE, _FRAMES = 32, 4


def thumbnails(samples: Sequence[Sample]) -> np.ndarray:
    """Images of any size and mode reduced to 32 x 32 RGB: uint8 of shape `(N, 3072)`. Of videos, all of as many
    frames, four that are evenly spaced, one after another: `(N, 12288)`."""
    how = {"size": (_SIDE, _SIDE), "resample": Image.Resampling.BOX, "reducing_gap": 2.0}
    shown = [spread(frames_of(sample), _FRAMES) for sample in samples]
    return np.stack([np.ravel([to_rgb(frame).resize(**how) for frame in frames]) for frames in shown])


def pixel_features(thumbs: np.ndarray) -> np.ndarray:
    """Thumbnails as features whose Euclidean distance is the root mean square difference, in `[0, 1]`: `(N, D)`."""
    return thumbs / (255.0 * np.sqrt(thumbs.shape[1]))


def diversity(
    images: Sequence[Sample],
    num_images_per_prompt: int,
    embed: Callable[[Sequence[Sample]], np.ndarray] | None = None,
) -> float:
    """
    Mean over the prompts of the mean distance between two different images of the prompt.

    `images` are `N`, those of one prompt next to each other, `K` (at least 2) for each. `embed` gives them features
    `(N, D)`, of which Euclidean distances are taken, such as the unit vectors of an image encoder. By default images
    are reduced to 32 x 32 RGB, and the distance is the root mean square of the differences: 0 for equal images, 1 for
    a black and a white one; of videos over four evenly spaced frames, each compared with the one at its place in the
    other. `ValueError` if `K` does not fit `N`, or `embed` gives anything but one vector for each.
    """
    features = pixel_features(thumbnails(images)) if embed is None else np.asarray(embed(images), dtype=np.float64)
    if features.ndim != 2 or len(features) != len(images):
        raise ValueError(
            f"embed gave features of shape {features.shape} for {len(images)} images. Return one vector for each: "
            f"({len(images)}, D)."
        )
    return mean_pairwise_distance(features, num_images_per_prompt)


def mean_pairwise_distance(features: np.ndarray, group_size: int) -> float:
    """Mean over groups of the mean Euclidean distance of all pairs in a group: of features `(N, D)`, groups of
    `group_size` (at least 2, and a divisor of `N`) contiguous."""
    if group_size < 2 or len(features) == 0 or len(features) % group_size != 0:
        raise ValueError(
            f"The group size is {group_size} for {len(features)} images, but must be at least 2 (a single image "
            "has no diversity) and divide their number."
        )
    first, second = np.triu_indices(group_size, k=1)
    groups = features.reshape(-1, group_size, features.shape[1])
    # Group by group: all pairs at once would take gigabytes
    return float(np.mean([np.linalg.norm(group[first] - group[second], axis=1).mean() for group in groups]))
