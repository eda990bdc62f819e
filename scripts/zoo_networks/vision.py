"""Networks for images: transformers, timm, torchvision, segmentation-models-pytorch."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from zoo_networks.entry import CLASSES, Network, images, maps, vision_library
from zoo_networks.language import hugging

SIDE = 64
SMALLEST_STEP = 1e-7
SMALL_STEP = 1e-3  # of nets with batch norms over few numbers: larger steps multiply round-off
PATCHES = {
    "image_size": 16, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 3,
    "num_attention_heads": 2, "intermediate_size": 24, "num_labels": CLASSES,
}  # fmt: skip


def _h(name: str, config: dict[str, Any], side: int = 16, **more: Any) -> Network:
    return Network(name, "transformers", hugging(name, config, **more), images(side, "logits"))


TRANSFORMERS = (
    _h("ViTForImageClassification", PATCHES),
    _h("DeiTForImageClassification", PATCHES),
    _h("BeitForImageClassification", {**PATCHES, "use_relative_position_bias": True}),
    _h("Dinov2ForImageClassification", PATCHES),
    _h("SwinForImageClassification", {"image_size": 32, "patch_size": 4, "embed_dim": 8,
       "depths": [2, 2], "num_heads": [2, 2], "window_size": 4, "num_labels": CLASSES}, 32),
    _h("ConvNextForImageClassification", {"hidden_sizes": [8, 12], "depths": [1, 2],
       "num_stages": 2, "num_labels": CLASSES}, 32),
    _h("ResNetForImageClassification", {"embedding_size": 8, "hidden_sizes": [8, 12],
       "depths": [1, 1], "layer_type": "basic", "num_labels": CLASSES}, 32),
    Network("SegformerForSemanticSegmentation", "transformers",
        hugging("SegformerForSemanticSegmentation", {"hidden_sizes": [8, 12], "depths": [1, 1],
        "num_encoder_blocks": 2, "num_attention_heads": [1, 2], "sr_ratios": [2, 1],
        "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2],
        "decoder_hidden_size": 8, "num_labels": CLASSES}), maps(32, "logits", 4)),
)  # fmt: skip


def _m(name: str, side: int = SIDE, lr: float = SMALL_STEP, **settings: Any) -> Network:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=CLASSES, **settings)

    return Network(name, "timm", build, images(side), lr)


def _timm_class(module: str, name: str, **settings: Any) -> nn.Module:
    made = getattr(importlib.import_module(f"timm.models.{module}"), name)
    return made(num_classes=CLASSES, **settings)


VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
TIMM = (
    _m("vit_tiny_patch16_224", 16, **VIT),
    _m("deit3_small_patch16_224", 16, **VIT),
    _m("beit_base_patch16_224", 16, **VIT),
    _m("eva02_tiny_patch14_224", 16, **VIT),
    Network("mixer", "timm", lambda: _timm_class("mlp_mixer", "MlpMixer", img_size=16, patch_size=8,
        embed_dim=16, num_blocks=3), images(16)),
    _m("swin_tiny_patch4_window7_224", 32, img_size=32, window_size=4, embed_dim=8, depths=(2, 2),
       num_heads=(2, 2)),
    _m("resnet18"),
    _m("resnet26d"),
    _m("efficientnet_lite0", lr=SMALLEST_STEP),
    _m("mobilenetv3_small_050"),
    _m("convnext_atto", dims=(8, 12, 16, 20), depths=(1, 1, 2, 1)),
    _m("regnetx_002"),
    _m("densenet121", 32, growth_rate=4, block_config=(2, 2, 2, 2)),
    Network("poolformer", "timm", lambda: _timm_class("metaformer", "MetaFormer",
        depths=(1, 1, 1, 1), dims=(8, 12, 16, 20)), images(32)),
    _m("xcit_nano_12_p16_224", 32, embed_dim=16, depth=2, num_heads=2),
    _m("ghostnet_050"),
)  # fmt: skip


def _v(
    name: str, side: int = SIDE, key: str | None = None, lr: float = SMALL_STEP, **settings: Any
) -> Network:
    def build() -> nn.Module:
        make = getattr(vision_library().models, name)
        return make(num_classes=CLASSES, **settings)

    return Network(name, "torchvision", build, images(side, key), lr)


def _vit() -> nn.Module:
    return vision_library().models.VisionTransformer(16, 8, 3, 2, 16, 24, num_classes=CLASSES)


def _swin() -> nn.Module:
    return vision_library().models.SwinTransformer(
        [4, 4], 8, [2, 2], [2, 2], [4, 4], stochastic_depth_prob=0.0, num_classes=CLASSES
    )


def _bottlenecks() -> nn.Module:
    resnet = importlib.import_module("torchvision.models.resnet")
    return resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], num_classes=CLASSES, width_per_group=8)


def _densenet() -> nn.Module:
    return vision_library().models.DenseNet(4, (2, 2, 2, 2), 8, num_classes=CLASSES)


def _convnext() -> nn.Module:
    made = importlib.import_module("torchvision.models.convnext")
    settings = [made.CNBlockConfig(8, 12, 2), made.CNBlockConfig(12, None, 2)]
    return made.ConvNeXt(settings, 0.0, num_classes=CLASSES)


def _segmenting(name: str, **settings: Any) -> Network:
    def build() -> nn.Module:
        make = getattr(vision_library().models.segmentation, name)
        return make(weights=None, weights_backbone=None, num_classes=CLASSES, **settings)

    return Network(name, "torchvision", build, maps(SIDE, "out"), SMALL_STEP)


TORCHVISION = (
    _v("resnet18"),
    Network("resnet, bottlenecks", "torchvision", _bottlenecks, images(SIDE), SMALL_STEP),
    _v("mobilenet_v2"),
    _v("mobilenet_v3_small"),
    _v("efficientnet_b0", lr=SMALLEST_STEP),
    Network("densenet", "torchvision", _densenet, images(SIDE), SMALL_STEP),
    _v("squeezenet1_1"),
    _v("shufflenet_v2_x0_5"),
    _v("mnasnet0_5", lr=SMALLEST_STEP),
    _v("regnet_y_400mf"),
    _v("googlenet", 64, "logits", init_weights=False),
    Network("vit", "torchvision", _vit, images(16)),
    Network("swin", "torchvision", _swin, images(32)),
    Network("convnext", "torchvision", _convnext, images(32)),
    _segmenting("lraspp_mobilenet_v3_large"),
    _segmenting("deeplabv3_mobilenet_v3_large", aux_loss=True),
)


def _s(name: str, **settings: Any) -> Network:
    def build() -> nn.Module:
        make = getattr(importlib.import_module("segmentation_models_pytorch"), name)
        return make("resnet18", encoder_weights=None, classes=CLASSES, **settings)

    return Network(name, "segmentation_models_pytorch", build, maps(SIDE), SMALL_STEP)


SEGMENTATION = (
    _s("Unet", decoder_channels=(16, 12, 8, 8, 4)),
    _s("FPN", decoder_pyramid_channels=32, decoder_segmentation_channels=32, decoder_dropout=0.0),
    _s("Linknet"),
    _s("PSPNet", psp_out_channels=8, psp_dropout=0.0),
    _s("DeepLabV3Plus", decoder_channels=8),
)

VISION = (*TRANSFORMERS, *TIMM, *TORCHVISION, *SEGMENTATION)
