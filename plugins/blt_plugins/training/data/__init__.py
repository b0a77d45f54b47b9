"""From the documents of a corpus to the batches of a step."""
