"""What profile_model.py does: where the time and memory of a step go."""
