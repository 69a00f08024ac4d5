"""MED, the multimodal mixture of encoder-decoder: image towers, losses, generation, weights."""
