"""From files to arrays: images, prompts, token ids, batches (no jax in here)."""
