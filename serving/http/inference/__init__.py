"""The Open Inference Protocol: columns of a request as tensors, in JSON or binary."""
