"""The value of a target that is not a token."""

IGNORED = -100  # has no loss, as in torch.nn.functional.cross_entropy
