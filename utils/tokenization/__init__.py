"""What subword tokenizers share: where a text may be cut, and the files of vocabularies."""
