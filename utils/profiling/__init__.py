"""Profiling, for profile_model.py and `train.py --profile-step`: where the time and memory of a step go."""
