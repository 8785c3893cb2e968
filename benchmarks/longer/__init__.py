"""Rounds made of recorded runs that have longer ones, and what tuner says of them."""
