"""How base and adapter behave on a few fixed prompts: refusals, formats, languages, and what they give away."""
