"""`python -m minigpt4_jax COMMAND`, where the package is not installed."""

from minigpt4_jax import cli

if __name__ == "__main__":
    cli.main()
