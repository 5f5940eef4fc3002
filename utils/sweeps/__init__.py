"""Searches over settings, for sweep.py and `train.py --multirun`. Every trial is an ordinary run."""
