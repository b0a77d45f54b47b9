"""What checkpoint formats share: tensors, folders written whole, and memory maps."""
