"""The frozen network that makes features of images: its layers, its weights, and the forward pass."""

DEFAULT_BACKBONE = "vgg16:classifier.1"  # fc6 after its ReLU
