"""Profiling, for profile_model.py and `train.py --profile-step`: where a step's time and memory go."""
