"""How a step's rows go through the model: split by tokens, laid without padding, scored where they have labels."""
