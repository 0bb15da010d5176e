"""Images to edit that are small, in place of those of a megapixel that the released pipelines work with."""

import pytest
from tiny_flux import tiny_kontext_sizes
from tiny_qwen import smaller_input_images


@pytest.fixture
def small_input_images(monkeypatch):
    smaller_input_images(monkeypatch)
    with tiny_kontext_sizes():
        yield
