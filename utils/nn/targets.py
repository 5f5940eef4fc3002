"""What a target may be beside a token."""

IGNORED = -100  # it has no loss, as in torch.nn.functional.cross_entropy
