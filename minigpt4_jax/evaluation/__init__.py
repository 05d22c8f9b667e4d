"""Measures of what a model says about images."""
