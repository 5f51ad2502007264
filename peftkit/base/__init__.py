"""What a base is and where its files are: references, the embedded base, identity, tokenizer. No torch here."""
