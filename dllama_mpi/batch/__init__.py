"""Answers to a file of requests, written as they come, so that the same command goes on after any end."""
