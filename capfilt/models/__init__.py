"""The multimodal mixture of encoder-decoder (MED), its image towers, losses, generation and weights."""
