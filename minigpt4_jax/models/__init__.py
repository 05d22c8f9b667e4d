"""The model: ViT, Q-Former, projector and LLaMA decoder as Flax NNX modules."""
