"""The layers that model.py is made of."""
