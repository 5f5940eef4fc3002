"""Tokenizers of bytes and subwords, where a text may be cut for them, and the files of vocabularies."""
