"""Byte and subword tokenizers, the places at which a long text can be cut for them, and the vocabulary files."""
