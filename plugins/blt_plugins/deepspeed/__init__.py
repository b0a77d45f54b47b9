"""DeepSpeed as a training backend."""
