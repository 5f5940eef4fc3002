"""Searches over settings: what sweep.py and `train.py --multirun` do. Every trial is an ordinary run."""
