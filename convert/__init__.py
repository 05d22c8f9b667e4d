"""Turning published weights into directories that `minigpt4_jax` loads."""
