"""The layers that model.py is made of, the loss, key-value caches, LoRA adapters, and the cost of each layer."""
