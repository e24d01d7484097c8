"""Predicting and measuring: what a model needs and how fast it should be, or is."""
