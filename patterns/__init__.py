"""What transformers are made of (nouns) and what is done to them (verbs)."""

if __name__ != "fxquant.patterns":
    raise ImportError(f"import fxquant.patterns, not {__name__!r}: one module under two names splits its registries")
