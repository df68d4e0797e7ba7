from __future__ import annotations

from parts import batch_of, small
from torch.testing import assert_close


def test_the_encoder_equals_the_vision_tower_on_each_single_image() -> None:
    model = small()
    images = batch_of(model, [2, 0, 1, 2])["images"]
    states = model.vision(images)  # (M images, L levels, N patches, C channels)
    for index, image in enumerate(images):
        hidden_states = model.vision.tower(image[None], output_hidden_states=True).hidden_states
        for axis, level in enumerate(model.config.read_levels):
            assert_close(states[index, axis], hidden_states[level][0, 1:])  # token 0 is the class token
