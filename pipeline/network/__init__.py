"""The frozen network that makes features of images: its layers, its weights, and the forward pass."""
