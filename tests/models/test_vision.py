"""The vision tower: only the layers that are read are computed."""

import torch


def test_layers_behind_the_feature_layer_are_not_computed(vlm):
    """With feature layer -2 the last layer and the final norm get no gradient.

    The vision tower is set free for this test. It is frozen otherwise.
    """
    vision_tower = vlm.model.vision_tower.requires_grad_(True)
    config = vlm.model.config.vision
    tiles = torch.randn(1, 3, config.image_size, config.image_size)

    vision_tower(tiles).square().sum().backward()

    last_layer = f"encoder.layers.{config.num_layers - 1}."
    for name, parameter in vision_tower.named_parameters():
        is_computed = not name.startswith((last_layer, "post_layernorm."))
        assert (parameter.grad is not None) == is_computed, name
